"""A picture of what took how long: one SVG document that needs nothing else, on a light or a dark page.

Text is of a grey that reads on both (4.5 : 1 on white and on black), and nothing is filled behind it. The same charts
give the same bytes.
"""

from __future__ import annotations

import enum
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from calve.ui.text import one_line

__all__ = ["Bar", "Chart", "Kind", "timeline"]

_WIDTH, _MARGIN = 900, 16
_LEFT, _RIGHT = 190, 700  # of the bars
_ROW, _BAR = 22, 14
_LINE = 18
_COLUMNS = 115  # of text at 12 px, 7.2 px each
_NAME_COLUMNS = 22
_INK = "#767676"
_ALARM = "#d1443c"
# Neighbours differ in lightness too: not everybody tells colours apart.
_COLOURS = (
    "#7f8ea3",
    "#3d9dd6",
    "#2f8f9d",
    "#6cb7b0",
    "#b28cd9",
    "#2f6fb3",
    "#e07a5f",
    "#d9a441",
    "#5aa469",
)
_TICKS = 8


class Kind(enum.Enum):
    """How a bar is drawn: as known, as one whose end is not known, as a stretch of which nothing is known."""

    SOLID = enum.auto()
    OPEN = enum.auto()
    GAP = enum.auto()


@dataclass(frozen=True, slots=True)
class Bar:
    """A row: its name, from when to when in seconds, and what stands to its right."""

    name: str
    begin_s: float
    end_s: float
    note: str
    kind: Kind = Kind.SOLID


@dataclass(frozen=True, slots=True)
class Chart:
    """A group of bars below a title and some lines of text; all of it may be foreign. `alarm` colours the title."""

    title: str
    lines: Sequence[str]
    bars: Sequence[Bar]
    alarm: bool = False


def timeline(charts: Iterable[Chart], *, title: str) -> str:
    """Return an SVG document.

    Args:
        charts: one below the other, on one scale.
        title: of the whole; it is what a screen reader says.
    """
    drawn = list(charts)
    end_s = max((bar.end_s for chart in drawn for bar in chart.bars), default=0.0)
    scale = (_RIGHT - _LEFT) / end_s if end_s > 0 else 0.0
    names = dict.fromkeys(
        bar.name for chart in drawn for bar in chart.bars if bar.kind is not Kind.GAP
    )
    colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))
    body: list[str] = [_text(_MARGIN, 30, title, extra=' font-size="15" font-weight="bold"')]
    y = 46
    for chart in drawn:
        lines, y = _chart(chart, y, scale, colours)
        body += lines
    height = y + 12
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">'
    )
    pattern = (
        '<defs><pattern id="calve-gap" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><path d="M0 0V6" stroke="{_INK}" stroke-width="2"/></pattern></defs>'
    )
    return "\n".join([head, f"<title>{_safe(title)}</title>", pattern, *body, "</svg>", ""])


def _chart(chart: Chart, y: int, scale: float, colours: Mapping[str, str]) -> tuple[list[str], int]:
    """Draw a chart from a height on; return its elements and where the next begins."""
    y += _LINE
    colour = _ALARM if chart.alarm else _INK
    out = [_text(_MARGIN, y, chart.title, colour, ' font-weight="bold"')]
    for line in chart.lines:
        for part in textwrap.wrap(one_line(line), _COLUMNS):
            y += _LINE
            out.append(_text(_MARGIN, y, part))
    if not chart.bars:
        return out, y + _LINE
    top = y + 8
    y = top + _ROW * len(chart.bars)
    if scale:
        out += _axis(max(bar.end_s for bar in chart.bars), top, y, scale)
    for number, bar in enumerate(chart.bars):
        out += _row(bar, colours.get(bar.name, _INK), top + _ROW * number, scale)
    return out, y + _LINE + 12


def _axis(end_s: float, top: int, bottom: int, scale: float) -> Iterator[str]:
    """Draw a line, and seconds below it, every so often."""
    step_s = _step((_RIGHT - _LEFT) / scale)
    for number in range(floor(end_s / step_s) + 1):
        x = _LEFT + number * step_s * scale
        yield f'<path d="M{x:.1f} {top}V{bottom}" stroke="{_INK}" stroke-opacity="0.3"/>'
        extra = ' text-anchor="middle" font-size="10"'
        yield _text(x, bottom + 12, f"{number * step_s:g} s", extra=extra)


def _step(end_s: float) -> float:
    """Return 1, 2 or 5 times a power of ten, such that it goes into a length a few times."""
    rough = end_s / _TICKS
    power = 10.0 ** floor(log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _row(bar: Bar, colour: str, y: int, scale: float) -> Iterator[str]:
    baseline = y + _ROW - 7
    name = one_line(bar.name)
    yield _text(_LEFT - 10, baseline, name[:_NAME_COLUMNS], extra=' text-anchor="end"')
    x, width = _LEFT + bar.begin_s * scale, max((bar.end_s - bar.begin_s) * scale, 1.5)
    shape = (
        f'<rect x="{x:.1f}" y="{y + (_ROW - _BAR) // 2}" width="{width:.1f}" height="{_BAR}" rx="2"'
    )
    look = {
        Kind.SOLID: f'fill="{colour}"',
        Kind.OPEN: f'fill="{colour}" fill-opacity="0.35" stroke="{colour}" stroke-dasharray="4 3"',
        Kind.GAP: f'fill="url(#calve-gap)" stroke="{_INK}" stroke-dasharray="4 3"',
    }[bar.kind]
    yield f"{shape} {look}><title>{_safe(name)}: {_safe(bar.note)}</title></rect>"
    yield _text(_RIGHT + 12, baseline, bar.note)


def _text(x: float, y: float, text: str, colour: str = _INK, extra: str = "") -> str:
    place = f'x="{ceil(x * 10) / 10:g}" y="{y:g}"'
    return f'<text {place} fill="{colour}"{extra} xml:space="preserve">{_safe(text)}</text>'


def _safe(text: str) -> str:
    return escape(one_line(text))
