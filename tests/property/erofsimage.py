"""EROFS images for tests: trees and closures to build them of, and a reader that shares no code with the writer.

Of the reader's source: Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux. It is strict: what a
kernel would accept and no writer should write is an error too.
"""

from __future__ import annotations

import hashlib
import random
import stat
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from calve.disk.erofs import Writer
from calve.nix import nar, registration
from calve.nix.closure import closure
from calve.nix.hashes import Hash, encode32
from calve.nix.nar import Directory, End, File, Symlink
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

# A tree is bytes (a file), ("x", bytes) (a program), str (a symlink) or a dict of them by name.


def events_of(tree, name=b"", step=1 << 18):
    if isinstance(tree, dict):
        yield Directory(name)
        for child in sorted(tree):
            yield from events_of(tree[child], child, step)
        yield End()
    elif isinstance(tree, str):
        yield Symlink(name, tree.encode())
    else:
        content = tree if isinstance(tree, bytes) else tree[1]
        yield File(name, len(content), isinstance(tree, tuple))
        for at in range(0, len(content), step):
            yield content[at : at + step]


def flat(tree, place=""):
    """Return a tree as {path: (mode, content)}, as the kernel would show it."""
    if isinstance(tree, dict):
        found = {place: (stat.S_IFDIR | 0o555, None)}
        for name, child in tree.items():
            found |= flat(child, f"{place}/{name.decode('utf-8', 'surrogateescape')}")
        return found
    if isinstance(tree, str):
        return {place: (stat.S_IFLNK | 0o777, tree.encode())}
    if isinstance(tree, tuple):
        return {place: (stat.S_IFREG | 0o555, tree[1])}
    return {place: (stat.S_IFREG | 0o444, tree)}


@dataclass
class Store:
    """Store paths in memory."""

    infos: dict[StorePath, PathInfo] = field(default_factory=dict)
    trees: dict[StorePath, object] = field(default_factory=dict)

    def add(self, name, tree, references=()):
        digest = hashlib.sha256()
        size = nar.emit(events_of(tree), digest.update)
        named = f"{name} {sorted(references)}".encode()
        made = hashlib.sha256(named + digest.digest()).digest()[:20]
        path = StorePath(encode32(made), name)
        self.trees[path] = tree
        nar_hash = Hash("sha256", digest.digest())
        self.infos[path] = PathInfo(path, nar_hash, size, tuple(sorted(references)))
        return path

    def closure(self, system):
        return closure([system], self.infos.__getitem__)

    def build(self, out, system, parent=None, *, shuffle=None, step=1 << 18, **options):
        """Build an image as a pull would; return its layout, and the writer, closed."""
        infos = self.closure(system)
        with Writer(out, parent, **options) as writer:
            missing = set(writer.missing(info.path for info in infos))
            batch = [info for info in infos if info.path in missing]
            if shuffle is not None:
                random.Random(shuffle).shuffle(batch)
            for info in batch:
                writer.stage(info, events_of(self.trees[info.path], step=step))
            writer.commit(batch)
            return writer.finish(system), writer

    def expected(self, system):
        """Return what an image's store and profile must show."""
        infos = sorted(self.closure(system), key=lambda info: info.path)
        found = {
            "/nix-path-registration": (stat.S_IFREG | 0o444, b"".join(registration.dump(infos))),
            "/nix/var/nix/profiles/system": (stat.S_IFLNK | 0o777, b"system-1-link"),
            "/nix/var/nix/profiles/system-1-link": (stat.S_IFLNK | 0o777, str(system).encode()),
        }
        for info in infos:
            found |= flat(self.trees[info.path], str(info.path))
        return found


def overlay(parent, image, written):
    """Return the whole image that a sparse one makes of its parent's bytes."""
    own = Path(image).read_bytes()
    whole = bytearray(parent.ljust(len(own), b"\0"))
    for extent in written:
        place = slice(extent.address * 4096, extent.end * 4096)
        whole[place] = own[place]
    return bytes(whole)


def contents(image):
    """Return {path: (mode, content)} of an image's bytes, less the header's directories."""
    found = Reader(image).tree()
    return {
        path: (mode, content)
        for path, (mode, content) in found.items()
        if not (stat.S_ISDIR(mode) and stat.S_IMODE(mode) == 0o755) and path != "/nix/store"
    }


def castagnoli(data):
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 * (value & 1))
    return value


def u(data, at, size):
    return int.from_bytes(data[at : at + size], "little")


