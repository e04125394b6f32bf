"""EROFS images: what goes in comes out, in whatever order it came, generation after generation."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.disk.extents import merged
from calve.disk.layout import Layout
from calve.nix import nar

_spec = importlib.util.spec_from_file_location(
    "erofsimage", Path(__file__).with_name("erofsimage.py")
)
erofsimage = importlib.util.module_from_spec(_spec)
sys.modules["erofsimage"] = erofsimage
_spec.loader.exec_module(erofsimage)
Store, contents, overlay = erofsimage.Store, erofsimage.contents, erofsimage.overlay

GROUP = 512 * 1024
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([4031, 4032, 4063, 4064, 4065, 4095, 4096, 4097, 8191, 8192, 8193, 12256]),
    st.integers(0, 40_000),
)
NAMES = st.one_of(
    st.binary(min_size=1, max_size=12), st.sampled_from([b"n" * 255, b"!", b"-", b"..a", b"\xff"])
).filter(nar.check_name)
CONTENTS = st.builds(
    lambda size, seed: random.Random(seed).randbytes(size), SIZES, st.integers(0, 3)
)
TARGETS = st.one_of(
    st.text("abc/.", min_size=1, max_size=30),
    st.sampled_from(["t" * 4063, "t" * 4064, "t" * 4065, "t" * 4095]),
)
LEAVES = st.one_of(CONTENTS, st.tuples(st.just("x"), CONTENTS), TARGETS)
TREES = st.recursive(
    LEAVES, lambda children: st.dictionaries(NAMES, children, max_size=6), max_leaves=15
)


def store_of(trees):
    store = Store()
    paths = []
    for number, tree in enumerate(trees):
        paths.append(store.add(f"p{number}", tree, paths[-2:]))
    system = store.add("system", {b"init": ("x", b"#!")}, paths)
    return store, system


@settings(deadline=None, max_examples=60)
@given(trees=st.lists(TREES, max_size=5), step=st.sampled_from([1 << 18, 4096, 1000]))
def test_what_goes_in_comes_out(trees, step):
    store, system = store_of(trees)
    with tempfile.TemporaryDirectory() as top:
        out = Path(top) / "image"
        layout, writer = store.build(out, system, step=step)
        image = out.read_bytes()
        assert os.listdir(top) == ["image"]
    assert contents(image) == store.expected(system)
    assert len(image) == layout.size_bytes
    assert len(image) % GROUP == 0
    assert layout.dead_bytes == 0
    assert len(merged(layout.live)) == 1
    assert writer.dirty == set(range(len(image) // GROUP))
    assert Layout.parse(layout.dump()) == layout


@settings(deadline=None, max_examples=40)
@given(
    before=st.lists(TREES, max_size=4),
    after=st.lists(TREES, max_size=4),
    kept=st.integers(0, 4),
    shuffle=st.integers(0, 99),
)
def test_a_generation_is_its_closure_whatever_the_parent_was(before, after, kept, shuffle):
    old, first = store_of(before)
    new, second = store_of([*before[:kept], *after])
    with tempfile.TemporaryDirectory() as top:
        one, two = Path(top) / "1", Path(top) / "2"
        parent, _ = old.build(one, first)
        child, writer = new.build(two, second, parent, shuffle=shuffle)
        whole = overlay(one.read_bytes(), two, writer.written)
        parsed, again = new.build(two, second, Layout.parse(parent.dump()), shuffle=shuffle + 1)
        assert overlay(one.read_bytes(), two, again.written) == whole
    assert contents(whole) == new.expected(second)
    assert parsed == child
    assert again.written == writer.written
    assert child.uuid == parent.uuid
    for path in set(child.paths) & set(parent.paths):
        assert child.paths[path] == parent.paths[path]
    for digest in set(child.data) & set(parent.data):
        assert child.data[digest] == parent.data[digest]


def system_of(store, paths, number=1):
    return store.add(f"system-{number}", {b"init": ("x", b"#!%d" % number)}, paths)


def random_tree(source, size):
    """Make a package of about so many bytes: a few large files, many small ones."""
    tree = {}
    while size > 0:
        most = size if source.random() < 0.1 else min(size, 40_000)
        part = source.randrange(1, most + 1)
        folder = tree.setdefault(b"d%d" % source.randrange(5), {})
        folder[b"f%d" % len(folder)] = source.randbytes(part)
        size -= part
    return tree


@pytest.fixture(scope="module")
def world():
    """Return a store of some 24 MB and its paths, leaves first."""
    source = random.Random(7)
    store, paths = Store(), []
    for number in range(60):
        size = 416_000 if number in {20, 21} else source.randrange(20_000, 700_000)
        paths.append(store.add(f"p{number}", random_tree(source, size), paths[:1]))
    return store, paths


def changed(world, tmp_path, make):
    """Build a system and another; return the groups of 512 KiB that differ, and all that the second has."""
    store, paths = world
    first = system_of(store, paths)
    second = system_of(store, make(store, list(paths)), 2)
    parent, _ = store.build(tmp_path / "1", first)
    child, writer = store.build(tmp_path / "2", second, parent)
    before = (tmp_path / "1").read_bytes()
    whole = overlay(before, tmp_path / "2", writer.written)
    assert contents(whole) == store.expected(second)
    before = before.ljust(len(whole), b"\0")
    differing = {
        at // GROUP
        for at in range(0, len(whole), GROUP)
        if whole[at : at + GROUP] != before[at : at + GROUP]
    }
    assert differing <= writer.dirty
    assert len(whole) // GROUP >= 40
    return writer.dirty, child, parent


def test_b_a_path_is_rebuilt(world, tmp_path):
    def make(store, paths):
        paths[20] = store.add("p20", random_tree(random.Random(20), 416_000), paths[:1])
        return paths

    dirty, _, _ = changed(world, tmp_path, make)
    assert len(dirty) <= 4


def test_c_a_path_is_added(world, tmp_path):
    def make(store, paths):
        return [*paths, store.add("new", random_tree(random.Random(21), 416_000))]

    dirty, child, parent = changed(world, tmp_path, make)
    assert len(dirty) <= 3
    assert child.blocks - parent.blocks <= 2 * GROUP // 4096


def test_all_by_which_an_image_grew_is_its_own(world, tmp_path):
    store, paths = world
    parent, _ = store.build(tmp_path / "1", system_of(store, paths))
    new = store.add("new", random_tree(random.Random(22), 1_500_000))
    child, writer = store.build(tmp_path / "2", system_of(store, [*paths, new], 2), parent)
    assert child.blocks > parent.blocks
    assert writer.written[-1].end == child.blocks
    assert set(range(parent.blocks // 128, child.blocks // 128)) <= writer.dirty


def test_d_a_path_is_rebuilt_with_those_that_refer_to_it(world, tmp_path):
    fresh = 0

    def make(store, paths):
        nonlocal fresh
        rebuilt = [30, 31, 32, 33, 34, 35]
        for number in rebuilt:
            tree = dict(store.trees[paths[number]])
            if number == 30:
                tree = random_tree(random.Random(30), 3_000_000)
            tree[b"marker"] = b"rebuilt %d" % number  # content of their files stays
            path = store.add(f"p{number}", tree, paths[:1])
            fresh += store.infos[path].nar_size if number == 30 else 0
            paths[number] = path
        return paths

    dirty, child, parent = changed(world, tmp_path, make)
    assert len(dirty) <= 2 * fresh // GROUP + 3
    kept = set(child.data) & set(parent.data)
    assert len(kept) > 0.8 * len(child.data)


def test_no_change_but_the_system(world, tmp_path):
    dirty, child, parent = changed(world, tmp_path, lambda _store, paths: paths)
    assert len(dirty) <= 2
    assert child.blocks == parent.blocks


def test_blocks_of_a_path_that_left_are_dead_until_they_are_used(world, tmp_path):
    store, paths = world
    first, second = system_of(store, paths), system_of(store, paths[:40], 2)
    parent, _ = store.build(tmp_path / "1", first)
    child, writer = store.build(tmp_path / "2", second, parent)
    whole = overlay((tmp_path / "1").read_bytes(), tmp_path / "2", writer.written)
    assert contents(whole) == store.expected(second)
    assert child.blocks == parent.blocks
    assert child.dead_bytes > 2_000_000
    assert child.wants_rebase
    grand, _ = store.build(tmp_path / "3", first, child)
    assert grand.blocks == parent.blocks
    assert grand.dead_bytes < child.dead_bytes / 4
    # What is neither an object nor dead is zeros.
    held = sorted([*child.live, *child.dead])
    at = 0
    for extent in held:
        assert not any(whole[at * 4096 : extent.address * 4096])
        at = extent.end
    assert not any(whole[at * 4096 :])


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
import erofsimage, random
from pathlib import Path
store = erofsimage.Store()
source = random.Random(3)
paths = [store.add(f"p{n}", {b"f%d" % k: source.randbytes(source.randrange(9000)) for k in range(9)}) for n in range(30)]
system = store.add("system", b"top", paths)
layout, _ = store.build(Path(sys.argv[2]), system, shuffle=int(sys.argv[3]))
sys.stdout.buffer.write(layout.dump())
"""


