"""Where a key stands in a TOML file: the line that an error can name."""

from __future__ import annotations

import re

__all__ = ["line_of"]

_HEADER = re.compile(r"\[([^\[\]]+)\]")
_KEY = re.compile(r"[A-Za-z0-9_.\"' -]+")


def line_of(text: str, path: str) -> int | None:
    """Return the line where a key is given, or the table that lacks it; None where that cannot be told.

    tomllib does not say, so this looks for headers and for `key =` below them, the nearest to the whole path. A line
    of a text over several lines could look like one: then two lines match, and neither is named.
    """
    keys = re.sub(r"\[\d+\]$", "", path).split(".")
    found: dict[int, list[int]] = {}
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line.strip())
        assigned, equals, _ = line.partition("=")
        if header is not None:
            table = _names(header[1])
            here = table
        elif equals and _KEY.fullmatch(assigned.strip()):
            here = table + _names(assigned)
        else:
            continue
        if keys[: len(here)] == here:
            found.setdefault(len(here), []).append(number)
    if not found:
        return None
    numbers = found[max(found)]
    return numbers[0] if len(numbers) == 1 else None


def _names(dotted: str) -> list[str]:
    return [name.strip().strip("\"'") for name in dotted.split(".")]
