"""The closure that pulls and pushes are measured with: Debian packages and all they depend on, one store path each.

Made once, below .calve/bench. Nothing of a package's usr and etc is left out (documentation, locales, the kernel's
modules): a system of NixOS has files of every size too. Beside it, closures of other shapes for figures of memory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from calve.cache import url as locations
from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.demo.components import Component, Package, components, relation
from calve.demo.imports import Importer, add_tree, temporary
from calve.demo.packages import Packages, paragraphs
from calve.demo.paths import DEPENDENCIES
from calve.demo.unpack_deb import Unpacker, control
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.transport.http import Client

HOME = Path(".calve/bench")
SEEDS = tuple(
    os.environ.get(
        "CALVE_BENCH_PACKAGES",
        "nginx python3 systemd perl git openjdk-17-jre-headless postgresql-15 gcc curl openssh-server ruby vim "
        "linux-image-cloud-amd64 ffmpeg haproxy redis-server rsync jq tmux",
    ).split()
)
_TOPLEVEL = "nixos-system-bench"
_SMALL = "openssh-server"
_NAR_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Closure:
    """A closure in the store below `root`."""

    root: str
    top: str
    paths: int
    nar_bytes: int
    largest_bytes: int

    @property
    def path(self) -> StorePath:
        return StorePath.parse(self.top)

    def __str__(self) -> str:
        return (
            f"{self.paths} paths, {self.nar_bytes / 1e6:.0f} MB of NARs, the largest "
            f"{self.largest_bytes / 1e6:.0f} MB"
        )


# Which packages


def _available() -> Iterator[Mapping[str, str]]:
    """Return what apt's lists say of every package's candidate."""
    shown = subprocess.run(
        ["apt-cache", "dumpavail"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    return paragraphs(shown.stdout, "apt-cache dumpavail")


def resolve(seeds: Sequence[str]) -> list[str]:
    """Return the seeds and all that they depend on; of alternatives, and of providers, the first."""
    known: dict[str, Mapping[str, str]] = {}
    providers: dict[str, list[str]] = {}
    for fields in _available():
        name = fields["Package"]
        known.setdefault(name, fields)
        for virtual, *_ in relation(fields.get("Provides", ""), name):
            providers.setdefault(virtual, []).append(name)
    chosen: dict[str, None] = {}
    todo = list(reversed(seeds))
    while todo:
        name = todo.pop()
        if name in chosen:
            continue
        chosen[name] = None
        fields = known[name]
        for kind in ("Pre-Depends", "Depends"):
            for alternatives in relation(fields.get(kind, ""), name):
                todo += _provider(alternatives, known, providers, chosen)
    return sorted(chosen)


def _provider(
    alternatives: Iterable[str],
    known: Mapping[str, object],
    providers: Mapping[str, list[str]],
    chosen: Mapping[str, None],
) -> list[str]:
    candidates: list[str] = []
    for name in alternatives:
        candidates += [name] if name in known else sorted(providers.get(name, ()))
    there = [name for name in candidates if name in chosen]
    return (there or candidates)[:1]


# Their paths


def _add_components(
    importer: Importer, packages: Packages, names: Sequence[str]
) -> dict[str, StorePath]:
    debs = packages.fetch(names)
    graph = components([Package.of(deb, control(deb.path)) for deb in debs])
    paths: dict[str, StorePath] = {}
    for number, component in enumerate(graph.components, 1):
        references = sorted(paths[name] for name in component.references)
        for package in component.packages:
            paths[package.name] = paths[component.name] = _add(importer, component, references)
        if number % 50 == 0:
            importer.flush()
            print(f"  {number} of {len(graph.components)} store paths", file=sys.stderr)
    importer.flush()
    return paths


def _add(importer: Importer, component: Component, references: Sequence[StorePath]) -> StorePath:
    with temporary(importer.store) as work:
        tree = work / "tree"
        tree.mkdir()
        unpacker = Unpacker(tree, keep=lambda path: path.startswith(("usr/", "etc/")))
        for package in component.packages:
            unpacker.add(package.deb.path)
        (tree / DEPENDENCIES).parent.mkdir(parents=True)
        (tree / DEPENDENCIES).write_text(" ".join(map(str, references)) + "\n")
        return importer.add(tree, component.store_name, references)


def _add_top(store: LocalStore, name: str, references: Iterable[StorePath]) -> StorePath:
    """Add what refers to all of these."""
    paths = sorted(set(references))
    with temporary(store) as work:
        tree = work / "tree"
        tree.mkdir()
        (tree / "sw").write_text("".join(f"{line}\n" for line in (name, *paths)))
        return add_tree(store, tree, name, paths)


def describe(store: LocalStore, top: StorePath) -> Closure:
    infos = store.closure([top])
    sizes = [info.nar_size for info in infos]
    return Closure(str(store.root), str(top), len(infos), sum(sizes), max(sizes))


# Closures, each made once


def once(name: str, make: Callable[[Path], Mapping[str, Closure]]) -> dict[str, Closure]:
    directory = HOME.absolute() / name
    record = directory / "closure.json"
    if not record.exists():
        if directory.exists():
            subprocess.run(["chmod", "-R", "u+w", directory], check=True)
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        made = make(directory)
        record.write_text(json.dumps({key: asdict(value) for key, value in made.items()}, indent=2))
    return {key: Closure(**value) for key, value in json.loads(record.read_text()).items()}


def realistic() -> dict[str, Closure]:
    """Return `whole`, `changed` (the same but for its top: one path of all) and `small` (about 100 MB)."""

    def make(directory: Path) -> dict[str, Closure]:
        names = resolve(SEEDS)
        print(f"  the closure is made once, of {len(names)} packages", file=sys.stderr)
        with LocalStore(directory, create=True) as store:
            paths = _add_components(Importer(store), Packages(HOME / "packages"), names)
            whole = _add_top(store, f"{_TOPLEVEL}-1", paths.values())
            changed = _add_top(store, f"{_TOPLEVEL}-2", paths.values())
            found = {"whole": describe(store, whole), "changed": describe(store, changed)}
            if _SMALL in paths:
                small = _add_top(store, f"{_TOPLEVEL}-small", [paths[_SMALL]])
                found["small"] = describe(store, small)
            return found

    key = "closure" if "CALVE_BENCH_PACKAGES" not in os.environ else f"closure-{'-'.join(SEEDS)}"
    return once(key[:100], make)


def single() -> Closure:
    """Return a closure with one file of 2 GB, half of which does not compress."""

    def make(directory: Path) -> dict[str, Closure]:
        source = random.Random(5)
        with LocalStore(directory, create=True) as store, temporary(store) as work:
            tree = work / "tree"
            tree.mkdir()
            with (tree / "file").open("wb") as file:
                while file.tell() < _NAR_BYTES:
                    file.write(source.randbytes(1 << 19) + bytes(range(256)) * 2048)
            return {"whole": describe(store, add_tree(store, tree, "one-large-file"))}

    return once("single", make)["whole"]


# A cache of them


@dataclass(frozen=True)
class Published:
    """A closure in the cache directory below `root`: the digest of its manifest, and the key that signed it."""

    root: str
    manifest: str
    trusted: str


def secret_key() -> Path:
    """Return the file of the key that signs caches here."""
    file = HOME.absolute() / "key.sec"
    if not file.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        file.write_text(SecretKey.generate("bench-1").dump())
    return file


def published(closure: Closure) -> Published:
    """Push a closure into a cache directory, unless it is there."""
    cache = HOME.absolute() / "cache"
    record = HOME.absolute() / "caches" / f"{closure.path.digest}.json"
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        key = SecretKey.parse(secret_key().read_text())
        with LocalStore(Path(closure.root)) as store, Client(context=None, cancel=None) as client:
            objects = open_objects(locations.Directory(str(cache)), client)
            pushed = push(store, [closure.path], objects, key)
        made = Published(str(cache), pushed.manifests[closure.path], key.public.dump())
        record.write_text(json.dumps(asdict(made)))
    return Published(**json.loads(record.read_text()))


def main() -> None:
    for name, closure in realistic().items():
        print(f"{name}: {closure}")


if __name__ == "__main__":
    main()
