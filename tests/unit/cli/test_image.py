"""`calve image initrd`, with a busybox and kernel modules of straw."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys

import pytest

from calve.cli import image, main
from calve.cli.session import Session
from calve.disk import initrd
from calve.errors import CalveError, NotFoundError, UsageError
from calve.nix.signing import SecretKey

KEY = SecretKey.generate("acme-1").public.dump()


@pytest.fixture
def parts(tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in initrd.REQUIRED:
        (modules / f"{name}.ko").write_bytes(b"\0depends=\0")
    (tmp_path / "busybox").write_text("#!straw\n")
    return tmp_path


@pytest.fixture
def call(parts, monkeypatch):
    monkeypatch.chdir(parts)
    monkeypatch.setattr(initrd, "write", functools.partial(initrd.write, level=1))

    def run(*more, trusted=(KEY,)):
        given = dict(zip(more[::2], more[1::2], strict=False))
        argv = ["image", "initrd", *more]
        for name, value in (("--kernel-modules", "modules"), ("--busybox", "busybox")):
            if name not in given:
                argv += [name, value]
        for key in trusted:
            argv += ["--trusted", key]
        out = io.StringIO()
        options = main._parser(argv).parse_args([*argv, "--out", "initrd.img"])
        assert image.run(options, Session(out, io.StringIO())) == 0
        return out.getvalue()

    return run


def test_it_is_written_and_its_sizes_are_printed(call, parts):
    (parts / "ca.pem").write_text("authorities")
    document = json.loads(call("--ca", "ca.pem", "--hold", "7", "--json"))
    size = (parts / "initrd.img").stat().st_size
    assert document.pop("modules") > 50
    assert any("libc.so" in name for name in document.pop("libraries"))
    assert document.pop("unpacked_bytes") > size
    assert document == {
        "file": "initrd.img",
        "dry_run": False,
        "compressed_bytes": size,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }


def test_a_dry_run_writes_nothing(call, parts):
    before = sorted(parts.iterdir())
    assert call("--dry-run").startswith("would write initrd.img: ")
    assert json.loads(call("--dry-run", "--json"))["compressed_bytes"] is None
    assert sorted(parts.iterdir()) == before


def test_keys_come_from_the_fleet_file_too(call, parts):
    (parts / "calve.toml").write_text(f'[cache]\nurl = "/c"\ntrusted = ["{KEY}"]\n')
    assert call("--dry-run", trusted=())


def test_what_is_missing_or_wrong(call, parts):
    with pytest.raises(UsageError, match="no key is trusted"):
        call(trusted=())
    with pytest.raises(UsageError, match="not a public key"):
        call(trusted=("nonsense",))
    with pytest.raises(NotFoundError, match="none: does not exist"):
        call("--kernel-modules", "none")
    with pytest.raises(NotFoundError, match="none: there is no such program"):
        call("--busybox", "none")
    with pytest.raises(UsageError, match="not static"):
        call("--busybox", sys.executable)
    (parts / "modules/virtio_net.ko").unlink()
    with pytest.raises(NotFoundError, match="no module virtio_net"):
        call("--dry-run")
    assert not (parts / "initrd.img").exists()


def test_an_error_of_the_file_system_is_one_of_ours(call, parts):
    (parts / "initrd.img").mkdir()
    with pytest.raises(CalveError, match="cannot build the initrd: "):
        call()


@pytest.mark.parametrize("args", [(), ("initrd",), ("initrd", "--hold", "-1"), ("disk",)])
def test_wrong_usage_is_2(args):
    done = subprocess.run(
        [sys.executable, "-m", "calve", "image", *args], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert not done.stdout
