"""A board: a table whose cells change while one looks, such as machines and what each is doing.

    with Board(sys.stderr, ["phase", "fetched"]) as board:
        board.set("i-1", "phase", "pull")

On a terminal it is drawn in place; elsewhere every change is a line.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from calve.ui.terminal import console, live
from calve.ui.text import one_line, sanitize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

__all__ = ["Board"]


class Board:
    """Rows by key, in the order in which they came; use it as a context manager, one on a stream at a time.

    Args:
        stream: where it is drawn.
        columns: their names; the row's key stands before them.
        key: the name of the column of keys.
        environ: says what terminal it is.
    """

    def __init__(
        self,
        stream: IO[str],
        columns: Sequence[str],
        *,
        key: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.columns = tuple(columns)
        self._key = key
        self._stream = stream
        self._turn = threading.Lock()
        self._rows: dict[str, dict[str, str]] = {}
        self._console: Console | None = console(stream, environ) if live(stream, environ) else None
        self._live: Live | None = None

    def set(self, row: str, column: str, text: str) -> None:
        """Write a cell; a row that is not there yet is added, a cell that says so already is left.

        Raises:
            ValueError: there is no such column.
        """
        if column not in self.columns:
            raise ValueError(f"no column {column!r}")
        key, value = one_line(row), one_line(text)
        with self._turn:
            cells = self._rows.setdefault(key, {})
            if cells.get(column) == value:
                return
            cells[column] = value
            if self._console is None:
                self._print(f"{key}: {column} {value}")

    def note(self, text: str) -> None:
        """Write a sentence, above the table where that is drawn in place."""
        if self._console is not None:
            # Without our lock: rich prints under one of its own, and draws under that.
            self._console.print(sanitize(text), soft_wrap=True)
            return
        with self._turn:
            self._print(sanitize(text))

    def _print(self, line: str) -> None:
        with suppress(BrokenPipeError):
            print(line, file=self._stream, flush=True)

    def _draw(self) -> Table:
        """Return the table as it is now; called by the thread that draws, too."""
        from rich.table import Table
        from rich.text import Text

        made = Table(box=None, pad_edge=False, header_style="bold")
        for name in (self._key, *self.columns):
            made.add_column(Text(name), no_wrap=True, overflow="ellipsis")
        with self._turn:
            rows = [
                [key, *(cells.get(name, "") for name in self.columns)]
                for key, cells in self._rows.items()
            ]
        for row in rows:
            made.add_row(*map(Text, row))
        return made

    def __enter__(self) -> Self:
        if self._console is not None:
            from rich.live import Live

            self._live = Live(
                console=self._console,
                get_renderable=self._draw,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
