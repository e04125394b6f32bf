"""Layouts: there and back, and what damage does."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from calve.disk.extents import Extent
from calve.disk.layout import Layout, PlacedPath
from calve.errors import CalveError, DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

A, B = StorePath("a" * 32, "a"), StorePath("b" * 32, "b")
DIGESTS = [bytes([number]) * 32 for number in range(4)]


def placed(path, meta, data=(), references=(), **more):
    info = PathInfo(path, Hash.sha256(b"nar"), 400, references, **more)
    return PlacedPath(info, 2, 3, meta, data)


@pytest.fixture
def layout():
    return Layout(
        uuid=bytes(range(16)),
        system=B,
        blocks=512,
        header_blocks=128,
        header_used=5,
        registration=DIGESTS[2],
        dead=(Extent(140, 10), Extent(400, 1)),
        data={
            DIGESTS[0]: Extent(200, 50),
            DIGESTS[1]: Extent(129, 1),
            DIGESTS[2]: Extent(150, 5),
        },
        paths={
            A: placed(
                A, Extent(128, 1), (DIGESTS[0], DIGESTS[1]), deriver=StorePath("d" * 32, "x.drv")
            ),
            B: placed(B, Extent(160, 2), (DIGESTS[0],), (A, B)),
        },
    )


def test_there_and_back(layout):
    text = layout.dump()
    assert Layout.parse(text) == layout
    assert Layout.parse(text).dump() == text
    assert text.isascii()
    assert text.count(b"\n") == 1
    inline = dataclasses.replace(
        layout, registration=None, data={d: layout.data[d] for d in DIGESTS[:2]}
    )
    assert Layout.parse(inline.dump()) == inline


def test_what_it_says_of_its_image(layout):
    assert layout.size_bytes == 2 << 20
    assert layout.dead_bytes == 11 * 4096
    assert layout.live == sorted(
        [Extent(0, 128), Extent(128, 1), Extent(160, 2), *layout.data.values()]
    )


def test_a_rebase_is_wanted_where_a_tenth_is_dead_or_the_header_nearly_full(layout):
    assert not layout.wants_rebase
    for dead, wanted in ((51, False), (52, True)):
        changed = dataclasses.replace(layout, dead=(Extent(300, dead),))
        assert changed.wants_rebase == wanted
    for used, wanted in ((115, False), (116, True)):
        assert dataclasses.replace(layout, header_used=used).wants_rebase == wanted


def test_what_dies(layout):
    assert layout.successor_dead([Extent(0, 128), Extent(128, 1), Extent(145, 20)]) == (
        Extent(129, 1),
        Extent(140, 5),
        Extent(200, 50),
        Extent(400, 1),
    )


def test_unknown_fields_are_ignored(layout):
    document = json.loads(layout.dump())
    document["more"] = {"x": 1}
    document["paths"][0]["more"] = []
    assert Layout.parse(json.dumps(document).encode()) == layout


def altered(layout, *keys, value):
    document = json.loads(layout.dump())
    place = document
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("uuid",), "00", "uuid"),
        (("uuid",), None, "uuid is not a text"),
        (("system",), "a", "system"),
        (("system",), "c" * 32 + "-c", "lacks its system"),
        (("blocks",), 249, "behind its image"),
        (("blocks",), 513, "513 blocks are not"),
        (("blocks",), 1 << 32, "blocks are not"),
        (("headerBlocks",), 127, "127 blocks are not"),
        (("blocks",), -1, "blocks is not a size"),
        (("blocks",), True, "blocks is not a size"),
        (("metaBlock",), 1, "metaBlock is not 0"),
        (("headerUsed",), 129, "behind its image or header"),
        (("headerBlocks",), 129, "two objects at block 128"),
        (("registration",), "33" * 32, "nothing refers to, or lacks"),
        (("dead", 0), [150, 1], "two objects at block 150"),
        (("dead", 0), [130], "not .address, blocks."),
        (("dead", 0), [130, 0], "not .address, blocks."),
        (("dead", 0), [True, True], "not .address, blocks."),
        (("dead",), 7, "dead is not a list"),
        (("data", 0), ["00", 129, 1], "digest"),
        (("data", 0), [129, 1], "not .digest"),
        (("data", 1), ["01" * 32, 300, 1], "an object twice"),
        (("data", 1, 1), 160, "two objects at block 160"),
        (("data", 1, 1), 1 << 40, "not .address, blocks."),
        (("paths", 0), 1, "not a JSON object"),
        (("paths", 0, "path"), "x", "path"),
        (("paths", 0, "path"), B.basename, "an object twice"),
        (("paths", 0, "narHash"), "md5:" + "0" * 32, "narHash"),
        (("paths", 0, "narSize"), 0, "narSize"),
        (("paths", 0, "kind"), 3, "kind"),
        (("paths", 0, "inodes"), "3", "inodes"),
        (("paths", 0, "inodes"), 0, "0 inodes in 1 blocks"),
        (("paths", 0, "inodes"), 129, "129 inodes in 1 blocks"),
        (("paths", 0, "meta"), [127, 1], "two objects"),
        (("paths", 0, "data"), [2], "nothing refers to"),
        (("paths", 0, "data"), [3], "does not have"),
        (("paths", 0, "data"), [-1], "does not have"),
        (("paths", 0, "references"), ["c" * 32 + "-c"], "lacks /nix/store/c"),
        (("paths", 0, "references"), [1], "references is not a list of texts"),
        (("paths", 0, "deriver"), "y", "deriver"),
    ],
)
def test_damage_names_its_place(layout, keys, value, message):
    # Without the change it would be read.
    assert Layout.parse(json.dumps(json.loads(layout.dump())).encode()) == layout
    with pytest.raises(DamagedError, match=message) as caught:
        Layout.parse(altered(layout, *keys, value=value), "image.json")
    assert str(caught.value.place).startswith("image.json")


def test_another_version_is_refused(layout):
    with pytest.raises(UsageError, match="version 2"):
        Layout.parse(altered(layout, "version", value=2))
    with pytest.raises(DamagedError, match="version"):
        Layout.parse(altered(layout, "version", value=None))


def test_no_damage_ends_in_a_traceback(layout):
    source = random.Random(1)
    text = layout.dump()
    for _ in range(600):
        data = bytearray(text)
        for _ in range(source.randint(1, 3)):
            data[source.randrange(len(data))] = source.choice(b'0123456789abcdef"[]{},:-ntrue \xff')
        if source.random() < 0.2:
            del data[source.randrange(len(data)) :]
        try:
            Layout.parse(bytes(data))
        except CalveError as error:
            assert error.place is not None
    for text in (b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"version": 1}'):
        with pytest.raises(DamagedError):
            Layout.parse(text)
