"""The agent's store on a disk that reorders and drops what was not synced: the real code, each change of the disk seen.

The model is a journalling file system in its worst mood: names, directories and metadata become durable in the order
of the changes, as far as any prefix; the contents of a file in any order, in part, or not at all. A sync makes
everything durable, an fsync the contents of its file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.boot.record import Record
from calve.boot.store import BootStore
from calve.errors import CalveError
from calve.nix import nar, narwriter, registration
from calve.nix.hashes import Hash, encode32
from calve.nix.nar import Directory, End, File, Symlink
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath
from calve.nix.tree import remove_tree

NARS: dict[StorePath, bytes] = {}
CHANGES = ("rename", "replace", "mkdir", "symlink", "unlink", "rmdir", "open")


def made(name: str, *references: PathInfo) -> PathInfo:
    data = name.encode() * 9
    out = io.BytesIO()
    size = nar.emit(
        [
            Directory(b""),
            File(b"a", len(data), executable=True),
            data,
            File(b"empty", 0, executable=False),
            Symlink(b"l", b"a"),
            End(),
        ],
        out.write,
    )
    path = StorePath(encode32(hashlib.sha256(name.encode()).digest()[:20]), name)
    NARS[path] = out.getvalue()
    names = tuple(sorted(reference.path for reference in references))
    return PathInfo(path, Hash.sha256(out.getvalue()), size, names)


SHARED = made("shared")
CLOSURES = [
    [SHARED, own, made(f"top-{number}", SHARED, own)]
    for number, own in enumerate([made("own-0"), made("own-1"), made("own-2")])
]
INFOS = {info.path: info for closure in CLOSURES for info in closure}


class PowerCutError(BaseException):
    """The machine is off: nothing of it runs any more, no handler of errors either."""


@dataclass(frozen=True)
class Node:
    """What a name stood for; of a file, which one."""

    mode: int
    mtime_ns: int
    inode: int = 0
    target: str = ""


Names = dict[str, Node]


@dataclass
class PoweredDisk:
    """Sees every change below a directory; `left` changes from now the power goes."""

    root: Path
    left: int
    off: bool = False
    changes: int = 0
    states: list[Names] = field(default_factory=list)  # since the last sync, which is the first
    durable: dict[int, bytes] = field(default_factory=dict)
    latest: dict[int, bytes] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sync()

    def look(self) -> Names:
        """Read all names, and the contents of the files."""
        names: Names = {}
        for place in sorted(self.root.rglob("*")):
            status = place.lstat()
            target = os.readlink(place) if place.is_symlink() else ""
            key = str(place.relative_to(self.root))
            names[key] = Node(status.st_mode, status.st_mtime_ns, status.st_ino, target)
            if stat.S_ISREG(status.st_mode):
                if status.st_ino not in self.files:  # held open: no other file gets its number
                    self.files[status.st_ino] = REAL["open"](place, os.O_RDONLY)
                self.latest[status.st_ino] = os.pread(self.files[status.st_ino], 1 << 20, 0)
        return names

    def sync(self) -> None:
        names = self.look()
        self.states = [names]
        self.durable = {node.inode: self.latest.get(node.inode, b"") for node in names.values()}

    def fsync(self, fd: int) -> None:
        self.changed()
        self.look()
        inode = os.fstat(fd).st_ino
        self.durable[inode] = self.latest[inode]

    def changed(self) -> None:
        """Count a change that is about to be made."""
        if self.off or self.left == 0:
            self.off = True
            raise PowerCutError
        self.left -= 1
        self.changes += 1

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)

    def cut(self, rng: random.Random) -> None:
        """Leave what a cut may leave."""
        self.states.append(self.look())
        names = rng.choice([rng.choice(self.states), self.states[-1]])
        contents: dict[int, bytes] = {}
        chance = rng.choice([0.1, 0.5, 1.0])
        for node in names.values():
            old = self.durable.get(node.inode, b"")
            new = self.latest.get(node.inode, b"")
            lost = rng.random() < chance and new != old
            parts = [old, new[: len(new) // 2], bytes(len(new)), b""]
            contents[node.inode] = rng.choice(parts) if lost else new
        wipe(self.root)
        for key, node in names.items():
            place = self.root / key
            if stat.S_ISLNK(node.mode):
                place.symlink_to(node.target)
            elif stat.S_ISDIR(node.mode):
                place.mkdir()
            else:
                place.write_bytes(contents[node.inode])
        for key, node in reversed(names.items()):
            if not stat.S_ISLNK(node.mode):
                (self.root / key).chmod(stat.S_IMODE(node.mode))
            os.utime(self.root / key, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)


REAL: dict[str, Callable] = {"io.open": io.open, **{name: getattr(os, name) for name in CHANGES}}


def wipe(root: Path) -> None:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for entry in list(root.iterdir()):
            remove_tree(fd, entry.name)
    finally:
        os.close(fd)


@contextlib.contextmanager
def powered(disk: PoweredDisk, *, forgets: str = "") -> Iterator[None]:
    """Let a disk see what this process does to it; it may do nothing where it is told to sync or fsync."""

    def seen(name):
        real = REAL[name]

        @functools.wraps(real)
        def change(*arguments, **named):
            writes = name != "open" or arguments[1] & (os.O_CREAT | os.O_TRUNC)
            if writes:
                disk.changed()
            result = real(*arguments, **named)
            if writes:
                disk.states.append(disk.look())
            return result

        return mock.patch.object(os, name, change)

    def opened(file, mode="r", *arguments, **named):
        writes = not isinstance(file, int) and "r" not in mode
        if writes:
            disk.changed()
        result = REAL["io.open"](file, mode, *arguments, **named)
        if writes:
            disk.states.append(disk.look())
        return result

    def synced(_fd):
        disk.changed()
        if forgets != "sync":
            disk.sync()

    def fsynced(fd):
        if forgets != "fsync":
            disk.fsync(fd)

    with contextlib.ExitStack() as owner:
        for name in CHANGES:
            owner.enter_context(seen(name))
        owner.enter_context(mock.patch.object(io, "open", opened))
        owner.enter_context(mock.patch.object(os, "fsync", fsynced))
        owner.enter_context(mock.patch("calve.nix.staging.sync", synced))
        yield


def boot(root: Path, closure: list[PathInfo], flush_every: int) -> int:
    """Do as the agent does; return how many paths were fetched."""
    with BootStore(root) as store:
        infos = {info.path: info for info in closure}
        missing = store.missing(infos)
        adopted = store.adopt([infos[path] for path in missing])
        fetched = [path for path in missing if path not in adopted]
        for number, path in enumerate(fetched, 1):
            nar_bytes = NARS[path]
            store.stage(infos[path], nar.read(io.BytesIO(nar_bytes).read, limit=len(nar_bytes)))
            if number % flush_every == 0:
                store.flush()
        if missing:
            store.commit([infos[path] for path in missing])
        store.finish(closure[-1].path)
    return len(fetched)


def boot_at_once(root: Path, closure: list[PathInfo]) -> None:
    """Boot without waiting for this machine's disk."""
    with mock.patch("calve.nix.staging.sync"), mock.patch("os.fsync"):
        boot(root, closure, 1)