def test_another_process_and_another_order_give_the_same_bytes(tmp_path):
    outputs = []
    for number in (1, 2):
        env = {**os.environ, "PYTHONHASHSEED": str(number)}
        argv = [
            sys.executable,
            "-c",
            BUILD,
            str(Path(__file__).parent),
            str(tmp_path / "i"),
            str(number),
        ]
        layout = subprocess.run(argv, env=env, check=True, stdout=subprocess.PIPE).stdout
        outputs.append((layout, hashlib.sha256((tmp_path / "i").read_bytes()).hexdigest()))
    assert outputs[0] == outputs[1]


class Lineage:
    """Generations of an image, each onto the one before; rebased when it wants to be."""

    def __init__(self, folder, store):
        self.folder = folder
        self.store = store
        self.layout = None
        self.bytes = b""
        self.rebases = 0

    def advance(self, system):
        """Build the next image, hold it against its closure, and return how many groups it had anew."""
        if self.layout is not None and self.layout.wants_rebase:
            self.layout, self.bytes = None, b""
            self.rebases += 1
        self.layout, writer = self.store.build(self.folder / "image", system, self.layout)
        self.bytes = overlay(self.bytes, self.folder / "image", writer.written)
        assert contents(self.bytes) == self.store.expected(system)
        assert Layout.parse(self.layout.dump()) == self.layout
        return len(writer.dirty)


