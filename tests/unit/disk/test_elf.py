"""ELF: what the loader would load, by the word of ldd; and files that are not what they seem."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from calve.disk import elf
from calve.errors import DamagedError, NotFoundError

PYTHON = Path(sys.executable).resolve()


def ldd(path):
    text = subprocess.check_output(["ldd", path], text=True)
    return {Path(found).resolve() for found in re.findall(r"(/\S+) \(0x", text)}


needs_ldd = pytest.mark.skipif(shutil.which("ldd") is None, reason="ldd is not installed")


@needs_ldd
def test_the_interpreter_s_closure_is_ldd_s():
    found = elf.closure([PYTHON])
    assert {path.resolve() for path in found} == ldd(PYTHON)
    assert len(found) == len(set(found))


@needs_ldd
@pytest.mark.parametrize("module", ["_ssl", "nacl._sodium", "backports.zstd._zstd", "_ctypes"])
def test_an_extension_module_s_closure_is_ldd_s(module):
    origin = Path(pytest.importorskip(module).__file__)
    without_loader = {path.resolve() for path in elf.closure([origin])}
    assert without_loader | {PYTHON} >= ldd(origin) - {
        path for path in ldd(origin) if "ld-linux" in path.name
    }
    assert without_loader <= ldd(origin)


@needs_ldd
def test_what_a_wheel_brings_is_found_beside_it():
    """nacl's or cffi's own libraries, by $ORIGIN, where there are any."""
    import _cffi_backend

    origin = Path(_cffi_backend.__file__)
    dynamic = elf.read(origin)
    assert dynamic is not None
    assert "libc.so.6" in dynamic.needed
    assert {path.resolve() for path in elf.closure([origin])} <= ldd(origin)


def test_a_program_names_its_loader():
    dynamic = elf.read(PYTHON)
    assert dynamic is not None
    assert dynamic.interpreter is not None
    assert Path(dynamic.interpreter).exists()
    assert Path(dynamic.interpreter) in elf.closure([PYTHON])


def test_what_is_not_elf_or_static(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert elf.read(script) is None
    assert elf.closure([script]) == []
    busybox = shutil.which("busybox")
    if busybox is not None:
        assert elf.closure([Path(busybox)]) == [] or ldd(Path(busybox))


def header(**changes):
    fields = {"cls": 2, "data": 1, "phoff": 64, "phentsize": 56, "phnum": 1} | changes
    ident = b"\x7fELF" + bytes([fields["cls"], fields["data"], 1]) + bytes(9)
    return ident + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, fields["phoff"], 0, 0, 64, fields["phentsize"],
        fields["phnum"], 0, 0, 0,
    )  # fmt: skip


def dynamic_at(offset, size):
    return struct.pack("<IIQQQQQQ", 2, 0, offset, 0, 0, size, size, 8)


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF",
        b"\x7fELF\x02\x01",
        header(cls=1),
        header(data=2),
        header(),
        header(phoff=1 << 62),
        header(phnum=60_000) + bytes(100),
        # A dynamic section whose strings are nowhere.
        header() + dynamic_at(120, 32) + struct.pack("<QQQQ", 1, 5, 5, 1 << 40),
        # A name that does not end.
        header(phnum=2)
        + dynamic_at(176, 32)
        + struct.pack("<IIQQQQQQ", 1, 0, 0, 0, 0, 400, 400, 8)
        + struct.pack("<QQQQ", 1, 0, 5, 200)
        + b"x" * 10,
    ],
)
def test_damage_is_an_error_with_its_place(tmp_path, data):
    place = tmp_path / "bad.so"
    place.write_bytes(data)
    with pytest.raises(DamagedError) as caught:
        elf.read(place)
    assert caught.value.place == str(place)


def library(*needed, run_path=""):
    """Return a library that needs others by name."""
    names = [*((1, name) for name in needed), *([(29, run_path)] if run_path else [])]
    base, size = 64 + 2 * 56, 16 * (len(names) + 1)
    strings, table = b"\0", b""
    for tag, name in names:
        table += struct.pack("<QQ", tag, len(strings))
        strings += name.encode() + b"\0"
    return (
        header(phnum=2)
        + dynamic_at(base, size)
        + struct.pack("<IIQQQQQQ", 1, 0, 0, 0, 0, 1000, 1000, 8)
        + table
        + struct.pack("<QQ", 5, base + size)
        + strings
    )


def test_a_library_that_is_nowhere(tmp_path):
    place = tmp_path / "x.so"
    place.write_bytes(library("libnowhere.so.9"))
    assert elf.read(place) == elf.Dynamic(None, ("libnowhere.so.9",), ())
    with pytest.raises(NotFoundError, match=r"libnowhere\.so\.9"):
        elf.closure([place])


# Below another root


@pytest.fixture
def root(tmp_path):
    """A system of another place: the interpreter and its libraries, at the end of absolute links."""
    top = tmp_path / "system"
    for library in elf.closure([PYTHON]):
        place = top / str(library).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        real = top / "real" / library.name
        real.parent.mkdir(exist_ok=True)
        shutil.copyfile(library.resolve(), real)
        place.symlink_to(f"/real/{library.name}")
    (top / "bin").mkdir(exist_ok=True)
    shutil.copyfile(PYTHON, top / "bin/python")
    (top / "etc/ld.so.conf.d").mkdir(parents=True)
    (top / "etc/ld.so.conf").write_text("include /etc/ld.so.conf.d/*.conf\n")
    folders = sorted({str(path.parent) for path in elf.closure([PYTHON])})
    (top / "etc/ld.so.conf.d/all.conf").write_text("# where they are\n" + "\n".join(folders))
    return top


def test_a_closure_below_a_root_is_that_root_s(root):
    found = elf.closure([root / "bin/python"], root)
    assert [path.relative_to(root) for path in found] == [
        path.relative_to("/") for path in elf.closure([PYTHON])
    ]


def test_a_library_that_only_we_have_is_not_the_root_s(root):
    (library,) = [path for path in elf.closure([PYTHON]) if path.name == "libc.so.6"]
    (root / str(library).lstrip("/")).unlink()
    with pytest.raises(NotFoundError, match=r"libc\.so\.6"):
        elf.closure([root / "bin/python"], root)


def test_a_run_path_is_below_the_root_and_what_it_found_is_loaded(tmp_path):
    """As systemd's: its libraries stand in a folder of their own, and only one of them says where."""
    (tmp_path / "lib/own").mkdir(parents=True)
    (tmp_path / "program").write_bytes(library("libone.so", "libtwo.so", run_path="/lib/own"))
    (tmp_path / "lib/own/libone.so").write_bytes(library("libtwo.so"))
    (tmp_path / "lib/own/libtwo.so").write_bytes(library())
    found = elf.closure([tmp_path / "program"], tmp_path)
    assert found == [tmp_path / "lib/own/libone.so", tmp_path / "lib/own/libtwo.so"]


def test_links_never_leave_a_root(tmp_path):
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "usr/lib/one").symlink_to("/lib/two")
    (tmp_path / "usr/lib/two").symlink_to("../../../../etc/passwd")
    (tmp_path / "usr/lib/round").symlink_to("/lib/./round")
    assert elf.inside(tmp_path, "/lib/one") == tmp_path / "etc/passwd"
    assert elf.inside(tmp_path, "/../..//usr/./lib/../lib") == tmp_path / "usr/lib"
    assert elf.inside(tmp_path, "/lib/none/below") == tmp_path / "usr/lib/none/below"
    with pytest.raises(DamagedError, match="circle"):
        elf.inside(tmp_path, "/lib/round")