def boot_with_power(
    root: Path, closure: list[PathInfo], flush_every: int, left: int, seed: int, forgets: str = ""
) -> int | None:
    """Boot, and say how many changes of the disk that took; None where the power went."""
    disk = PoweredDisk(root, left)
    try:
        with powered(disk, forgets=forgets):
            boot(root, closure, flush_every)
    except PowerCutError:
        disk.cut(random.Random(seed))
        return None
    finally:
        disk.close()
    return disk.changes


def whole(root: Path, path: StorePath) -> bool:
    digest = hashlib.sha256()
    narwriter.dump(root / "nix/store" / path.basename, digest.update)
    return digest.digest() == INFOS[path].nar_hash.digest


def check(root: Path) -> str | None:
    """Check what lists vouch for; return the profile's system."""
    record = root / "nix/var/calve/committed.json"
    both = Record.parse(record.read_bytes() if record.exists() else b"")
    named = {*both.committed, *both.fetched}
    listed = root / "nix-path-registration"
    if listed.exists():
        named |= {info.path for info in registration.parse(listed.read_bytes())}
    for path in named:
        assert whole(root, path), path
    profile = root / "nix/var/nix/profiles/system"
    if not profile.is_symlink():
        return None
    target = os.readlink(profile.parent / os.readlink(profile))
    closure = next(each for each in CLOSURES if str(each[-1].path) == target)
    assert {info.path for info in closure} <= named
    return target


BOOTS = st.lists(
    st.tuples(
        st.integers(0, len(CLOSURES) - 1),
        st.integers(1, 3),
        st.integers(0, 120),
        st.integers(0, 1 << 32),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(BOOTS)
def test_whatever_the_disk_keeps_is_the_old_system_or_the_new_one(boots):
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        root.mkdir()
        before = None
        for number, flush_every, left, seed in boots:
            done = boot_with_power(root, CLOSURES[number], flush_every, left, seed)
            after = check(root)
            wanted = str(CLOSURES[number][-1].path)
            assert after == wanted if done is not None else after in {before, wanted}
            before = after
        boot_at_once(root, CLOSURES[0])
        assert check(root) == str(CLOSURES[0][-1].path)
        wipe(root)


def every_cut(number: int, flush_every: int, forgets: str = "", seeds: int = 3) -> Iterator[Path]:
    """Cut a boot into a system at each of its changes, number 0 being there before; yield each disk."""
    with tempfile.TemporaryDirectory() as directory:
        left = 0
        done = None
        while done is None:
            for seed in range(seeds):
                root = Path(directory) / f"{left}-{seed}"
                root.mkdir()
                if number:
                    boot_at_once(root, CLOSURES[0])
                done = boot_with_power(
                    root, CLOSURES[number], flush_every, left, 1000 * seed + left, forgets
                )
                yield root
                wipe(root)
            left += 1


@pytest.mark.parametrize(("number", "flush_every"), [(0, 2), (1, 9)])
def test_a_boot_cut_at_each_of_its_changes(number, flush_every):
    """The first boot of a disk, and an update."""
    systems = []
    wanted = CLOSURES[number]
    for root in every_cut(number, flush_every):
        systems.append(check(root))
        boot_at_once(root, wanted)
        assert check(root) == str(wanted[-1].path)
    assert len(systems) >= 120
    before = str(CLOSURES[0][-1].path) if number else None
    assert {before, str(wanted[-1].path)} == set(systems)


@pytest.mark.parametrize("forgets", ["sync", "fsync"])
def test_the_model_notices_a_disk_that_forgets(forgets):
    def bad(root):
        try:
            check(root)
        except (AssertionError, CalveError):  # CalveError: of a damaged registration
            return True
        return False

    assert any(bad(root) for root in every_cut(1, 9, forgets))
