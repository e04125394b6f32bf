"""A command started in odd surroundings: closed or full streams, other encodings, signals, directories not ours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from calve.cli import main as cli
from calve.cli.session import Session
from calve.errors import CancelledError


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


# Questions


@contextlib.contextmanager
def terminal(monkeypatch):
    """Make a terminal standard input; give the end that a person types at."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        try:
            yield ours
        finally:
            os.close(ours)


@pytest.mark.parametrize(
    ("typed", "answer"), [("y", True), ("YES", True), ("n", False), ("", False), ("yy", False)]
)
def test_a_question_is_answered(monkeypatch, typed, answer):
    err = io.StringIO()
    with terminal(monkeypatch) as keyboard:
        os.write(keyboard, f"{typed}\n".encode())
        assert Session(io.StringIO(), err).asked("go?") is answer
    assert err.getvalue() == "go? [y/N] "


def test_a_question_ends_with_ctrl_c(monkeypatch):
    session = Session(io.StringIO(), io.StringIO())
    with terminal(monkeypatch) as keyboard:
        threading.Timer(0.3, session.cancel.cancel).start()
        with pytest.raises(CancelledError, match="interrupted"):
            session.asked("go?")
        os.write(keyboard, b"y\n")
        with pytest.raises(CancelledError):
            session.asked("go?")


def test_nobody_is_asked_where_standard_input_is_closed():
    line = (
        "from calve.cli.streams import prepare; from calve.cli.session import Session; prepare();"
        "Session().asked('go?')"
    )
    done = shell(f'"$0" -c "{line}" <&-')
    assert b"nobody is there to be asked" in done.stderr


def test_who_says_no_is_told_that_nothing_was_changed():
    err = io.StringIO()
    cli.report(CancelledError("nothing was changed"), Session(io.StringIO(), err))
    cli.report(CancelledError(), Session(io.StringIO(), err))
    assert err.getvalue() == "nothing was changed\ninterrupted\n"
