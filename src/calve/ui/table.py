"""A table for people: aligned columns, numbers to the right. Programs read `--json`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from calve.ui.terminal import colour
from calve.ui.text import one_line, width

__all__ = ["table"]

_BOLD, _NORMAL = "\x1b[1m", "\x1b[0m"


def table(
    rows: Iterable[Sequence[object]],
    headers: Sequence[str],
    stream: IO[str],
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Print a table.

    Args:
        rows: of as many cells as there are headers; foreign text is made harmless.
        headers: the columns' names.
        stream: where to.
        environ: says whether colour is wanted.

    Raises:
        ValueError: a row is longer or shorter than the headers.
    """
    body = [list(row) for row in rows]
    texts = [[one_line(name) for name in headers]]
    texts += [[one_line(str(cell)) for cell in row] for row in body]
    if any(len(row) != len(headers) for row in texts):
        raise ValueError("a row is longer or shorter than the headers")
    widths = [max(width(row[at]) for row in texts) for at in range(len(headers))]
    right = [
        bool(body) and all(isinstance(row[at], int | float) for row in body)
        for at in range(len(headers))
    ]
    start, end = (_BOLD, _NORMAL) if colour(stream, environ) else ("", "")
    for number, row in enumerate(texts):
        cells = []
        for text, size, to_right in zip(row, widths, right, strict=True):
            blank = " " * (size - width(text))
            cells.append(blank + text if to_right else text + blank)
        line = "  ".join(cells).rstrip()
        print(f"{start}{line}{end}" if number == 0 else line, file=stream)
