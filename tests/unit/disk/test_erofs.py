"""The EROFS writer: its edges, its contract as a sink, what fails, and what Linux says of an image."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from calve.cache.directory import DirectoryObjects
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.disk import erofs as erofs_module
from calve.disk import scratch as scratch_module
from calve.disk.erofs import DIRECTORIES, Writer
from calve.disk.erofsformat import inode, inode_bytes
from calve.disk.intake import Blocks
from calve.disk.outfile import replacing
from calve.errors import (
    CalveError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SpaceError,
    UsageError,
    VerificationError,
)
from calve.nix.hashes import Hash
from calve.nix.nar import Directory, End, File, Symlink
from calve.nix.signing import Keyring, SecretKey
from calve.nix.store import LocalStore
from calve.nix.walk import checked, walk

_spec = importlib.util.spec_from_file_location(
    "erofsimage", Path(__file__).parents[2] / "property" / "erofsimage.py"
)
erofsimage = importlib.util.module_from_spec(_spec)
sys.modules["erofsimage"] = erofsimage
_spec.loader.exec_module(erofsimage)
Store, Reader, contents = erofsimage.Store, erofsimage.Reader, erofsimage.contents


def bytes_of(count, seed=0):
    return random.Random(seed).randbytes(count)


SIZES = [0, 1, 4031, 4032, 4033, 4063, 4064, 4065, 4095, 4096, 4097, 8160, 8161, 12_288, 70_000]
EDGES = {
    b"sizes": {b"%d" % size: bytes_of(size, size) for size in SIZES},
    b"programs": {b"%d" % size: ("x", bytes_of(size, size + 1)) for size in SIZES},
    b"links": {b"%d" % size: "t" * size for size in (1, 100, 4063, 4064, 4065, 4095)},
    b"names": dict.fromkeys((b"n" * 255, b"!", b"-", b"..a", b" ", b"\xff\xfe"), b"x"),
    b"empty": {},
    b"wide": {b"%05d" % number + b"w" * 250: b"%d" % number for number in range(300)},
    b"deep": {b"d": {b"d": {b"d": {b"d": {b"f": b"deep"}}}}},
    b"twins": {b"a": bytes_of(9000), b"b": bytes_of(9000), b"c": bytes_of(8192)},
}


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def system(store):
    file = store.add("file", b"a file")
    program = store.add("program", ("x", bytes_of(5000)), [file])
    link = store.add("link", "/elsewhere")
    edges = store.add("edges", EDGES)
    return store.add("system", {b"init": ("x", b"#!")}, [file, program, link, edges])


def test_every_kind_and_size(store, system, tmp_path):
    layout, _ = store.build(tmp_path / "image", system)
    image = (tmp_path / "image").read_bytes()
    assert contents(image) == store.expected(system)
    reader = Reader(image)
    directories = {path for path, (mode, _) in reader.tree().items() if mode == 0o40755}
    assert {f"/{name}" for name in DIRECTORIES} | {
        "",
        "/nix",
        "/nix/var/nix/profiles",
    } <= directories
    assert reader.uuid == layout.uuid
    # Equal blocks are there once, whoever has them.
    assert max(reader.extents.values()) >= 3
    kinds = {path.name: placed.kind for path, placed in layout.paths.items()}
    assert kinds == {"file": 1, "program": 1, "link": 7, "edges": 2, "system": 2}


def names_of(total):
    """Return names with which a directory's entries have so many bytes, `.` and `..` included."""
    left = total - 13 - 14
    count = left // 112
    names = [b"%02d" % number + b"n" * 98 for number in range(count - 1)]
    return [*names, b"z" * (left - 112 * (count - 1) - 12)]


def test_directories_at_the_edge_of_a_block(store, tmp_path):
    totals = [*range(4060, 4069), *range(4090, 4100), *range(8188, 8196)]
    tree = {b"%d" % total: dict.fromkeys(names_of(total), b"") for total in totals}
    system = store.add("system", tree)
    store.build(tmp_path / "image", system)
    image = (tmp_path / "image").read_bytes()
    assert contents(image) == store.expected(system)
    reader = Reader(image)
    reader.tree()
    inline = [reader.inode(nid)[5] for nid in reader.seen]
    assert max(map(len, inline)) == 4064


