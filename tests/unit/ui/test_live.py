"""The board: in place on a terminal, a line per change elsewhere."""

from __future__ import annotations

import io
import threading

import pytest

from calve.ui.live import Board

XTERM = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_every_change_is_a_line():
    out = io.StringIO()
    with Board(out, ["phase", "fetched"], environ=XTERM) as board:
        board.set("i-1", "phase", "kernel")
        board.set("i-1", "phase", "kernel")
        board.set("i-2", "fetched", "3 MB")
        board.note("two\x1b[1A")
        board.set("i-1", "phase", "a\nb\x1b[2J")
    assert out.getvalue().splitlines() == [
        "i-1: phase kernel",
        "i-2: fetched 3 MB",
        "two\ufffd[1A",
        "i-1: phase a b\ufffd[2J",
    ]


def test_a_terminal_shows_the_table_as_it_is_in_the_end():
    out = Tty()
    with Board(out, ["phase"], key="machine", environ=XTERM) as board:
        board.set("i-1", "phase", "kernel")
        board.set("i-2", "phase", "[red]pull\x1b[2J")
        board.note("hello")
        board.set("i-1", "phase", "served")
    text = out.getvalue()
    last = text[text.rindex("machine") :]
    assert "served" in last
    assert "kernel" not in last
    assert "[red]pull\ufffd[2J" in last
    assert "hello" in text
    assert "\x1b[2J" not in text
    assert text.endswith("\x1b[?25h")


def test_many_threads_and_notes_do_not_stand_in_each_others_way():
    out = Tty()
    with Board(out, ["n"], environ=XTERM) as board:

        def work(name):
            for at in range(50):
                board.set(name, "n", str(at))
                board.note(name)

        threads = [threading.Thread(target=work, args=(f"i-{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert out.getvalue().count("49") >= 4


def test_a_dumb_terminal_gets_lines_and_an_unknown_column_is_refused():
    out = Tty()
    with Board(out, ["n"], environ={"TERM": "dumb"}) as board:
        board.set("r", "n", "1")
        with pytest.raises(ValueError, match="no column 'm'"):
            board.set("r", "m", "1")
    assert out.getvalue() == "r: n 1\n"
