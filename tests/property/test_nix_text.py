"""Hashes, store paths, narinfos and registrations: there and back; garbage is damage and nothing else."""

from __future__ import annotations

import contextlib

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calve.errors import DamagedError
from calve.nix import registration
from calve.nix.hashes import ALPHABET, SIZES_BYTES, Hash, compress, decode32, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey, Signature
from calve.nix.storepath import StorePath, fixed_output

DIGESTS = st.text(ALPHABET, min_size=32, max_size=32)
NAME_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-._?="
PATHS = st.builds(
    StorePath,
    DIGESTS,
    st.text(NAME_LETTERS, min_size=1, max_size=40).filter(lambda name: name[0] != "."),
)
HASHES = st.builds(Hash, st.just("sha256"), st.binary(min_size=32, max_size=32))
SIGNATURES = st.builds(
    Signature,
    st.text("abc-.1", min_size=1, max_size=8),
    st.binary(min_size=64, max_size=64),
)
LINE = st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]), max_size=20)
FILLED = LINE.filter(bool)
SIZES = st.integers(1, 2**63 - 1)
INFOS = st.builds(
    PathInfo,
    path=PATHS,
    nar_hash=HASHES,
    nar_size=SIZES,
    references=st.sets(PATHS, max_size=4).map(lambda found: tuple(sorted(found))),
    deriver=st.none() | PATHS,
    signatures=st.lists(SIGNATURES, max_size=3).map(tuple),
    ca=st.none() | st.builds("{}{}".format, st.sampled_from(["text:", "fixed:r:"]), HASHES),
)
KNOWN = {
    "StorePath", "URL", "Compression", "FileHash", "FileSize", "NarHash", "NarSize",
    "References", "Deriver", "Sig", "CA",
}  # fmt: skip
EXTRA = st.tuples(FILLED.filter(lambda key: ":" not in key and key not in KNOWN), LINE)
NARINFOS = st.builds(
    NarInfo,
    info=INFOS,
    url=FILLED,
    compression=FILLED,
    file_hash=st.none() | HASHES,
    file_size=st.none() | SIZES,
    extra=st.lists(EXTRA, max_size=3).map(tuple),
)


@settings(deadline=None)
@given(data=st.binary(max_size=70))
def test_base_32(data: bytes) -> None:
    text = encode32(data)
    assert set(text) <= set(ALPHABET)
    assert decode32(text) == data


@settings(deadline=None)
@given(text=st.text(ALPHABET, max_size=60) | st.text(max_size=60))
def test_base_32_is_read_only_as_it_is_written(text: str) -> None:
    try:
        data = decode32(text)
    except DamagedError:
        return
    assert encode32(data) == text


@settings(deadline=None)
@given(name=st.sampled_from(sorted(SIZES_BYTES)), data=st.data())
def test_hashes_in_every_form(name: str, data: st.DataObject) -> None:
    size = SIZES_BYTES[name]
    value = Hash(name, data.draw(st.binary(min_size=size, max_size=size)))
    assert Hash.parse(value.nix32) == Hash.parse(value.hex) == Hash.parse(value.sri) == value


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(max_size=80)
    | st.from_regex(r"(sha256|sha1|md5)[:-][0-9a-zA-Z+/=]{20,70}", fullmatch=True)
)
def test_garbage_hashes(text: str) -> None:
    try:
        value = Hash.parse(text)
    except DamagedError:
        return
    assert text.lower() in {value.nix32, value.hex} or text.replace(":", "-") == value.sri


@settings(deadline=None)
@given(data=st.binary(max_size=100), size=st.integers(1, 40))
def test_compress(data: bytes, size: int) -> None:
    folded = compress(data, size)
    assert len(folded) == size
    assert compress(data + bytes(size), size) == folded


@settings(deadline=None)
@given(path=PATHS)
def test_store_paths(path: StorePath) -> None:
    assert StorePath.parse(str(path)) == StorePath.from_basename(path.basename) == path


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(max_size=60)
    | st.text(NAME_LETTERS + "/\n ", max_size=60).map("/nix/store/".__add__)
)
def test_garbage_store_paths(text: str) -> None:
    try:
        path = StorePath.parse(text)
    except DamagedError:
        return
    assert str(path) == text


@settings(deadline=None, max_examples=50)
@given(first=PATHS, second=PATHS, value=HASHES)
def test_order_of_references_does_not_matter(
    first: StorePath, second: StorePath, value: Hash
) -> None:
    one = fixed_output("x", value, [first, second])
    assert one == fixed_output("x", value, [second, first])
    assume(first != second)
    assert one != fixed_output("x", value, [first])


@settings(deadline=None, max_examples=200)
@given(narinfo=NARINFOS)
def test_narinfo_there_and_back(narinfo: NarInfo) -> None:
    data = narinfo.dump()
    assert NarInfo.parse(data) == narinfo
    assert NarInfo.parse(data).dump() == data


@settings(deadline=None, max_examples=300)
@given(narinfo=NARINFOS, data=st.data())
def test_damaged_narinfos(narinfo: NarInfo, data: st.DataObject) -> None:
    """Cut, with a byte changed, or a line twice: DamagedError, or a narinfo that can be written."""
    whole = narinfo.dump()
    lines = whole.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] = data.draw(st.integers(0, 255))
    for text in (whole[:at], bytes(changed), whole + data.draw(st.sampled_from(lines))):
        try:
            parsed = NarInfo.parse(text)
        except DamagedError:
            continue
        assert NarInfo.parse(parsed.dump()) == parsed


LINES = st.lists(
    st.tuples(st.sampled_from(sorted(KNOWN)) | LINE, LINE).map(": ".join),
    max_size=8,
).map(lambda lines: "".join(line + "\n" for line in lines).encode())


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=300) | LINES)
def test_garbage_narinfos(data: bytes) -> None:
    with contextlib.suppress(DamagedError):
        NarInfo.parse(data)


@settings(deadline=None, max_examples=100)
@given(infos=st.lists(INFOS, max_size=4))
def test_registration_there_and_back(infos: list[PathInfo]) -> None:
    data = b"".join(registration.dump(infos))
    parsed = registration.parse(data)
    assert b"".join(registration.dump(parsed)) == data
    assert [info.fingerprint for info in parsed] == [info.fingerprint for info in infos]


@settings(deadline=None, max_examples=200)
@given(infos=st.lists(INFOS, min_size=1, max_size=3), data=st.data())
def test_damaged_registrations(infos: list[PathInfo], data: st.DataObject) -> None:
    whole = b"".join(registration.dump(infos))
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] = data.draw(st.integers(0, 255))
    for text in (whole[:at], bytes(changed), data.draw(st.binary(max_size=100))):
        with contextlib.suppress(DamagedError):
            registration.parse(text)


KEY = SecretKey.generate("k-1", random=bytes)


@settings(deadline=None, max_examples=100)
@given(info=INFOS, other=INFOS)
def test_signatures_hold_for_their_facts_only(info: PathInfo, other: PathInfo) -> None:
    signed = info.signed(KEY)
    assert Keyring((KEY.public,)).verify(info.fingerprint, signed.signatures) == "k-1"
    (made,) = [signature for signature in signed.signatures if signature.name == "k-1"]
    assert KEY.public.verifies(other.fingerprint, made) == (info.fingerprint == other.fingerprint)
