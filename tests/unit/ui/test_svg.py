"""The picture of a timeline: well-formed whatever stands in it, on one scale, the same bytes for the same input."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from calve.ui.svg import Bar, Chart, Kind, timeline

NAME = "{http://www.w3.org/2000/svg}"
BARS = (
    Bar("kernel", 0, 2.5, "2.50 s"),
    Bar("gap", 2.5, 3, "0.50 s", Kind.GAP),
    Bar("pull", 3, 10, "7 s"),
)


def parsed(*charts, title="a title"):
    return ElementTree.fromstring(timeline(charts, title=title).encode())


def texts(root):
    return [each.text for each in root.iter(f"{NAME}text")]


def rects(root):
    return [
        (float(each.get("x")), float(each.get("width")), each.get("fill"))
        for each in root.iter(f"{NAME}rect")
    ]


def test_charts_share_a_scale_and_a_name_has_one_colour():
    short = Chart("two", [], [Bar("pull", 0, 5, "5 s")])
    root = parsed(Chart("one", ["a line"], BARS), short)
    kernel, gap, pull, other = rects(root)
    assert kernel[0] == other[0]
    assert kernel[0] + kernel[1] == gap[0]
    assert pull[1] == pytest.approx(other[1] * 7 / 5, abs=0.2)
    assert (pull[2] == other[2], pull[2] == kernel[2], gap[2]) == (True, False, "url(#calve-gap)")
    assert {"a title", "one", "a line", "kernel", "2.50 s", "two", "5 s", "0 s", "10 s"} <= set(
        texts(root)
    )


def test_all_is_within_the_picture():
    root = parsed(Chart("one", ["word " * 100], BARS), Chart("none", [], []))
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(x + size <= width for x, size, _ in rects(root))
    assert all(float(each.get("y")) < height for each in root.iter(f"{NAME}text"))
    assert max(map(len, texts(root))) < 120


def test_it_needs_nothing_else_and_has_no_background():
    text = timeline([Chart("one", [], BARS)], title="x")
    assert set(re.findall(r"(?:https?|url)[:(][^\")]*", text)) == {
        "http://www.w3.org/2000/svg",
        "url(#calve-gap",
    }
    assert "100%" not in text
    assert "<style" not in text
    assert "<script" not in text
    assert text == timeline([Chart("one", [], BARS)], title="x")


def test_foreign_text_is_harmless():
    evil = "</text><script>\x1b[0m\0\ud800&\ufffe\"'\n\t"
    root = parsed(Chart(evil, [evil], [Bar(evil, 0, 1, evil)]), title=evil)
    assert not list(root.iter(f"{NAME}script"))
    assert any(each.startswith("</text><script>\ufffd[0m") for each in texts(root))


@pytest.mark.parametrize("end_s", [0, 0.001, 0.3, 59, 1e9])
def test_any_length_has_some_ticks(end_s):
    root = parsed(Chart("one", [], [Bar("a", 0, end_s, "")]))
    ticks = [each for each in texts(root) if each and re.fullmatch(r"[0-9.e+-]+ s", each)]
    assert len(ticks) == 0 if not end_s else 2 <= len(ticks) <= 11


def test_an_alarm_shows():
    calm, loud = (
        timeline([Chart("x", [], BARS, alarm=alarm)], title="t") for alarm in (False, True)
    )
    assert calm != loud
