"""Failure codes: why a machine's boot ended, one code per cause, for ever.

A code is part of the evidence format: it may be added, never renamed. `transient` says whether the same machine
could have succeeded a little later; nothing permanent is retried.
"""

from __future__ import annotations

import enum

__all__ = ["Code"]


class Code(enum.StrEnum):
    """Why a boot failed; the value stands in evidence, `text` explains it."""

    text: str
    transient: bool

    def __new__(cls, value: str, text: str, transient: bool = False) -> Code:  # noqa: FBT001, FBT002, PYI034
        """Make a member of (value, explanation, transient)."""
        code = str.__new__(cls, value)
        code._value_ = value
        code.text = text
        code.transient = transient
        return code

    IMDS_UNREACHABLE = ("imds-unreachable", "the metadata service did not answer in time", True)
    IMDS_DENIED = ("imds-denied", "the metadata service is disabled or refuses tokens")
    USERDATA_ABSENT = ("userdata-absent", "the instance has no user data")
    USERDATA_FOREIGN = ("userdata-foreign", "the user data is not Calve's")
    USERDATA_MALFORMED = ("userdata-malformed", "the user data is Calve's, but damaged")
    USERDATA_VERSION = ("userdata-version", "the user data is of a version this image cannot read")
    KEY_UNKNOWN = ("key-unknown", "the user data names a signing key that the image does not trust")
    CACHE_UNREACHABLE = ("cache-unreachable", "the binary cache did not answer in time", True)
    CACHE_DENIED = ("cache-denied", "the binary cache denied access, or the object is missing")
    CACHE_MISSING = ("cache-missing", "the bucket does not exist")
    CACHE_UNUSABLE = (
        "cache-unusable",
        "the cache, or what it holds, is of a kind this image cannot read",
    )
    CACHE_UNTRUSTED = (
        "cache-untrusted",
        "the certificate or the keyring of the binary cache is refused",
    )
    MANIFEST_DAMAGED = ("manifest-damaged", "the manifest is not what its digest promised")
    CLOSURE_INCOMPLETE = ("closure-incomplete", "the cache lacks a path of the closure")
    SIGNATURE = ("signature", "a path carries no signature by a trusted key")
    NAR_DAMAGED = ("nar-damaged", "a path's archive is truncated or altered")
    DISK_SMALL = ("disk-small", "the root file system has no room for the closure")
    MEMORY_SMALL = ("memory-small", "the machine has too little memory for the agent")
    SYSTEM_INVALID = ("system-invalid", "the closure is no system: it has no init")
    HEALTH_MISSING = (
        "health-missing",
        "a launch hook waits for health, and the closure has nothing that would tell it",
    )
    CONTRACT_UNKNOWN = (
        "contract-unknown",
        "what the closure expects of its initrd is damaged, or of a version this image cannot read",
    )
    KERNEL_FOREIGN = (
        "kernel-foreign",
        "the closure is for another kernel, and has no initrd with the agent",
    )
    KEXEC_DENIED = ("kexec-denied", "the machine does not allow another kernel to be started")
    KEXEC_FAILED = ("kexec-failed", "the closure's own kernel could not be started")
    KEXEC_LOOP = ("kexec-loop", "another kernel was started already, and it is not the closure's")
    DISK_FAULT = ("disk-fault", "the root file system cannot be read or written")
    DEADLINE = ("deadline", "the closure was not there before the deadline", True)
    UNHEALTHY = ("unhealthy", "the system started, and was not healthy in time")
    HOOK_DENIED = ("hook-denied", "the machine may not complete its launch hook")
    HOOK_UNREACHABLE = (
        "hook-unreachable",
        "the Auto Scaling service did not answer a healthy machine in time",
        True,
    )
    INTERNAL = ("internal", "the agent failed in a way it does not know")