def test_meta_objects_are_packed(store, tmp_path):
    source = random.Random(5)
    tree = {b"%d" % number: source.randbytes(source.randrange(1, 4000)) for number in range(2000)}
    system = store.add("system", tree)
    layout, _ = store.build(tmp_path / "image", system)
    used = sum(len(content) + 32 for content in tree.values())
    assert layout.paths[system].meta.blocks * 4096 <= 1.06 * used


def test_directories_are_the_callers(store, system, tmp_path):
    layout, _ = store.build(tmp_path / "i", system, directories=["nix/.rw", "a/b/c", "a"])
    tree = Reader((tmp_path / "i").read_bytes()).tree()
    found = {path for path, (mode, _) in tree.items() if mode == 0o40755}
    assert {"/a", "/a/b", "/a/b/c", "/nix/.rw"} <= found
    assert "/proc" not in found
    assert layout.header_used < layout.header_blocks == 128
    for name in ("", "/", "../x", "a/../b", "x" * 256):
        with pytest.raises(UsageError, match="name of a directory"):
            Writer(tmp_path / "j", directories=[name])
    for name in ("nix-path-registration", "nix/store/x", "/nix/var/nix/profiles", "nix//store"):
        with pytest.raises(UsageError, match="own"):
            Writer(tmp_path / "j", directories=[name])
    assert os.listdir(tmp_path) == ["i"]


def test_a_large_inode():
    assert inode_bytes((1 << 32) - 1, 65535) == 32
    for size, links in ((1 << 32, 1), (0, 1 << 16)):
        assert inode_bytes(size, links) == 64
        image = inode(0o100444, size, links, inline=False, number=7).ljust(4096, b"\0")
        reader = Reader.__new__(Reader)
        reader.image, reader.meta, reader.extents, reader.seen = image, 0, {}, {}
        if not size:
            assert reader.inode(0)[:3] == (0o100444, size, links)
        assert int.from_bytes(image[8:16], "little") == size
        assert image[0] & 1 == 1


def test_more_directories_in_one_than_an_inode_can_count(store, tmp_path):
    system = store.add("system", {b"%d" % number: {} for number in range(65_600)})
    layout, _ = store.build(tmp_path / "image", system)
    assert contents((tmp_path / "image").read_bytes()) == store.expected(system)
    assert layout.paths[system].inodes == 65_601


def test_the_header_of_many_paths(store, tmp_path):
    few = store.add("few", b"few")
    parent, _ = store.build(tmp_path / "1", few)
    names = [f"{number:04d}-" + "n" * 200 for number in range(2300)]
    paths = [store.add(name, name.encode()) for name in names]
    nearly = store.add("nearly", b"", paths[:1900])
    child, _ = store.build(tmp_path / "2", nearly, parent)
    assert not parent.wants_rebase
    assert child.wants_rebase
    many = store.add("many", b"", paths)
    with pytest.raises(SpaceError, match="header needs") as caught:
        store.build(tmp_path / "3", many, child)
    assert "without a parent" in caught.value.hint
    anew, _ = store.build(tmp_path / "3", many)
    assert contents((tmp_path / "3").read_bytes()) == store.expected(many)
    assert anew.header_blocks == 256
    assert not anew.wants_rebase
    # A header that shrinks leaves nothing behind.
    less, writer = store.build(tmp_path / "4", store.add("less", b"", paths[:9]), anew)
    assert less.header_used < anew.header_used == writer.written[0].end


def events(*more):
    return iter([Directory(b""), *more, End()])


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [Directory(b"")],
        [End()],
        [b"bytes"],
        [*events(), Symlink(b"", b"x")],
        [*events(File(b"f", 5, executable=False), b"123456")],
        [*events(File(b"f", 5, executable=False), b"1234")],
        [*events(File(b"..", 0, executable=False))],
        [*events(Directory(b"a/b"), End())],
        [*events(Symlink(b"x", b""))],
        [*events(Symlink(b"x", b"a"), Symlink(b"x", b"b"))],
        [*events(File(b"f", 0, executable=False), b"1")],
    ],
)
def test_events_that_make_no_tree(store, tmp_path, bad):
    path = store.add("path", {b"f": b"right"})
    with Writer(tmp_path / "image") as writer:
        with pytest.raises(DamagedError) as caught:
            writer.stage(store.infos[path], iter(bad))
        assert caught.value.place is not None
        with pytest.raises(CalveError, match="without being staged"):
            writer.commit([store.infos[path]])
        writer.stage(store.infos[path], erofsimage.events_of(store.trees[path]))
        writer.commit([store.infos[path]])
        writer.finish(path)
    assert contents((tmp_path / "image").read_bytes()) == store.expected(path)


