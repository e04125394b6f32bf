"""Kernel modules: dependencies first, built-in ones left out, on a made-up tree."""

from __future__ import annotations

import pytest

from calve.disk import modules
from calve.errors import NotFoundError


@pytest.fixture
def tree(tmp_path):
    def add(path, *depends):
        place = tmp_path / "kernel" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        info = b"\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0vermagic=6.1\0"
        place.write_bytes(b"\x7fELF" + info)

    add("net/virtio_net.ko", "net_failover", "virtio-ring")
    add("net/net_failover.ko", "failover")
    add("net/failover.ko")
    add("virtio/virtio_ring.ko")
    add("block/virtio_blk.ko", "virtio_ring")
    add("fs/ext4.ko", "mbcache", "builtin_thing")
    add("fs/mbcache.ko")
    add("broken.ko", "gone")
    (tmp_path / "plain.ko").write_bytes(b"no section")
    (tmp_path / "modules.builtin").write_text("kernel/lib/builtin-thing.ko\nkernel/crc32c.ko\n")
    return tmp_path


def order(tree, *names, optional=()):
    return [path.stem for path in modules.load_order(tree, names, optional=optional)]


def test_dependencies_come_first_and_once(tree):
    found = order(tree, "virtio_net", "virtio_blk", "ext4")
    assert found == [
        "failover", "net_failover", "virtio_ring", "virtio_net", "virtio_blk", "mbcache", "ext4",
    ]  # fmt: skip
    assert all(path.is_file() for path in modules.load_order(tree, ["ext4"]))


def test_hyphens_and_underscores_are_alike(tree):
    assert order(tree, "virtio-ring") == order(tree, "virtio_ring") == ["virtio_ring"]


def test_what_is_built_in_is_not_loaded(tree):
    assert order(tree, "crc32c", "builtin-thing") == []


def test_optional_ones_may_be_absent(tree):
    assert order(tree, "plain", optional=("nowhere", "crc32c", "mbcache")) == ["plain", "mbcache"]


@pytest.mark.parametrize(("names", "missing"), [(("nowhere",), "nowhere"), (("broken",), "gone")])
def test_a_needed_one_that_is_absent(tree, names, missing):
    with pytest.raises(NotFoundError, match=missing) as caught:
        order(tree, *names)
    assert caught.value.place == str(tree)


def test_without_a_list_of_built_in_ones(tree):
    (tree / "modules.builtin").unlink()
    with pytest.raises(NotFoundError, match="builtin_thing"):
        order(tree, "ext4")
