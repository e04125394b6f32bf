"""Which code a failure has: every row of the table, and what must not be confused."""

from __future__ import annotations

import errno

import pytest

from calve.boot.failure import _ANY, _BY_PHASE, classify
from calve.boot.preflight import MemoryShortError
from calve.cache.objects import MissingCacheError
from calve.contract.codes import Code
from calve.contract.userdata import UserDataError
from calve.errors import (
    AccessError,
    CalveError,
    ConflictError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    SignatureError,
    SpaceError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix.unpack import storage_error
from calve.transport.connection import CertificateError

ROWS = {
    "imds": {
        AccessError: "imds-denied",
        TransientError: "imds-unreachable",
        DeadlineError: "imds-unreachable",
        DamagedError: "internal",
        SpaceError: "disk-small",
    },
    "manifest": {
        CertificateError: "cache-untrusted",
        MissingCacheError: "cache-missing",
        NotFoundError: "closure-incomplete",
        SignatureError: "signature",
        DamagedError: "manifest-damaged",
        VerificationError: "manifest-damaged",
        UsageError: "cache-unusable",
        AccessError: "cache-denied",
        SpaceError: "disk-small",
        MemoryShortError: "memory-small",
        DeadlineError: "cache-unreachable",
        TransientError: "cache-unreachable",
        ConflictError: "internal",
    },
    "pull": {
        CertificateError: "cache-untrusted",
        MissingCacheError: "cache-missing",
        NotFoundError: "closure-incomplete",
        SignatureError: "signature",
        DamagedError: "nar-damaged",
        UsageError: "cache-unusable",
        AccessError: "cache-denied",
        SpaceError: "disk-small",
        DeadlineError: "cache-unreachable",
        TransientError: "cache-unreachable",
    },
    "commit": {
        DamagedError: "closure-incomplete",
        SpaceError: "disk-small",
        DeadlineError: "cache-unreachable",
    },
}


@pytest.mark.parametrize(
    ("phase", "kind", "code"),
    [(phase, kind, code) for phase, rows in ROWS.items() for kind, code in rows.items()],
)
def test_every_row(phase, kind, code):
    failure = classify(phase, kind("the reason", place="there"))
    assert (failure.code, failure.phase) == (code, phase)
    assert "there: the reason" in failure.message


def test_the_table_has_no_row_that_is_not_tested():
    for phase, rows in _BY_PHASE.items():
        assert {kind for kind, _ in rows} <= set(ROWS[phase])
    tested = {kind for rows in ROWS.values() for kind in rows}
    assert {kind for kind, _ in _ANY} <= tested


def test_every_code_can_be_reached():
    reached = {code for rows in ROWS.values() for code in rows.values()}
    # User data's own codes come with their errors; the rest below.
    elsewhere = {
        *(code for code in Code if code.startswith("userdata-")),
        Code.KEY_UNKNOWN,
        Code.SYSTEM_INVALID,
        Code.DEADLINE,
        Code.DISK_FAULT,
        # The hand-off's.
        Code.CONTRACT_UNKNOWN,
        Code.KERNEL_FOREIGN,
        Code.KEXEC_DENIED,
        Code.KEXEC_FAILED,
        Code.KEXEC_LOOP,
        Code.HEALTH_MISSING,
        # Stage 2's.
        Code.UNHEALTHY,
        Code.HOOK_DENIED,
        Code.HOOK_UNREACHABLE,
    }
    assert reached | elsewhere == set(Code)


@pytest.mark.parametrize("code", list(Code))
def test_user_data_s_errors_bring_their_code(code):
    assert classify("imds", UserDataError(code, "why")).code is code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Code.DISK_SMALL),
        (OSError(errno.EDQUOT, "Quota exceeded"), Code.DISK_SMALL),
        (OSError(errno.EIO, "Input/output error"), Code.DISK_FAULT),
        (OSError(errno.EROFS, "Read-only file system"), Code.DISK_FAULT),
        (PermissionError(errno.EACCES, "no"), Code.DISK_FAULT),
        (MemoryError(), Code.MEMORY_SMALL),
        (LookupError("bug"), Code.INTERNAL),
        (CalveError("no idea"), Code.INTERNAL),
        (KeyboardInterrupt(), Code.INTERNAL),
    ],
)
@pytest.mark.parametrize("phase", ["imds", "manifest", "pull", "commit", "switch-root", "?"])
def test_errors_that_mean_the_same_everywhere(phase, error, code):
    assert classify(phase, error).code is code


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, Code.DISK_FAULT), (errno.ENOSPC, Code.DISK_SMALL)]
)
def test_the_store_s_own_error_for_a_failed_write(number, code):
    try:
        try:
            raise OSError(number, "broken")
        except OSError as error:
            raise storage_error(error, "/nix/store/x") from error
    except CalveError as error:
        assert classify("pull", error).code is code
