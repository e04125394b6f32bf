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


def test_a_library_that_is_nowhere(tmp_path):
    strings = b"\0libnowhere.so.9\0"
    base = 64 + 2 * 56
    table = struct.pack("<QQQQ", 1, 1, 5, base + 32)
    data = (
        header(phnum=2)
        + dynamic_at(base, 32)
        + struct.pack("<IIQQQQQQ", 1, 0, 0, 0, 0, 1000, 1000, 8)
        + table
        + strings
    )
    place = tmp_path / "x.so"
    place.write_bytes(data)
    assert elf.read(place) == elf.Dynamic(None, ("libnowhere.so.9",), ())
    with pytest.raises(NotFoundError, match=r"libnowhere\.so\.9"):
        elf.closure([place])
