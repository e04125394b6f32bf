"""What a stream can show: colour, and rows that are drawn again in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["colour", "console", "live"]


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def live(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether rows can be drawn in place: on a terminal that moves its cursor."""
    return environ.get("TERM", "dumb") not in {"", "dumb", "unknown"} and _is_terminal(stream)


def colour(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether to use colour: NO_COLOR before FORCE_COLOR before what the stream is."""
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or live(stream, environ)


def console(stream: IO[str], environ: Mapping[str, str] = os.environ) -> Console:
    """Return rich's console on a live stream; this is where rich is imported."""
    from rich.console import Console

    return Console(
        file=stream,
        force_terminal=True,
        force_interactive=True,
        no_color=not colour(stream, environ),
        highlight=False,
        markup=False,
        emoji=False,
        _environ=environ,
    )
