"""What can be the matter with an object of a cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from calve.nix.storepath import StorePath

__all__ = ["Finding", "Kind", "sort"]


class Kind(StrEnum):
    """What is the matter with an object."""

    MISSING = "missing"
    """Something that is kept names it, and it is not there."""
    CORRUPT = "corrupt"
    """It is there, and is not what it should be."""
    DIFFERENT = "different"
    """A narinfo is of another build than the manifest says."""
    DANGLING = "dangling"
    """A narinfo refers to a path whose narinfo is not there, and no manifest names it."""
    UNSIGNED = "unsigned"
    """No trusted key signed it."""
    UNSUPPORTED = "unsupported"
    """It may be right, but this Calve cannot tell."""
    UNREFERENCED = "unreferenced"
    """No manifest names it. That is no error."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is the matter with one object; `path` is the store path that it is about, where it is about one."""

    kind: Kind
    key: str
    why: str
    path: StorePath | None = None

    @property
    def harmless(self) -> bool:
        """Say whether it is no error."""
        return self.kind is Kind.UNREFERENCED


def sort(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return each finding once, errors first; what was found twice of one object is told as it was first."""
    first = {(one.kind, one.key, one.path): one for one in reversed(list(findings))}
    return tuple(sorted(first.values(), key=lambda one: (one.harmless, one.key, one.kind)))
