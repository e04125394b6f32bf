"""What a console has said since, and what of it a terminal may see."""

import pytest

from calve.cli import console

LINES = "".join(f"[{at:9.3f}] line {at}\n" for at in range(400))


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ("", "", ""),
        ("", "abc", "abc"),
        ("abc", "abcdef", "def"),
        ("abc", "abc", ""),
        ("abc", "", ""),
        (LINES[:9000], LINES[:9500], LINES[9000:9500]),
        (LINES[:9000], LINES[2000:9500], LINES[9000:9500]),
        (LINES[:9000], "\ufffd" + LINES[2000:9500], LINES[9000:9500]),
        (LINES[:3000], LINES[5000:9000], LINES[5000:9000]),
        ("x" * 3000, "x" * 3000 + "y", "y"),
    ],
)
def test_what_is_new_is_found_where_the_windows_overlap(before, now, new):
    assert console.fresh(before, now) == new


def test_a_terminal_sees_no_escapes_and_lines_that_end_alike():
    text = (
        "\x1b[0;32m  OK  \x1b[0m Started\r\nx\x1b]0;title\x07y\rz\x07\x9b2J\x1b]0;never ends\nend\n"
    )
    assert console.plain(text) == "  OK   Started\nxy\nz\ufffd\ufffd2J\nend\n"


def test_an_id_is_told_from_a_fleet():
    assert console.instance("i-0123456789abcdef0") == "i-0123456789abcdef0"
    with pytest.raises(Exception, match="'web' is not an instance's id"):
        console.instance("web")