class Reader:
    """An image's bytes."""

    def __init__(self, image):
        self.image = image
        head = image[1024:4096]
        assert u(head, 0, 4) == 0xE0F5E1E2
        assert u(head, 8, 4) == 1
        assert castagnoli(head[:4] + bytes(4) + head[8:]) == u(head, 4, 4)
        assert head[12] == 12
        assert u(head, 0x50, 4) == 0  # no feature that a kernel must know
        assert not any(head[0x54:])
        assert not any(image[:1024])
        self.inodes = u(head, 16, 8)
        self.seconds = u(head, 24, 8)
        assert u(head, 36, 4) * 4096 == len(image)
        self.meta = u(head, 40, 4) * 4096
        self.uuid = bytes(head[48:64])
        self.root = u(head, 14, 2)
        self.extents = {}  # (first block, blocks) -> how many inodes refer to them
        self.seen = {}

    def tree(self):
        found = {}
        self._walk(self.root, "", self.root, found)
        assert len(self.seen) == self.inodes
        self._check_extents()
        return found

    def _check_extents(self):
        end = 0
        for first, count in sorted(self.extents):
            assert first >= end, "two contents share some of their blocks, and not all"
            end = first + count
        taken = sorted((nid * 32, nid * 32 + size) for nid, size in self.seen.items())
        for (_, before), (after, _) in pairwise(taken):
            assert before <= after
        for start, _ in taken:
            block = start // 4096
            assert not any(first <= block < first + count for first, count in self.extents)

    def inode(self, nid):
        at = self.meta + nid * 32
        form = u(self.image, at, 2)
        assert u(self.image, at + 2, 2) == 0  # no extended attributes
        mode = u(self.image, at + 4, 2)
        layout = form >> 1
        assert layout in {0, 2}
        if form & 1:
            size, links, head = u(self.image, at + 8, 8), u(self.image, at + 44, 4), 64
            assert u(self.image, at + 24, 8) == 0
            assert u(self.image, at + 32, 8) == 1
            assert u(self.image, at + 40, 4) == 0
            assert size >= 1 << 32 or links >= 1 << 16
        else:
            size, links, head = u(self.image, at + 8, 4), u(self.image, at + 6, 2), 32
            assert u(self.image, at + 24, 4) == 0
            assert self.seconds == 1
        assert at // 4096 == (at + head - 1) // 4096
        whole = size // 4096 if layout == 2 else -(-size // 4096)
        first = u(self.image, at + 16, 4)
        tail = b""
        if layout == 2:
            tail = self.image[at + head : at + head + size % 4096]
            assert tail
            assert at // 4096 == (at + head + len(tail) - 1) // 4096
        if whole:
            assert first > 0
            assert (first + whole) * 4096 <= len(self.image)
            self.extents[first, whole] = self.extents.get((first, whole), 0) + 1
        else:
            assert first == 0
        self.seen[nid] = head + len(tail)
        return mode, size, links, first, whole, tail

    def _content(self, size, first, whole, tail):
        body = self.image[first * 4096 : (first + whole) * 4096]
        if not tail:
            assert not any(body[size:])
        return bytes((body + tail)[:size])

    def _walk(self, nid, place, parent, found):
        assert nid not in self.seen, "a hard link"
        mode, size, links, first, whole, tail = self.inode(nid)
        content = self._content(size, first, whole, tail)
        found[place] = (mode, None if stat.S_ISDIR(mode) else content)
        if not stat.S_ISDIR(mode):
            assert links == 1
            return
        names = []
        below = 0
        for at in range(0, size, 4096):
            for name, child, kind in self._block(content[at : at + 4096]):
                names.append(name)
                if name in {b".", b".."}:
                    assert (child, kind) == (nid if name == b"." else parent, 2)
                    continue
                path = f"{place}/{name.decode('utf-8', 'surrogateescape')}"
                self._walk(child, path, nid, found)
                assert kind == {0o10: 1, 0o4: 2, 0o12: 7}[found[path][0] >> 12]
                below += kind == 2
        assert names == sorted(set(names))
        assert {b".", b".."} <= set(names)
        assert links == 2 + below

    @staticmethod
    def _block(block):
        count, odd = divmod(u(block, 8, 2), 12)
        assert odd == 0
        assert count > 0
        starts = [u(block, 12 * n + 8, 2) for n in range(count)]
        for n, start in enumerate(starts):
            end = starts[n + 1] if n + 1 < count else len(block)
            name = bytes(block[start:end])
            if n + 1 == count:
                name = name.rstrip(b"\0")
            assert 0 < len(name) <= 255
            assert block[12 * n + 11] == 0
            yield name, u(block, 12 * n, 8), block[12 * n + 10]
