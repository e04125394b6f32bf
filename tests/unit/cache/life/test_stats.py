from __future__ import annotations

import datetime

import pytest

from calve.cache import manifest as manifests
from calve.cache.roots import Pending, Root, write_pending, write_root
from calve.cache.stats import USD_PER_GIB_MONTH, stats
from calve.clock import SystemClock


class Fixed(SystemClock):
    def __init__(self, now) -> None:
        self._now = now

    def now(self):
        return self._now


@pytest.fixture
def measure(life, now):
    """Return a function: days since everything was written in, stats out."""
    life.cache.now_s = now.timestamp
    life.cache.written = dict.fromkeys(life.cache.data, now.timestamp())

    def run(days: float = 2.0):
        clock = Fixed(now + datetime.timedelta(days=days))
        return stats(life.cache, clock=clock)

    return run


def test_roots_kinds_and_what_is_shared(life, measure) -> None:
    life.cache.calls.clear()
    found = measure()
    size = {path: len(life.cache.data[life.nar(path)]) for path in life.store.infos}
    one, two = found.roots
    assert (one.root.owner, one.root.name, one.toplevel) == ("web", "1", life.top)
    assert one.paths == two.paths == 3
    shared = size[life.lib] + size[life.tool]
    assert one.stored_bytes == shared + size[life.top]
    assert (one.own_bytes, one.shared_bytes) == (size[life.top], shared)
    assert (two.own_bytes, two.shared_bytes) == (size[life.new], shared)
    infos = life.store.infos
    assert two.nar_bytes == sum(infos[path].nar_size for path in (life.lib, life.tool, life.new))
    assert {kind: usage.objects for kind, usage in found.kinds.items()} == {
        "manifests": 2, "nar": 4, "narinfo": 4, "other": 1, "roots": 2,
    }  # fmt: skip
    assert found.kinds["nar"].size_bytes == sum(size.values())
    assert found.total.objects == len(life.cache.data)
    assert found.total.size_bytes == sum(map(len, life.cache.data.values()))
    assert found.unreferenced.objects == 0
    assert found.usd_per_month == found.total.size_bytes / 2**30 * USD_PER_GIB_MONTH
    # One listing, each root, each manifest; no narinfo and no NAR.
    assert life.cache.count("list") == 1
    assert life.cache.count("get") == 2 + 2
    assert len(life.cache.calls) == 5


def test_what_a_collection_could_remove(life, measure) -> None:
    before = len(life.cache.data)
    del life.cache.data["roots/web/2.json"]
    life.cache.data["nar/left-over.nar.zst"] = b"123"
    life.cache.data["fleets/web/1.json"] = b"release"
    found = measure()
    keys = [
        life.nar(life.new),
        f"{life.new.digest}.narinfo",
        manifests.key(life.digest_new),
        "nar/left-over.nar.zst",
    ]
    assert found.unreferenced.objects == 4
    assert found.unreferenced.size_bytes == sum(len(life.cache.data[key]) for key in keys)
    assert found.kinds["fleets"].objects == 1
    assert found.total.objects == before + 1
    # Its manifest is younger than the grace: what it names may be about to get a root.
    assert measure(days=0.5).unreferenced.size_bytes == 3


def test_two_roots_of_one_manifest_own_nothing(life, measure, now) -> None:
    write_root(life.cache, Root("pin", "keep", life.digest, now))
    pin, one, two = measure().roots
    assert pin.stored_bytes == one.stored_bytes
    assert pin.own_bytes == one.own_bytes == 0
    assert two.own_bytes > 0


def test_pushes_under_way_keep_what_they_name(life, measure, now) -> None:
    extra = life.store.add("extra", b"extra")
    life.send(extra)
    assert measure().unreferenced.objects == 2
    infos = [life.store.infos[extra]]
    day = 86_400.0
    pending = Pending.of("p1", infos, now=now, lasts_s=3 * day, previous=life.digest)
    write_pending(life.cache, pending)
    assert measure().unreferenced.objects == 0
    assert measure().kinds["pending"].objects == 1
    assert measure(days=4).unreferenced.objects == 2
    del life.cache.data["roots/web/1.json"]
    assert measure().unreferenced.objects == 0  # its previous manifest


def test_a_nar_that_lies_elsewhere_than_its_manifest_says(life, measure) -> None:
    url = life.nar(life.lib)
    moved = url.replace(".nar.zst", "-gc1.nar.zst")
    life.cache.data[moved] = life.cache.data.pop(url) + b"more"
    found = measure()
    assert found.unreferenced.objects == 0
    assert found.roots[0].shared_bytes == sum(
        len(life.cache.data[key]) for key in (moved, life.nar(life.tool))
    )


@pytest.mark.parametrize("damage", ["root", "manifest", "manifest gone", "pending"])
def test_what_cannot_be_read_is_told_and_nothing_is_called_unreferenced(
    life, measure, damage
) -> None:
    key = manifests.key(life.digest)
    data = life.cache.data
    if damage == "root":
        data["roots/web/1.json"] = b"{"
    elif damage == "manifest":
        data[key] = data[key][:-9]
    elif damage == "manifest gone":
        del data[key]
    else:
        data["pending/x.json"] = b"{"
    found = measure()
    assert found.unreferenced is None
    if damage != "pending":
        assert found.roots[0].problem
        assert found.roots[0].stored_bytes == 0
    assert found.roots[1].own_bytes > 0


def test_an_empty_cache(memory) -> None:
    found = stats(memory())
    assert (found.roots, found.total.objects, found.unreferenced.objects) == ((), 0, 0)
