"""A command started in odd surroundings: closed or full streams, other encodings, signals, directories not ours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from calve.cli import main as cli
from calve.cli.session import Session


def shell(line, **env):
    return subprocess.run(
        ["sh", "-c", line, sys.executable],
        capture_output=True,
        timeout=60,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed):
    done = shell(f'"$0" -m calve version {closed}')
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_a_full_disk_behind_stdout_is_one_line():
    done = shell('"$0" -m calve version >/dev/full')
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == b"error: No space left on device"
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize("streams", [">/dev/full 2>&1", "2>&1 | true"])
def test_nowhere_to_complain_to_is_no_other_exit_code(streams):
    done = shell(f'"$0" -m calve version {streams}')
    assert done.returncode in {0, 1}
    assert done.stderr == b""


CODE = """
import sys
from calve.cli import streams
streams.prepare()
print("a\\u2501\\udcff\\u00e9")
"""


def test_an_encoding_that_lacks_a_character_is_no_traceback():
    done = shell(f"\"$0\" -c '{CODE}'", PYTHONIOENCODING="ascii")
    assert done.stdout == b"a=\xff?\n"
    assert done.stderr == b""


def test_a_document_loses_nothing_to_an_encoding():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Session(out=out).document({"name": "ü"})
    assert json.loads(raw.getvalue()) == {"name": "ü"}


class Gone(io.StringIO):
    def write(self, _text):
        raise OSError(5, "Input/output error")


def test_prose_for_a_terminal_that_went_away_fails_nothing():
    Session(err=Gone()).prose("interrupted")


@pytest.fixture
def command(monkeypatch):
    """Return a function: sets what `calve version` does."""
    kept = {number: signal.getsignal(number) for number in cli.ENDS}

    def does(run):
        monkeypatch.setattr("calve.cli.version.run", run)

    yield does
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", ".calve"), 4, ".calve: Permission denied"),
        (OSError(30, "Read-only file system", ".calve"), 4, ".calve: Read-only"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (NotADirectoryError(20, "Not a directory", ".calve/demo"), 1, "demo: Not a directory"),
    ],
)
def test_an_error_of_the_system_is_one_line(error, code, words, command, capsys):
    def run(_options, _session):
        raise error

    command(run)
    assert cli.main(["version"]) == code
    err = capsys.readouterr().err
    assert words in err.splitlines()[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_ends_a_command_as_ctrl_c_does(number, command, capsys):
    def run(_options, session):
        os.kill(os.getpid(), number)
        session.cancel.wait(20)
        return 0

    command(run)
    assert cli.main(["version"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_nohup_is_heeded(command):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(_options, session):
        os.kill(os.getpid(), signal.SIGHUP)
        with contextlib.suppress(TimeoutError):
            session.cancel.wait(0.2)
        return 0

    command(run)
    assert cli.main(["version"]) == 0
