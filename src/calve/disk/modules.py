"""Kernel modules: which files a set of module names needs, in the order in which they load."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from calve.errors import NotFoundError

__all__ = ["load_order"]

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def load_order(tree: Path, names: Iterable[str], *, optional: Iterable[str] = ()) -> list[Path]:
    """Return the files of modules and all that they depend on, dependencies first.

    Args:
        tree: `lib/modules/VERSION`; modules are uncompressed `.ko` files.
        names: module names, `-` and `_` alike.
        optional: further ones that may be built in or absent.

    Raises:
        NotFoundError: a module of `names` is neither there nor built into the kernel.
    """
    files = {path.stem.replace("-", "_"): path for path in sorted(tree.rglob("*.ko"))}
    builtin_list = tree / "modules.builtin"
    builtin = (
        {Path(line).stem.replace("-", "_") for line in builtin_list.read_text().split()}
        if builtin_list.is_file()
        else set()
    )
    order: dict[str, Path] = {}

    def add(name: str, *, needed: bool) -> None:
        name = name.replace("-", "_")
        if name in order or name in builtin:
            return
        if name not in files:
            if needed:
                raise NotFoundError(f"the kernel has no module {name}", place=tree)
            return
        match = _DEPENDS.search(files[name].read_bytes())
        for dependency in match.group(1).decode().split(",") if match else []:
            if dependency:
                add(dependency, needed=True)
        order[name] = files[name]

    for name in names:
        add(name, needed=True)
    for name in optional:
        add(name, needed=False)
    return list(order.values())
