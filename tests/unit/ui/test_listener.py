"""Progress as lines, JSON lines and rows: what is said when, and that foreign text is harmless."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest

from calve.clock import SystemClock
from calve.progress import Note, Step
from calve.ui.listener import Lines, Plain, Terminal, listener

XTERM = {"TERM": "xterm", "COLUMNS": "100"}


class HandClock(SystemClock):
    def __init__(self):
        self.at_s = 100.0

    def monotonic(self):
        return self.at_s


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return HandClock()


def mbs(done, total=10):
    return Step("push", done * 1_000_000, total and total * 1_000_000)


def test_plain_says_a_step_every_two_seconds_and_at_its_end(clock):
    out = io.StringIO()
    with Plain(out, clock) as progress:
        for done in range(9):
            progress(mbs(done))
            clock.at_s += 0.5
        progress(mbs(10))
        progress(mbs(10))
    assert out.getvalue().splitlines() == [
        "push: 4.0 MB of 10.0 MB, 2.0 MB/s",
        "push: 8.0 MB of 10.0 MB, 2.0 MB/s",
        "push: 10.0 MB of 10.0 MB, 2.2 MB/s",
    ]


def test_the_rate_is_that_of_the_last_seconds(clock):
    out = io.StringIO()
    progress = Plain(out, clock)
    progress(mbs(0, 100))
    for done in (1, 2, 3, 4, 5):
        clock.at_s += 10
        progress(mbs(done, 100))
    clock.at_s += 5
    progress(mbs(100, 100))
    assert out.getvalue().splitlines()[-1] == "push: 100.0 MB of 100.0 MB, 19.0 MB/s"


def test_steps_do_not_wait_for_each_other_and_units_are_written(clock):
    out = io.StringIO()
    progress = Plain(out, clock)
    progress(Step("probe", 3, 3, "paths"))
    progress(Step("fetch", 1, None, "packages"))
    clock.at_s += 2
    progress(Step("fetch", 5, None, "packages"))
    assert out.getvalue().splitlines() == [
        "probe: 3 of 3 paths",
        "fetch: 5 packages, 2.0 packages/s",
    ]


def test_a_step_with_nothing_to_do_is_not_worth_a_line(clock):
    out = io.StringIO()
    for made in (Plain(out, clock), Lines(out, clock)):
        made(Step("push", 0, 0))
    assert not out.getvalue()


def test_lines_are_json_with_a_stable_schema(clock):
    out = io.StringIO()
    with Lines(out, clock) as progress:
        progress(Note("bell \a"))
        progress(mbs(0, None))
        clock.at_s += 1
        progress(mbs(1, None))
        progress(mbs(10))
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"event": "note", "text": "bell \a"},
        {"event": "step", "name": "push", "done": 1_000_000, "total": None, "unit": "bytes"},
        {"event": "step", "name": "push", "done": 10_000_000, "total": 10_000_000, "unit": "bytes"},
    ]
    assert out.getvalue().isascii()
    assert "\a" not in out.getvalue()


def test_plain_makes_foreign_text_harmless(clock):
    out = io.StringIO()
    progress = Plain(out, clock)
    progress(Note("a\x1b[2Jb"))
    progress(Step("x\n::error::\x9b", 1, 1, "p\x07"))
    assert out.getvalue() == "a\ufffd[2Jb\nx ::error::\ufffd: 1 of 1 p\ufffd\n"


@pytest.mark.parametrize(
    ("stream", "as_json", "environ", "kind"),
    [
        (io.StringIO, False, XTERM, Plain),
        (io.StringIO, False, XTERM | {"FORCE_COLOR": "1"}, Plain),
        (Tty, False, XTERM, Terminal),
        (Tty, False, XTERM | {"NO_COLOR": "1"}, Terminal),
        (Tty, False, {"TERM": "dumb"}, Plain),
        (Tty, False, {}, Plain),
        (Tty, True, XTERM, Lines),
        (io.StringIO, True, XTERM, Lines),
    ],
)
def test_which_listener_a_stream_gets(stream, as_json, environ, kind):
    assert type(listener(stream(), json=as_json, environ=environ)) is kind


def test_a_terminal_gets_a_row_with_bar_amount_and_rate_and_its_cursor_back(clock):
    out = Tty()
    with Terminal(out, clock, XTERM) as progress:
        progress(mbs(0))
        clock.at_s += 2
        progress(mbs(5))
        progress(Note("retry \x1b[2J[bold]"))
        progress(Step("nothing", 0, 0))
    text = out.getvalue()
    assert "5.0 MB of 10.0 MB" in text
    assert "2.5 MB/s" in text
    assert "━" in text
    assert "retry \ufffd[2J[bold]" in text
    assert "\x1b[2J" not in text
    assert "nothing" not in text
    assert text.rstrip().endswith("\x1b[?25h")


def test_no_color_wins_on_a_terminal():
    def colours(environ):
        out = Tty()
        with Terminal(out, HandClock(), environ) as progress:
            progress(mbs(5))
        return re.findall(r"\x1b\[[0-9;]*m", out.getvalue())

    assert colours(XTERM)
    assert not [
        code for code in colours(XTERM | {"NO_COLOR": "1", "FORCE_COLOR": "1"}) if "3" in code
    ]


def test_a_reader_that_went_away_does_not_stop_the_work(clock):
    class Broken(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    Plain(Broken(), clock)(Note("x"))


def test_rich_is_imported_on_a_terminal_only():
    program = (
        "import sys; from calve.ui.listener import listener; from calve.ui.live import Board\n"
        "from calve.ui.table import table; from calve.progress import Note\n"
        "with listener(sys.stderr) as progress: progress(Note('x'))\n"
        "with Board(sys.stderr, ['a']) as board: board.set('r', 'a', 'x')\n"
        "table([], ['a'], sys.stderr)\n"
        "print('rich' in sys.modules)"
    )
    env = {**os.environ, "TERM": "xterm"}
    argv = [sys.executable, "-c", program]
    plain = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert plain.stdout == "False\n", plain.stderr
    ours, theirs = pty.openpty()
    try:
        drawn = subprocess.run(argv, stdout=subprocess.PIPE, stderr=theirs, text=True, env=env)
    finally:
        os.close(ours)
        os.close(theirs)
    assert drawn.stdout == "True\n"
