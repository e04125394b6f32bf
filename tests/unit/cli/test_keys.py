"""`calve keys`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import calve as package
from calve.nix.signing import PublicKey, SecretKey


@pytest.fixture
def calve(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "calve", "keys", *args],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code:
            assert not done.stdout
        return done

    return run


def test_generate_writes_the_secret_for_its_owner_and_prints_the_public_key(calve):
    done = calve("generate", "acme-1")
    key = SecretKey.parse(Path("acme-1.sec").read_text())
    assert Path("acme-1.sec").stat().st_mode & 0o777 == 0o600
    assert done.stdout == f"{key.public.dump()}\n"
    assert key.dump() not in done.stdout + done.stderr
    assert calve("show", "acme-1.sec").stdout == done.stdout
    assert json.loads(calve("show", "acme-1.sec", "--json").stdout) == {
        "name": "acme-1",
        "public": key.public.dump(),
    }


def test_generate_overwrites_nothing(calve):
    calve("generate", "acme-1", "--out", "key")
    before = Path("key").read_bytes()
    assert "not overwritten" in calve("generate", "acme-1", "--out", "key", code=2).stderr
    dry = calve("generate", "acme-1", "--out", "key", "--dry-run", code=2)
    assert "not overwritten" in dry.stderr
    assert Path("key").read_bytes() == before


def test_generate_as_json_and_dry(calve):
    document = json.loads(calve("generate", "a", "--json").stdout)
    assert PublicKey.parse(document.pop("public")).name == "a"
    assert document == {"name": "a", "file": "a.sec", "dry_run": False}
    assert json.loads(calve("generate", "b", "--json", "--dry-run").stdout) == {
        "name": "b",
        "public": None,
        "file": "b.sec",
        "dry_run": True,
    }
    assert calve("generate", "b", "--dry-run").stdout == "would write a key b to b.sec\n"
    assert not Path("b.sec").exists()


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        ((), "WHAT", 2),
        (("generate",), "NAME", 2),
        (("generate", "a:b"), "cannot name a key", 2),
        (("generate", "../a"), "give --out FILE", 2),
        (("generate", "a", "--out", "none/key"), "No such file or directory", 1),
        (("show", "none"), "no such key file", 5),
    ],
)
def test_wrong_usage(calve, args, words, code):
    assert words in calve(*args, code=code).stderr


def test_show_refuses_what_others_may_read_or_is_no_secret_key(calve):
    calve("generate", "a")
    Path("a.sec").chmod(0o644)
    assert "hint: chmod 600 a.sec" in calve("show", "a.sec", code=2).stderr
    Path("a.sec").write_text("\x1b[2Jno key")
    Path("a.sec").chmod(0o600)
    refused = calve("show", "a.sec", code=2).stderr
    assert "a.sec: not a secret key" in refused
    assert "\x1b" not in refused