def generations(tmp_path, *, count, paths, most_bytes):
    """Rewrite one to three paths, so many times; each keeps about its size."""
    source = random.Random(2026)
    store, sizes, current = Store(), [], []
    for number in range(paths):
        sizes.append(int(min(most_bytes, most_bytes * 0.02 * source.paretovariate(0.8))))
        current.append(store.add(f"p{number}", random_tree(source, sizes[-1])))
    lineage = Lineage(tmp_path, store)
    lineage.advance(system_of(store, current, 0))
    first = lineage.layout.blocks
    dirty, least = [], []
    for number in range(1, count + 1):
        fresh = 0
        for at in source.sample(range(paths), source.randint(1, 3)):
            size = int(sizes[at] * source.uniform(0.95, 1.05))
            del store.trees[current[at]]
            current[at] = store.add(f"p{at}", random_tree(source, size))
            fresh += size
        dirty.append(lineage.advance(system_of(store, current, number)))
        least.append(fresh / GROUP)
    return lineage, first, dirty, least


def test_generations(tmp_path):
    lineage, first, dirty, least = generations(tmp_path, count=25, paths=50, most_bytes=1_500_000)
    assert lineage.layout.blocks <= 1.1 * first
    assert all(found <= 2 * wanted + 6 for found, wanted in zip(dirty, least, strict=True))
    assert lineage.rebases == 0


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_hundred_generations(tmp_path):
    lineage, first, dirty, least = generations(tmp_path, count=100, paths=90, most_bytes=25_000_000)
    assert lineage.layout.blocks <= 1.05 * first
    assert all(found <= 2 * wanted + 6 for found, wanted in zip(dirty, least, strict=True))
    assert lineage.rebases == 0
