"""Evidence in a console log as it comes: foreign bytes of any length, read in a bounded memory.

A log has kernel lines, carriage returns, escapes of terminals, bytes of no encoding, evidence that is cut or stands
in the middle of a line, and several boots one after the other. Nothing in it is an error.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from calve.contract.evidence import LINE_BYTES, PREFIX, VERSION, Evidence

__all__ = ["Item", "Mark", "scan"]

# The banner is the first line of a kernel; a time stamp may name the caller, too (CONFIG_PRINTK_CALLER).
_MARK = re.compile(
    rb"@@calve |\[ {0,8}0\.0{6}\](?:\[ {0,8}[TC][0-9]{1,8}\])? Linux version ", re.ASCII
)
_MARK_BYTES = 64
_LINE_END = re.compile(rb"[\r\n]")
_ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\^_])|\x00")  # ECMA-48, 5.3 and 5.4
_WINDOW = 2 * LINE_BYTES  # evidence, and escapes in it
_TAIL = 4096
_LINES, _SHORT = 3, 200
_LONGEST_S = 1e9  # more than 30 years
_JSON = json.JSONDecoder()


class Mark(enum.Enum):
    """What was found: evidence, evidence that cannot be read, the first line of a kernel, the end of the log."""

    EVENT = enum.auto()
    DAMAGED = enum.auto()
    KERNEL = enum.auto()
    END = enum.auto()


@dataclass(frozen=True, slots=True)
class Item:
    """One find.

    Attributes:
        mark: what it is.
        event: of an EVENT.
        before: the last lines between the find before and this one: three at most, of 200 characters at most.
    """

    mark: Mark
    event: Evidence | None = None
    before: tuple[str, ...] = ()


def scan(chunks: Iterable[bytes]) -> Iterator[Item]:
    """Yield what a console log has, in order; the last item is its END.

    Args:
        chunks: the log's bytes, in pieces of any size; not more than one of them and 5 KiB are held.
    """
    source = iter(chunks)
    buffer, start, place, more = b"", 0, 0, True  # buffer[start:] is after the last item
    while True:
        found = _MARK.search(buffer, place)
        if more and (found is None or not _whole(buffer, found.start())):
            place = max(place, len(buffer) - _MARK_BYTES) if found is None else found.start()
            drop = max(min(start, place), place - _TAIL)
            chunk = next(source, None)
            more = chunk is not None
            buffer = buffer[drop:] + (chunk or b"")
            start, place = max(0, start - drop), place - drop
            continue
        if found is None:
            yield Item(Mark.END, before=_last_lines(buffer[start:]))
            return
        place = found.end()
        item, used = _item(found, buffer)
        if item is not None:
            before = buffer[max(start, found.start() - _TAIL) : found.start()]
            yield Item(item.mark, item.event, _last_lines(before[: _line_start(before)]))
            start = place = place + used
            if item.mark is Mark.KERNEL:  # the rest of its line says nothing of how a boot ended
                start += _line_bytes(buffer[place : found.start() + _WINDOW])


def _whole(buffer: bytes, begin: int) -> bool:
    """Say whether all that may belong to a find is there."""
    end = begin + _WINDOW
    return len(buffer) >= end or _LINE_END.search(buffer, begin) is not None


def _item(found: re.Match[bytes], buffer: bytes) -> tuple[Item | None, int]:
    """Return what a mark stands for, None where for nothing, and how many bytes after the mark belong to it."""
    if found[0] != PREFIX.encode():
        return Item(Mark.KERNEL), 0
    raw = buffer[found.end() : found.start() + _WINDOW]
    raw = raw[: _line_bytes(raw)]
    if not raw.startswith((b"{", b"\x1b", b"\0")):
        return None, 0
    size = _object_bytes(raw)
    used = size
    if not size:
        raw = _ESCAPE.sub(b"", raw)
        size = _object_bytes(raw)
    if size:
        data, event = _event(raw[:size])
        if event is not None:
            return Item(Mark.EVENT, event), used
        if isinstance(data, dict) and data.get("v") != VERSION:
            return None, 0  # of another version: not ours to judge
    return (Item(Mark.DAMAGED), 0) if raw.startswith(b"{") else (None, 0)


def _line_bytes(raw: bytes) -> int:
    """Return how many bytes of the line that they begin with are there."""
    end = _LINE_END.search(raw)
    return end.start() if end else len(raw)


def _object_bytes(raw: bytes) -> int:
    """Return the size of the JSON document that bytes begin with, 0 where they begin with none."""
    try:
        # A byte a character: all that JSON means by a character is ASCII.
        return _JSON.raw_decode(raw[:LINE_BYTES].decode("latin-1"))[1]
    except (ValueError, RecursionError):
        return 0


def _event(raw: bytes) -> tuple[object, Evidence | None]:
    text = raw.decode("utf-8", "replace")
    try:
        data, event = json.loads(text), Evidence.parse(PREFIX + text)
    except (ValueError, OverflowError, RecursionError):  # a number that no float holds
        return None, None
    if event is not None and 0 <= event.at_s < _LONGEST_S:  # NaN is not
        return data, event
    return data, None


def _line_start(before: bytes) -> int:
    """Return where the last line begins: what stands there before evidence is its time stamp."""
    return max(before.rfind(b"\n"), before.rfind(b"\r")) + 1


def _last_lines(raw: bytes) -> tuple[str, ...]:
    raw = raw[-_TAIL:]
    if not raw.strip():
        return ()
    text = _ESCAPE.sub(b"", raw).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines()]
    return tuple(line[:_SHORT] for line in lines if line)[-_LINES:]
