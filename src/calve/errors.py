"""What can go wrong, a class per category.

An error says what happened (`message`), where (`place`: a file and line, a URL, a store path) and what to do
about it (`hint`). It is printed once, by whoever owns the process: `cli.main` or `boot.main`.
Exit codes are those of docs/reference/exit-codes.md.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AccessError",
    "CalveError",
    "CancelledError",
    "ConflictError",
    "DamagedError",
    "DeadlineError",
    "NotFoundError",
    "RefusedError",
    "SignatureError",
    "SpaceError",
    "TransientError",
    "UsageError",
    "VerificationError",
]


class CalveError(Exception):
    """Failed, and no narrower category fits (exit 1)."""

    exit_code: ClassVar[int] = 1
    service_code: str = ""
    """What a remote service called it ("NoSuchBucket"); empty where none did."""

    def __init__(self, message: str, *, place: object = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = None if place is None else str(place)
        self.hint = hint

    def __str__(self) -> str:
        """Give message and place on one line, without the hint."""
        return self.message if self.place is None else f"{self.place}: {self.message}"


class UsageError(CalveError):
    """Wrong arguments or configuration, or a refusal before anything changed (exit 2)."""

    exit_code = 2


class AccessError(CalveError):
    """Credentials are missing or expired, or permission is denied (exit 4)."""

    exit_code = 4
    permission: str = ""
    """The IAM actions that the caller may lack, with commas between; empty where it is not that."""


class NotFoundError(CalveError):
    """A bucket, an object, a file or a path does not exist (exit 5)."""

    exit_code = 5


class RefusedError(CalveError):
    """A server will not have a request, for a reason of its own (exit 1). Another server may."""


class ConflictError(CalveError):
    """Somebody else holds the lock or changed the thing first (exit 6)."""

    exit_code = 6


class VerificationError(CalveError):
    """What was received is not what was promised (exit 7)."""

    exit_code = 7


class SignatureError(VerificationError):
    """No trusted key signed this (exit 7). Never retried."""


class DamagedError(VerificationError):
    """Bytes are truncated, altered or malformed (exit 7). Another source may have them right."""


class DeadlineError(CalveError):
    """Time ran out (exit 8)."""

    exit_code = 8


class SpaceError(CalveError):
    """Bytes, inodes or memory do not suffice (exit 1)."""


class TransientError(CalveError):
    """A fault that may pass: a reset, a stall, a 5xx answer (exit 1 once retries are used up)."""

    def __init__(
        self,
        message: str,
        *,
        place: object = None,
        hint: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, place=place, hint=hint)
        self.retry_after_s = retry_after_s


class CancelledError(CalveError):
    """Interrupted by the user or by the failure of a sibling (exit 130)."""

    exit_code = 130

    def __init__(self, message: str = "interrupted") -> None:
        super().__init__(message)
