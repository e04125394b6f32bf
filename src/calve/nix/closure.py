"""The closure: a path and everything that it refers to, however indirectly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from calve.errors import DamagedError
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["closure"]


def closure(roots: Iterable[StorePath], lookup: Callable[[StorePath], PathInfo]) -> list[PathInfo]:
    """Return the closure of some paths, every path behind all that it refers to.

    Args:
        roots: where it begins; their order, then the references' order, decides among equals.
        lookup: says what is known of a path; asked once for each, its errors pass.

    Raises:
        DamagedError: paths refer to each other in a circle.
    """
    done: list[PathInfo] = []
    seen: set[StorePath] = set()
    for root in roots:
        stack: dict[StorePath, tuple[PathInfo, Iterator[StorePath]]] = {}
        pending: StorePath | None = root if root not in seen else None
        while pending is not None or stack:
            if pending is not None:
                seen.add(pending)
                info = lookup(pending)
                stack[pending] = info, iter(info.references)
            current = next(reversed(stack))
            pending = _next(current, stack[current][1], seen, stack)
            if pending is None:
                done.append(stack.pop(current)[0])
    return done


def _next(
    current: StorePath,
    references: Iterator[StorePath],
    seen: set[StorePath],
    stack: dict[StorePath, tuple[PathInfo, Iterator[StorePath]]],
) -> StorePath | None:
    """Return the next reference that was not seen; one that is still open closes a circle."""
    for reference in references:
        if reference not in seen:
            return reference
        if reference in stack and reference != current:
            raise DamagedError(f"it refers, in a circle, to {reference}", place=current)
    return None
