"""Text for terminals: foreign text made harmless, numbers for people."""

from __future__ import annotations

import unicodedata

__all__ = ["mb", "one_line", "sanitize", "seconds", "width"]


def sanitize(text: str) -> str:
    """Return foreign text (a console, a log) with all that moves a cursor or starts a command taken out."""
    return "".join(
        character
        if character in {"\t", "\n"} or unicodedata.category(character)[0] != "C"
        else "\ufffd"
        for character in text
    )


def one_line(text: str) -> str:
    """Return foreign text for a cell or a name: made harmless, with a blank for every tab and line break."""
    return sanitize(text).replace("\t", " ").replace("\n", " ")


def width(text: str) -> int:
    """Return how many cells of a terminal a text fills."""
    return sum(
        0
        if unicodedata.combining(character)
        else 1 + (unicodedata.east_asian_width(character) in {"W", "F"})
        for character in text
    )


def mb(count: float) -> str:
    """Write a number of bytes in MB (10^6)."""
    return f"{count / 1e6:.1f} MB"


def seconds(value: float) -> str:
    """Write a duration."""
    return f"{value:.1f} s" if value < 120 else f"{int(value // 60)} min {int(value % 60):02d} s"
