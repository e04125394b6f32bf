"""The store path that a path as people write it is, leads to by symlinks, or lies in: ./result, /run/current-system."""

from __future__ import annotations

import os
from pathlib import Path

from calve.nix.storepath import STORE_DIR, StorePath

__all__ = ["follow"]

_MOST_LINKS = 64


def follow(text: str, root: Path) -> StorePath | None:
    """Return the store path; None where a path leads to none.

    Args:
        text: from the current directory, unless it is absolute.
        root: of the store: links may lead to /nix/store or to ROOT/nix/store.

    Raises:
        DamagedError: it leads into the store, to something that is no store path.
    """
    stores = {STORE_DIR, f"{root.absolute()}{STORE_DIR}", f"{os.path.realpath(root)}{STORE_DIR}"}
    todo = os.path.abspath(text).strip("/").split("/")  # noqa: PTH100  (keeps links as they are)
    here = "/"
    links = 0
    while todo:
        if here in stores:
            return StorePath.parse(f"{STORE_DIR}/{todo[0]}")
        step = os.path.join(here, todo.pop(0))  # noqa: PTH118
        try:
            target = os.readlink(step)
        except OSError:
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            break
        led = os.path.normpath(os.path.join(here, target, *todo))  # noqa: PTH118
        todo, here = led.strip("/").split("/"), "/"
    return None
