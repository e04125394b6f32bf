"""Tables and the texts in them."""

from __future__ import annotations

import io

import pytest

from calve.ui.table import table
from calve.ui.terminal import colour
from calve.ui.text import mb, one_line, sanitize, seconds, width


class Tty(io.StringIO):
    def isatty(self):
        return True


def drawn(rows, headers, environ=None):
    out = io.StringIO()
    table(rows, headers, out, environ or {})
    return out.getvalue().splitlines()


def test_columns_are_aligned_and_numbers_stand_to_the_right():
    rows = [("a", 1, "x"), ("日本", 1000, ""), ("e\u0301e", 22, "yy")]
    assert drawn(rows, ["name", "n", "more"]) == [
        "name     n  more",
        "a        1  x",
        "日本  1000",
        "e\u0301e      22  yy",
    ]


def test_no_rows_leave_the_headers_and_cells_are_harmless():
    assert drawn([], ["a", "b"]) == ["a  b"]
    assert drawn([("x\x1b[1A\ny", None)], ["a", "b"])[1] == "x\ufffd[1A y  None"


@pytest.mark.parametrize("row", [("a",), ("a", "b", "c")])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(ValueError, match="headers"):
        drawn([row], ["a", "b"])


def test_headers_are_bold_where_colour_is_wanted():
    assert drawn([("x",)], ["a"], {"FORCE_COLOR": "1"}) == ["\x1b[1ma\x1b[0m", "x"]


@pytest.mark.parametrize(
    ("stream", "environ", "expected"),
    [
        (Tty(), {"TERM": "xterm"}, True),
        (Tty(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Tty(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Tty(), {"TERM": "dumb"}, False),
        (Tty(), {"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"TERM": "xterm"}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_no_color_before_force_color_before_what_the_stream_is(stream, environ, expected):
    assert colour(stream, environ) is expected


def test_texts():
    assert sanitize("a\tb\nc\x00\x1b\u202e\udcff") == "a\tb\nc" + "\ufffd" * 4
    assert one_line("a\tb\nc") == "a b c"
    assert width("ab日") == 4
    assert mb(1_250_000) == "1.2 MB"
    assert seconds(3) == "3.0 s"
    assert seconds(125) == "2 min 05 s"
