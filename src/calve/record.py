"""JSON records of a format that we own: bounded, typed access with errors that name the place.

Fields that are not known are ignored; a major version that is not known is refused.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from calve.errors import DamagedError, UsageError

__all__ = ["Fields", "dump", "parse", "sha256", "time"]

T = TypeVar("T")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def dump(document: dict[str, Any]) -> bytes:
    """Write one line of ASCII, with fields in the order given: the same document gives the same bytes."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"


def time(text: str) -> dt.datetime:
    """Read an ISO 8601 time with its zone; DamagedError where it is none."""
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise DamagedError(f"{text[:100]!r} is not a time with its zone") from None
    return when


def sha256(text: str) -> bytes:
    """Read a SHA-256 in base 16; DamagedError where it is none."""
    if not _SHA256.fullmatch(text):
        raise DamagedError("it is no SHA-256 in base 16")
    return bytes.fromhex(text)


class Fields:
    """A JSON object's fields, with a place."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise DamagedError("not a JSON object", place=place)
        self._value: dict[str, Any] = value
        self.place = place

    def has(self, key: str) -> bool:
        """Say whether a field is there and not null."""
        return self._value.get(key) is not None

    def text(self, key: str, convert: Callable[[str], T]) -> T:
        """Return a text, converted; DamagedError where it is missing or not such."""
        value = self._value.get(key)
        if not isinstance(value, str):
            raise DamagedError(f"{key} is not a text", place=self.place)
        return self._convert(key, value, convert)

    def optional(self, key: str, convert: Callable[[str], T]) -> T | None:
        """Return a text or None, where it is missing or null."""
        return self.text(key, convert) if self.has(key) else None

    def number(self, key: str) -> int:
        """Return a number from 0 to 2**63 - 1."""
        value = self._value.get(key)
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise DamagedError(f"{key} is not a size", place=self.place)
        return value

    def optional_number(self, key: str) -> int | None:
        """Return a number or None, where it is missing or null."""
        return self.number(key) if self.has(key) else None

    def flag(self, key: str) -> bool:
        """Return true or false, which it is where it is missing or null."""
        value = self._value.get(key)
        if value is not None and type(value) is not bool:
            raise DamagedError(f"{key} is not true or false", place=self.place)
        return bool(value)

    def fields(self, key: str) -> Fields:
        """Return an object's fields."""
        value = self._value.get(key)
        if not isinstance(value, dict):
            raise DamagedError(f"{key} is not an object", place=self.place)
        return Fields(value, self.place)

    def items(self, key: str) -> list[Any]:
        """Return a list."""
        value = self._value.get(key)
        if not isinstance(value, list):
            raise DamagedError(f"{key} is not a list", place=self.place)
        return value

    def texts(self, key: str, convert: Callable[[str], T]) -> tuple[T, ...]:
        """Return a list of texts, each converted."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise DamagedError(f"{key} is not a list of texts", place=self.place)
        return tuple(self._convert(key, value, convert) for value in values)

    def _convert(self, key: str, value: str, convert: Callable[[str], T]) -> T:
        try:
            return convert(value)
        except DamagedError as error:
            raise DamagedError(f"{key}: {error.message}", place=self.place) from error


def parse(data: bytes, *, what: str, version: int, limit: int, place: str) -> Fields:
    """Read a record.

    Args:
        data: its JSON.
        what: its name, for errors.
        version: the major version that we read.
        limit: how many bytes it may have.
        place: where it came from.

    Raises:
        DamagedError: it is too long, not JSON, or has no version.
        UsageError: its major version is another.
    """
    if len(data) > limit:
        raise DamagedError(f"the {what} is longer than {limit} bytes", place=place)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the {what} is not JSON: {error}", place=place) from error
    fields = Fields(value, place)
    found = fields.number("version")
    if found != version:
        raise UsageError(
            f"the {what} has version {found}; this Calve reads version {version}",
            place=place,
            hint="it was written by another Calve: use that version, or update this one",
        )
    return fields
