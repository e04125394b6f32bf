"""What commands share: links to store paths, numbers, credentials, what start-up loads."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from calve.cache import url as urls
from calve.cli import common
from calve.cli.main import COMMANDS, report
from calve.cli.session import Session
from calve.errors import CalveError, CancelledError, UsageError
from calve.nix.storepath import StorePath
from calve.transport.credentials import Environment

PATH = f"/nix/store/{'0' * 32}-system"
STORE_PATH = StorePath.parse(PATH)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_and_links_that_lead_to_a_store_path(here):
    Path("result").symlink_to(PATH)
    Path("profiles").mkdir()
    Path("profiles/system-7-link").symlink_to(PATH)
    Path("profiles/system").symlink_to("system-7-link")
    Path("current").symlink_to("profiles/system")
    Path("up").symlink_to("profiles")
    for text in (
        PATH,
        f"{PATH}/",
        f"{PATH}/bin/sh",
        "result",
        "./result/",
        "result/etc/passwd",
        f"{here}/result",
        "current",
        "profiles/../current",
        "up/system",
    ):
        assert common.resolve(text, Path("/")) == STORE_PATH, text


def test_paths_and_links_below_a_store_s_root(here):
    real = here / "root/nix/store" / STORE_PATH.basename
    real.mkdir(parents=True)
    Path("alias").symlink_to("root")
    Path("result").symlink_to(real)
    Path("inside").symlink_to(PATH)
    for text in (real, "result", "inside", "alias/nix/store/" + STORE_PATH.basename, PATH):
        for root in (here / "root", Path("root"), Path("alias")):
            assert common.resolve(str(text), root) == STORE_PATH, text


@pytest.mark.parametrize(
    "text", ["none", ".", "/", "", "/nix/store", "/nix/store/", "loop", "dangling", "x\udcff"]
)
def test_what_leads_nowhere(here, text):
    Path("loop").symlink_to("pool")
    Path("pool").symlink_to("loop")
    Path("dangling").symlink_to("none")
    with pytest.raises(UsageError, match="neither a store path nor a link"):
        common.resolve(text, Path("/"))


@pytest.mark.parametrize("text", ["", "x", "/nix/store/x", "/nix/store", f"{PATH}/bin", "./result"])
def test_what_is_no_store_path(text):
    with pytest.raises(UsageError):
        common.store_path(text)


def test_numbers_between():
    convert = common.between(1, 19)
    assert [convert(text) for text in ("1", "19", "007")] == [1, 19, 7]
    for text in ("0", "20", "-1", "", "1.5", "x", "\u0663", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="1 to 19"):
            convert(text)


def test_credentials_of_the_environment_need_no_boto(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert isinstance(common._provider(urls.parse("s3://nix")), Environment)
    # A profile that the URL names goes before them, as in boto.
    assert not isinstance(common._provider(urls.parse("s3://nix?profile=acme")), Environment)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert not isinstance(common._provider(urls.parse("s3://nix")), Environment)


def test_a_path_that_is_not_utf_8_goes_out_as_it_came_in():
    argv = [sys.executable, "-m", "calve", "keys", "generate", "a", "--dry-run", "--out", b"x\xff"]
    done = subprocess.run(argv, capture_output=True)
    assert done.stdout == b"would write a key a to x\xff\n", done.stderr


def test_plural():
    assert [common.plural(n, "path") for n in (0, 1, 2)] == ["0 paths", "1 path", "2 paths"]


def test_errors_are_printed_harmless_with_place_and_hint(capsys):
    report(CalveError("bad \x1b[2J", place="x\a", hint="do\x9b"), Session())
    report(CancelledError(), Session())
    assert capsys.readouterr().err == (
        "error: x\ufffd: bad \ufffd[2J\nhint: do\ufffd\ninterrupted\n"
    )


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_help_loads_nothing_heavy(name):
    program = (
        "import sys\nfrom calve.cli.main import main\n"
        f"try: main([{name!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'boto3', 'botocore', 'hashlib', 'http.client', 'msgspec', 'nacl', 'rich', 'sqlite3',"
        " 'ssl', 'subprocess', 'tempfile', 'tomllib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "[]\n", done.stderr
