"""Keyrings: what is written is read, what is signed tells documents apart, and no bytes break a reader."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from calve.cache.keyring import Document, effective
from calve.errors import CalveError, SignatureError
from calve.nix.signing import Keyring, PublicKey, SecretKey, Signature

ROOT = SecretKey.generate("root-1", bytes)
CHARS = st.characters(exclude_characters=" :", exclude_categories=("C", "Z"))
KEYS = st.builds(
    PublicKey, st.text(CHARS, min_size=1, max_size=9), st.binary(min_size=32, max_size=32)
)
FEW = st.builds(
    PublicKey, st.sampled_from("abc"), st.sampled_from([bytes([n]) * 32 for n in range(4)])
)
LISTS = st.lists(KEYS, max_size=4).map(tuple)
SIGNATURES = st.builds(Signature, st.just("x"), st.binary(min_size=64, max_size=64))
DOCUMENTS = st.builds(
    Document,
    st.integers(1, (1 << 63) - 1),
    LISTS,
    LISTS,
    st.lists(SIGNATURES, max_size=2).map(tuple),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


def content(made):
    return made.sequence, set(made.keys), set(made.revoked)


@settings(deadline=None, max_examples=100)
@given(DOCUMENTS)
def test_what_is_written_is_read(made):
    again = Document.parse(made.dump())
    assert content(again) == content(made)
    assert (again.signatures, again.signed_bytes) == (made.signatures, made.signed_bytes)
    again.signed(ROOT).verify(
        Keyring((ROOT.public, *(k for k in made.keys if k.key != ROOT.public.key)))
    )


@settings(deadline=None, max_examples=200)
@given(DOCUMENTS, DOCUMENTS)
def test_what_is_signed_tells_documents_apart(one, other):
    assert (one.signed_bytes == other.signed_bytes) == (content(one) == content(other))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_break_a_reader(data):
    with contextlib.suppress(CalveError):
        Document.parse(data)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["version", "sequence", "keys", "revoked", "signatures"]),
    JSON,
)
def test_no_field_breaks_a_reader(name, value):
    body = json.loads(Document(1).signed(ROOT).dump()) | {name: value}
    with contextlib.suppress(CalveError):
        Document.parse(json.dumps(body).encode())


@settings(deadline=None, max_examples=200)
@given(
    st.lists(FEW, min_size=1, max_size=3),
    st.lists(st.tuples(st.lists(FEW, max_size=3), st.lists(FEW, max_size=3)), max_size=3),
)
def test_revoked_wins(roots, lists):
    documents = [Document(1, tuple(keys), tuple(gone)) for keys, gone in lists]
    revoked = {key.key for one in documents for key in one.revoked}
    everything = {*roots, *(key for one in documents for key in one.keys)}
    wanted = {key for key in everything if key.key not in revoked}
    try:
        assert set(effective(Keyring(tuple(roots)), documents).keys) == wanted
    except SignatureError:
        assert not wanted