def test_the_contract_of_a_sink(store, system, tmp_path):
    infos = store.closure(system)
    parent, _ = store.build(tmp_path / "1", infos[0].path)
    with Writer(tmp_path / "2", parent) as writer:
        paths = [info.path for info in infos]
        assert writer.missing(reversed(paths)) == paths[:0:-1]
        assert writer.adopt(infos) == set()
        last = infos[-1]
        with pytest.raises(CalveError, match="without being staged"):
            writer.commit([last])
        writer.stage(last, erofsimage.events_of(store.trees[last.path]))
        with pytest.raises(DamagedError, match="which is missing"):
            writer.commit([last])
        assert last.path in writer.missing([last.path])
        writer.discard(last.path)
        writer.discard(last.path)
        with pytest.raises(CalveError, match="without being staged"):
            writer.commit(infos)
        other = erofsimage.PathInfo(infos[0].path, Hash.sha256(b"other"), 200)
        with pytest.raises(VerificationError, match="another hash"):
            writer.commit([other])
        writer.flush()
        with pytest.raises(NotFoundError, match="lacks it"):
            writer.finish(system)
    assert os.listdir(tmp_path) == ["1"]


def test_what_is_there_is_not_staged_again(store, tmp_path):
    shared = {b"%d" % number: bytes_of(200_000, number) for number in range(10)}
    first = store.add("first", shared)
    second = store.add("second", {**shared, b"twice": shared})
    parent, _ = store.build(tmp_path / "1", first)
    used = []
    for paths, layout in (((first,), None), ((first, second), None), ((second,), parent)):
        with Writer(tmp_path / "2", layout) as writer:
            for path in paths:
                writer.stage(store.infos[path], erofsimage.events_of(store.trees[path]))
            used.append(writer._scratch.reserve(0))
    assert used[0] > 2_000_000
    assert used[1] < used[0] + 200_000
    assert used[2] < 200_000


def test_what_is_not_of_the_systems_closure_is_left_out(store, system, tmp_path):
    extra = store.add("extra", {b"big": bytes_of(50_000, 9)})
    with Writer(tmp_path / "image") as writer:
        batch = [*store.closure(system), store.infos[extra]]
        for info in batch:
            writer.stage(info, erofsimage.events_of(store.trees[info.path]))
        writer.commit(batch)
        layout = writer.finish(system)
    alone, _ = store.build(tmp_path / "alone", system)
    assert alone == layout
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "image").read_bytes()


def test_threads_give_the_same_bytes(store, tmp_path):
    source = random.Random(8)
    shared = bytes_of(30_000, 1)
    paths = [
        store.add(f"p{number}", {b"shared": shared, b"own": source.randbytes(20_000)})
        for number in range(40)
    ]
    system = store.add("system", b"", paths)
    infos = store.closure(system)
    with Writer(tmp_path / "1") as writer:
        todo = list(infos)

        def work():
            while todo:
                try:
                    info = todo.pop()
                except IndexError:
                    return
                writer.stage(info, erofsimage.events_of(store.trees[info.path], step=7000))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.commit(infos)
        layout = writer.finish(system)
    assert layout == store.build(tmp_path / "2", system)[0]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_file_system_on_which_the_kernel_does_not_copy(store, system, tmp_path, monkeypatch):
    store.build(tmp_path / "1", system)

    def refuse(*_args):
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(scratch_module.os, "copy_file_range", refuse)
    store.build(tmp_path / "2", system)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_what_is_copied_at_once_lies_together_on_both_sides():
    pieces = [(0, 2, 10), (8192, 1, 12), (12_288, 3, 20), (24_576, 1, 23), (40_960, 1, 24)]
    runs = erofs_module._runs((Blocks(at, count), to) for at, count, to in pieces)
    assert list(runs) == [(0, 3, 10), (12_288, 4, 20), (40_960, 1, 24)]
    assert list(erofs_module._runs([])) == []


