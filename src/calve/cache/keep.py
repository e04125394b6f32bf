"""The root that a push leaves behind: it keeps the manifest, and tells the next push what is there already.

`roots/push/<name>.json`, by the name of the store path without its version: another push of the same name takes the
place of this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from calve.cache import manifest as manifests
from calve.cache import roots as records
from calve.cache.manifest import Manifest
from calve.cache.objects import Objects, is_missing
from calve.cache.roots import Root
from calve.clock import Clock
from calve.errors import AccessError, ConflictError, DamagedError, NotFoundError, UsageError
from calve.nix.storepath import StorePath

__all__ = ["OWNER", "Keep", "root_name", "root_names"]

OWNER = "push"
_TRIES = 10
_VERSION = re.compile(r"-[^a-zA-Z].*")
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]|^[.-]")


def root_name(path: StorePath) -> str:
    """Return the name of the root for a path: that of `nixos-system-web-25.11` is `nixos-system-web`.

    Nix divides names the same way: the version begins behind the first dash that no letter follows.
    """
    name = _VERSION.sub("", path.name) or path.name
    return _FOREIGN.sub("_", name)[:100]


def root_names(paths: Iterable[StorePath]) -> dict[StorePath, str]:
    """Give each path the name of its root; of two that share one the second also gets its digest."""
    names: dict[StorePath, str] = {}
    for path in paths:
        name = root_name(path)
        taken = name in names.values()
        names[path] = f"{name[:90]}.{path.digest[:8]}" if taken else name
    return names


@dataclass(frozen=True, slots=True)
class Keep:
    """A root as a push found it; `root` and `manifest` are None where they are not there, or damaged."""

    path: StorePath
    name: str
    root: Root | None = None
    tag: str | None = None
    manifest: Manifest | None = None

    @classmethod
    def read(cls, objects: Objects, path: StorePath, name: str) -> Keep:
        """Read the root of a name, and the manifest that it keeps."""
        try:
            found = records.tagged_root(objects, OWNER, name)
        except DamagedError:  # ours takes its place
            _, tag = objects.get_tagged(records.root_key(OWNER, name), records.MAX_BYTES)
            return cls(path, name, None, tag)
        if found is None:
            return cls(path, name)
        root, tag = found
        try:
            manifest = manifests.read(objects, root.manifest)
        except (NotFoundError, AccessError, DamagedError, UsageError) as error:
            if isinstance(error, AccessError) and not is_missing(error):
                raise
            return cls(path, name, root, tag)  # then every path is asked for
        return cls(path, name, root, tag, manifest)

    @property
    def sure(self) -> bool:
        """Say whether all that the manifest names is there."""
        return self.root is not None and self.root.checked and self.manifest is not None

    def write(
        self, objects: Objects, digest: str, clock: Clock, *, asked: bool, gc: str | None
    ) -> None:
        """Have the root keep a manifest, all of which is there; what a collection wrote into it stays.

        Args:
            objects: the cache.
            digest: of the manifest.
            clock: stamps it.
            asked: this push has asked which collection is under way.
            gc: the one that is.
        """
        root, tag = self.root, self.tag
        for _ in range(_TRIES):
            made = Root(OWNER, self.name, digest, clock.now(), checked=True, gc=gc)
            if root is not None:
                # One that changed since was told by a collection to look again: so shall the next push.
                checked = tag == self.tag or root.checked
                if (root.manifest, root.checked) == (digest, checked):
                    return
                told = gc if asked and tag == self.tag else root.gc
                made = replace(made, checked=checked, gc=told)
            if tag is None:
                if objects.put(made.key, made.dump(), only_new=True):
                    return
            elif records.write_root(objects, made, match=tag):
                return
            found = records.tagged_root(objects, OWNER, self.name)
            root, tag = (None, None) if found is None else found
        raise ConflictError("others keep writing to it", place=f"{objects.url}/roots/{OWNER}")
