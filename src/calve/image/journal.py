"""What a killed upload had done, so that the next goes on: a file beside the disk, v1.

The first line is a JSON object, `{"version": 1, "plan": "…", "region": "…", "attempt": 0, "snapshot": "snap-…"}`; each
line after it the index of a block that was answered well. A line that is cut at its end counts for nothing. It is a
hint: the service counts and sums up what it has, and reading back compares it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from calve.errors import CalveError

__all__ = ["Begun", "Journal", "forget", "read"]

VERSION = 1
_LIMIT_BYTES = 4 << 20
_ATTEMPTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Begun:
    """An upload that was begun."""

    plan: str
    region: str
    attempt: int
    snapshot: str
    done: frozenset[int] = frozenset()


class Journal:
    """Takes down what is done; used by many threads, as a line is one write."""

    def __init__(self, file: IO[bytes], place: Path) -> None:
        self._file = file
        self._place = place

    @classmethod
    def open(cls, path: Path, begun: Begun) -> Self:
        """Begin one, or go on with one that has all that `begun` says.

        Raises:
            CalveError: it cannot be written.
        """
        head = {
            "version": VERSION,
            "plan": begun.plan,
            "region": begun.region,
            "attempt": begun.attempt,
            "snapshot": begun.snapshot,
        }
        lines = [json.dumps(head), *(str(index) for index in sorted(begun.done))]
        temporary = path.with_name(f".{path.name}.new")
        try:
            temporary.unlink(missing_ok=True)
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600
            )
            with contextlib.ExitStack() as undo:
                file = undo.enter_context(os.fdopen(descriptor, "ab", buffering=0))
                file.write("".join(f"{line}\n" for line in lines).encode())
                temporary.replace(path)
                undo.pop_all()
        except OSError as error:
            raise CalveError(f"cannot be written: {error.strerror}", place=path) from error
        return cls(file, path)

    def done(self, index: int) -> None:
        """Take down a block.

        Raises:
            CalveError: it cannot be written.
        """
        try:
            self._file.write(b"%d\n" % index)
        except OSError as error:
            raise CalveError(f"cannot be written: {error.strerror}", place=self._place) from error

    def close(self) -> None:
        """Close it."""
        self._file.close()


def read(path: Path) -> Begun | None:
    """Read one; None where there is none, or none that we can read."""
    try:
        with path.open("rb") as file:
            lines = file.read(_LIMIT_BYTES).split(b"\n")
        head = json.loads(lines[0])
        attempt = head["attempt"]
        if head["version"] != VERSION or type(attempt) is not int or not 0 <= attempt < _ATTEMPTS:
            return None
        done = frozenset(_indices(lines[1:-1]))
        return Begun(str(head["plan"]), str(head["region"]), attempt, str(head["snapshot"]), done)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _indices(lines: list[bytes]) -> Iterator[int]:
    for line in lines:
        if line.isdigit() and len(line) < 12:
            yield int(line)


def forget(path: Path) -> None:
    """Remove it: the upload is over."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