def test_short_writes_are_taken_up(store, system, tmp_path, monkeypatch):
    store.build(tmp_path / "1", system)
    write, read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, bytes(data)[:3000], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read(fd, min(size, 3000), at))
    store.build(tmp_path / "2", system)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("after", [0, 3, 7, 12])
def test_a_full_disk(store, system, tmp_path, monkeypatch, after):
    write, count = os.pwrite, 0

    def fail(fd, data, at):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(SpaceError, match="No space left") as caught:
        store.build(tmp_path / "image", system)
    assert "twice" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_not_there(store, system, tmp_path):
    with pytest.raises(CalveError, match="cannot write"):
        store.build(tmp_path / "no" / "image", system)


KILLED = """
import sys, os, signal
sys.path.insert(0, sys.argv[1])
import erofsimage
from calve.disk.erofs import Writer
from pathlib import Path
from calve.disk import erofs
store = erofsimage.Store()
system = store.add("system", {b"f": bytes(100_000)})
if sys.argv[3] == "finish":
    erofs.superblock = lambda **_: os.kill(os.getpid(), signal.SIGKILL)
else:
    Writer.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.build(Path(sys.argv[2]), system)
"""


@pytest.mark.parametrize("when", ["commit", "finish"])
def test_a_killed_run_leaves_no_image_and_the_next_one_all(store, system, tmp_path, when):
    (tmp_path / "image").write_bytes(b"the one before")
    argv = [sys.executable, "-c", KILLED, erofsimage.__file__.rpartition("/")[0]]
    done = subprocess.run([*argv, str(tmp_path / "image"), when])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "image").read_bytes() == b"the one before"
    assert set(os.listdir(tmp_path)) <= {"image", ".image.new"}
    store.build(tmp_path / "image", system)
    assert os.listdir(tmp_path) == ["image"]
    assert contents((tmp_path / "image").read_bytes()) == store.expected(system)


def test_two_runs_do_not_write_the_same_image(store, system, tmp_path):
    with replacing(tmp_path / "image", 4096):
        with pytest.raises(ConflictError, match="another run"):
            store.build(tmp_path / "image", system)
        assert os.listdir(tmp_path) == [".image.new"]
    assert (tmp_path / "image").read_bytes() == bytes(4096)
    (tmp_path / ".image.new").write_bytes(b"x" * 600_000)  # a killed run's
    store.build(tmp_path / "image", system)
    store.build(tmp_path / "other", system)
    assert (tmp_path / "image").read_bytes() == (tmp_path / "other").read_bytes()


def test_memory_is_bounded_whatever_the_files_are(store, tmp_path):
    chunk = bytes_of(1 << 18)
    large = store.infos[store.add("large", b"")]
    small = store.infos[store.add("small", {})]
    system = store.infos[store.add("system", b"", [large.path, small.path])]

    def many():
        yield Directory(b"")
        for number in range(6000):
            yield File(b"%06d" % number, 4000, executable=False)
            yield chunk[number : number + 4000]
        yield End()

    def one():
        yield File(b"", 256 << 18, executable=False)
        for _ in range(256):
            yield chunk

    with Writer(tmp_path / "image") as writer:
        tracemalloc.start()
        try:
            writer.stage(large, one())
            writer.stage(small, many())
            writer.stage(system, erofsimage.events_of(b""))
            writer.commit([large, small, system])
            layout = writer.finish(system.path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert layout.size_bytes > 88_000_000
    assert peak < 10_000_000


def test_from_a_local_store_and_from_a_cache(tmp_path):
    from calve.demo.imports import Importer

    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "f").write_bytes(bytes_of(10_000))
    (tree / "l").symlink_to("d/f")
    (tree / "p").write_bytes(b"#!")
    (tree / "p").chmod(0o755)
    key = SecretKey.generate("test-1")
    with LocalStore(tmp_path / "store", create=True) as store:
        importer = Importer(store)
        first = importer.add(tree, "first")
        system = importer.add(tree / "d", "system", [first])
        importer.flush()
        cache = DirectoryObjects(tmp_path / "cache")
        push(store, [system], cache, key)
        infos = store.closure([system])
        with Writer(tmp_path / "1") as writer:
            for info in infos:
                writer.stage(info, checked(walk(store.real(info.path)), info))
            writer.commit(infos)
            layout = writer.finish(system)
    with Writer(tmp_path / "2") as writer:
        pull(plan([cache], [system], writer, Keyring((key.public,))), writer)
        assert writer.finish(system) == layout
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with Writer(tmp_path / "3", layout) as writer:
        again = plan([cache], [system], writer, Keyring((key.public,)))
        assert (again.missing, again.present) == ((), 2) or not again.missing
        assert writer.finish(system) == layout
        assert writer.dirty == {0}


