"""How a release ended: the reason for which it was given up, and its verdict, v1 of both. `ends` keeps them."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from calve import record
from calve.errors import DamagedError
from calve.record import Fields

__all__ = ["LIMIT_BYTES", "Failure", "Outcome", "Reason", "Verdict"]

VERSION = 1
LIMIT_BYTES = 64 * 1024
_MOST_FAILURES = 20
_MOST_LINES = 20
_MOST_CHARACTERS = 300
_MOST_BYTES = 400
"""Of a text as JSON has it, where a letter takes up to twelve: a record with all its failures stays readable."""


class Outcome(StrEnum):
    """How a release ended."""

    RELEASED = "released"
    ROLLED_BACK = "rolled-back"
    ROLLBACK_FAILED = "rollback-failed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def exit_code(self) -> int:
        """Return the exit code of a command that waited for it (docs/reference/exit-codes.md)."""
        return {Outcome.RELEASED: 0, Outcome.ROLLED_BACK: 9, Outcome.ROLLBACK_FAILED: 10}.get(
            self, 1
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of one machine; foreign text.

    Attributes:
        code: a failure code of the agent's, or one of the judge's own (docs/reference/rollout.md).
        phase: of its boot; "" where it did not say.
        lines: the last ones of its console or report.
    """

    instance: str
    code: str
    message: str
    phase: str = ""
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a release was given up.

    Attributes:
        rule: which of the judge's rules decided.
        text: one sentence.
        failures: the machines that it rests on, the first one first.
        by: who judged: "cli", "guard", "lambda", "aws", "operator".
        at: when, UTC.
    """

    rule: str
    text: str
    failures: tuple[Failure, ...]
    by: str
    at: dt.datetime

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types, bounded."""
        return {
            "rule": self.rule,
            "text": _cut(self.text, 1000, 4000),
            "by": self.by,
            "at": self.at.isoformat(timespec="milliseconds"),
            "failures": [
                {
                    "instance": one.instance,
                    "code": _cut(one.code, 64, 128),
                    "message": _cut(one.message),
                    "phase": _cut(one.phase, 64, 128),
                    "lines": [_cut(line) for line in one.lines[-_MOST_LINES:]] if at < 3 else [],
                }
                for at, one in enumerate(self.failures[:_MOST_FAILURES])
            ],
        }

    def dump(self) -> bytes:
        """Return the record's bytes."""
        return record.dump({"version": VERSION, **self.document()})

    @classmethod
    def parse(cls, data: bytes, place: str) -> Reason:
        """Read a record; UsageError where its version is not ours, DamagedError where it is none."""
        return cls.of(
            record.parse(data, what="reason", version=VERSION, limit=LIMIT_BYTES, place=place)
        )

    @classmethod
    def of(cls, fields: Fields) -> Reason:
        """Read it; DamagedError where it is none."""
        failures = []
        for item in fields.items("failures"):
            one = Fields(item, fields.place)
            failures.append(
                Failure(
                    one.text("instance", str),
                    one.text("code", str),
                    one.text("message", str),
                    one.text("phase", str),
                    one.texts("lines", str),
                )
            )
        return cls(
            fields.text("rule", str),
            fields.text("text", str),
            tuple(failures),
            fields.text("by", str),
            fields.text("at", record.time),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a release ended.

    Attributes:
        refresh: id of the instance refresh; "" where there was none.
        reason: None where it went well.
    """

    fleet: str
    release: int
    outcome: Outcome
    refresh: str
    by: str
    at: dt.datetime
    reason: Reason | None = None

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "fleet": self.fleet,
            "release": self.release,
            "outcome": self.outcome.value,
            "refresh": self.refresh,
            "by": self.by,
            "at": self.at.isoformat(timespec="milliseconds"),
            "reason": None if self.reason is None else self.reason.document(),
        }

    def dump(self) -> bytes:
        """Return the record's bytes."""
        return record.dump({"version": VERSION, **self.document()})

    @classmethod
    def parse(cls, data: bytes, place: str) -> Verdict:
        """Read a record.

        Raises:
            UsageError: it is of a version that we do not read.
            DamagedError: it is no record.
        """
        fields = record.parse(data, what="verdict", version=VERSION, limit=LIMIT_BYTES, place=place)
        return cls(
            fields.text("fleet", str),
            fields.number("release"),
            fields.text("outcome", _outcome),
            fields.text("refresh", str),
            fields.text("by", str),
            fields.text("at", record.time),
            Reason.of(fields.fields("reason")) if fields.has("reason") else None,
        )


def _cut(text: str, most: int = _MOST_CHARACTERS, most_bytes: int = _MOST_BYTES) -> str:
    """Return the beginning of a foreign text."""
    text = text[:most]
    while len(json.dumps(text)) > most_bytes:
        text = text[: len(text) * 3 // 4]
    return text


def _outcome(text: str) -> Outcome:
    try:
        return Outcome(text)
    except ValueError:
        raise DamagedError(f"{text[:100]!r} is no outcome") from None
