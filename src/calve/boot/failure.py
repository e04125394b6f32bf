"""Which code a failure has: a pure function of the phase it struck in and the error."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from calve.boot.preflight import MemoryShortError
from calve.cache.objects import MissingCacheError
from calve.contract.codes import Code
from calve.contract.userdata import UserDataError
from calve.errors import (
    AccessError,
    CalveError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    SignatureError,
    SpaceError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.transport.connection import CertificateError

__all__ = ["Failure", "classify"]

_FIRST: tuple[tuple[type[CalveError], Code], ...] = (
    (CertificateError, Code.CACHE_UNTRUSTED),
    (MemoryShortError, Code.MEMORY_SMALL),
)
_BY_PHASE: dict[str, tuple[tuple[type[CalveError], Code], ...]] = {
    "imds": (
        (AccessError, Code.IMDS_DENIED),
        (TransientError, Code.IMDS_UNREACHABLE),
        (DeadlineError, Code.IMDS_UNREACHABLE),
    ),
    "manifest": (
        (MissingCacheError, Code.CACHE_MISSING),
        (NotFoundError, Code.CLOSURE_INCOMPLETE),
        (SignatureError, Code.SIGNATURE),
        (VerificationError, Code.MANIFEST_DAMAGED),
        (UsageError, Code.CACHE_UNUSABLE),
    ),
    "pull": (
        (MissingCacheError, Code.CACHE_MISSING),
        (NotFoundError, Code.CLOSURE_INCOMPLETE),
        (SignatureError, Code.SIGNATURE),
        (DamagedError, Code.NAR_DAMAGED),
        (UsageError, Code.CACHE_UNUSABLE),
    ),
    "commit": ((DamagedError, Code.CLOSURE_INCOMPLETE),),
}
_ANY: tuple[tuple[type[CalveError], Code], ...] = (
    (AccessError, Code.CACHE_DENIED),
    (SpaceError, Code.DISK_SMALL),
    (DeadlineError, Code.CACHE_UNREACHABLE),  # of one object; the boot's own has a code
    (TransientError, Code.CACHE_UNREACHABLE),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a boot ended: a code, the phase it struck in, and one sentence."""

    code: Code
    phase: str
    message: str


def classify(phase: str, error: BaseException) -> Failure:
    """Name a failure."""
    if isinstance(error, UserDataError):
        return Failure(error.code, phase, str(error))
    if isinstance(error, OSError):
        small = error.errno in {errno.ENOSPC, errno.EDQUOT}
        return Failure(Code.DISK_SMALL if small else Code.DISK_FAULT, phase, str(error))
    if type(error) is CalveError and isinstance(error.__cause__, OSError):
        return Failure(Code.DISK_FAULT, phase, str(error))  # what `nix.unpack.storage_error` makes
    if isinstance(error, CalveError):
        for kind, code in (*_FIRST, *_BY_PHASE.get(phase, ()), *_ANY):
            if isinstance(error, kind):
                return Failure(code, phase, str(error))
    if isinstance(error, MemoryError):
        return Failure(Code.MEMORY_SMALL, phase, "out of memory")
    return Failure(Code.INTERNAL, phase, f"{type(error).__name__}: {error}")