# Linux


@pytest.fixture
def mounted(tmp_path):
    """Mount an image through a loop device."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(image):
        argv = ["mount", "-t", "erofs", "-o", "loop,ro", str(image), str(place)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            known = "erofs" in Path("/proc/filesystems").read_text()
            if known and os.path.exists("/dev/loop-control"):
                pytest.fail(done.stderr)
            pytest.skip(f"no EROFS or no loop devices here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def seen(top):
    """Return what a mounted file system shows, as `contents` does; all is root's, and of 1 s after the epoch."""
    found = {}
    for directory, folders, files in os.walk(os.fsencode(top)):
        for name in [b".", *folders, *files]:
            full = directory if name == b"." else os.path.join(directory, name)
            status = os.lstat(full)
            assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (0, 0, 10**9)
            link = os.path.islink(full)
            if os.path.isdir(full) and not link:
                content = None
                assert len(os.listdir(full)) == len(set(os.listdir(full)))
            else:
                content = os.readlink(full) if link else Path(os.fsdecode(full)).read_bytes()
                assert status.st_nlink == 1
                assert status.st_size == len(content)
            place = os.fsdecode(full[len(os.fsencode(top)) :])
            found[place] = (status.st_mode, content)
    return {
        path: (mode, content)
        for path, (mode, content) in found.items()
        if mode != 0o40755 and path != "/nix/store"
    }


def test_linux_reads_it(store, system, tmp_path, mounted):
    store.build(tmp_path / "image", system)
    assert seen(mounted(tmp_path / "image")) == store.expected(system)


def test_linux_reads_an_image_onto_its_parent(store, system, tmp_path, mounted):
    parent, _ = store.build(tmp_path / "1", system)
    changed = store.add("changed", {**EDGES, b"more": bytes_of(123_456, 77)})
    second = store.add("system", b"2", [changed, *store.infos[system].references[:2]])
    _, writer = store.build(tmp_path / "2", second, parent)
    before = (tmp_path / "1").read_bytes()
    (tmp_path / "3").write_bytes(erofsimage.overlay(before, tmp_path / "2", writer.written))
    assert seen(mounted(tmp_path / "3")) == store.expected(second)


def test_erofs_utils_find_no_fault(store, system, tmp_path):
    fsck = shutil.which("fsck.erofs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if fsck is None:
        pytest.skip("erofs-utils are not installed")
    store.build(tmp_path / "image", system)
    done = subprocess.run([fsck, str(tmp_path / "image")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_linux_reads_a_file_of_more_than_4_gib(store, tmp_path, mounted):
    block = bytes_of(1 << 18)
    size = (4 << 30) + 12_345
    system = store.infos[store.add("system", b"")]

    def large():
        yield File(b"", size, executable=False)
        for _ in range(size >> 18):
            yield block
        yield block[: size % (1 << 18)]

    with Writer(tmp_path / "image") as writer:
        writer.stage(system, large())
        writer.commit([system])
        writer.finish(system.path)
    place = Path(f"{mounted(tmp_path / 'image')}{system.path}")
    assert place.stat().st_size == size
    with place.open("rb") as file:
        for at in (0, 2 << 30, (4 << 30) - (1 << 18), 4 << 30):
            file.seek(at)
            assert file.read(1 << 18) == block[: min(1 << 18, size - at)]
