"""Names and versions of store paths: divided and ordered as Nix does it, an output's name taken off.

Source: `DrvName` and `compareVersions` of Nix; the manual, builtins.parseDrvName and builtins.compareVersions.
"""

from __future__ import annotations

import re

from calve.nix.narinfo import PathInfo

__all__ = ["Key", "divide", "package_of", "version_key", "without_output"]

Key = tuple[tuple[int, int, str], ...]
"""What orders versions."""

_VERSION = re.compile(r"-(?=[^A-Za-z])")
_COMPONENT = re.compile(r"[0-9]+|[^0-9.\-]+")
_OUTPUTS = (
    "bin|data|debug|dev|devdoc|dist|doc|getent|info|lib|libgcc|man|modules|nscd|out|static|terminfo"
)
_OUTPUT = re.compile(rf"(.+)-(?:{_OUTPUTS})")


def divide(name: str) -> tuple[str, str]:
    """Divide a name from its version: the version begins behind the first dash that no letter follows."""
    found = _VERSION.search(name)
    return (name, "") if found is None else (name[: found.start()], name[found.end() :])


def version_key(version: str) -> Key:
    """Return what orders versions: `2.3pre` < `2.3` < `2.3a` < `2.3.1`."""
    parts = []
    for part in _COMPONENT.findall(version):
        if part.isdecimal():
            parts.append((2, int(part), ""))
        else:
            parts.append((0, 0, "") if part == "pre" else (1, 0, part))
    return (*parts, (1, 0, ""))


def without_output(name: str) -> str:
    """Return a name without what is usual for an output: `-bin` of `openssl-3.0-bin`, but no `-unstable`."""
    found = _OUTPUT.fullmatch(name)
    return name if found is None else found[1]


def package_of(info: PathInfo) -> tuple[str, str]:
    """Return a path's package and version; the deriver tells what its output is called, where it is known."""
    name = info.path.name
    if info.deriver is not None:
        whole = info.deriver.name.removesuffix(".drv")
        if name == whole or name.startswith(f"{whole}-"):
            return divide(whole)
    return divide(without_output(name))
