"""What a user has seen of keyrings, in files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from calve.cache.keyring import KEY, Document
from calve.cache.sequences import Sequences, directory, remember, trusted
from calve.errors import CalveError, UsageError, VerificationError
from calve.nix.signing import Keyring, SecretKey

ROOT = SecretKey.generate("root-1")
ROOTS = Keyring((ROOT.public,))


@pytest.fixture
def memory_of(tmp_path):
    return Sequences(tmp_path / "state/calve/keyrings")


def test_where_they_are(monkeypatch):
    assert directory({"XDG_STATE_HOME": "/s"}) == Path("/s/calve/keyrings")
    monkeypatch.setenv("HOME", "/home/me")
    for given in ({}, {"XDG_STATE_HOME": ""}, {"XDG_STATE_HOME": "relative"}):
        assert directory(given) == Path("/home/me/.local/state/calve/keyrings")


def test_the_highest_is_kept_for_its_owner_alone(memory_of, tmp_path):
    assert memory_of.load("s3://one") == 0
    for sequence in (3, 2, 3):
        memory_of.save("s3://one", sequence)
    assert (memory_of.load("s3://one"), memory_of.load("s3://two")) == (3, 0)
    (file,) = (tmp_path / "state/calve/keyrings").iterdir()
    assert file.name == hashlib.sha256(b"s3://one").hexdigest() + ".json"
    assert json.loads(file.read_text()) == {"version": 1, "cache": "s3://one", "sequence": 3}
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * 20_000, b'{"version": 1, "sequence": -1}'])
def test_a_damaged_file_is_not_overlooked(memory_of, data):
    memory_of.save("s3://one", 3)
    file = memory_of._file("s3://one")
    file.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        memory_of.load("s3://one")
    assert caught.value.place == str(file)
    with pytest.raises(UsageError):
        memory_of.save("s3://one", 4)


def test_a_file_that_cannot_be_read(memory_of):
    memory_of._file("s3://one").mkdir(parents=True)
    with pytest.raises(CalveError, match="cannot be read"):
        memory_of.load("s3://one")


def test_pulls_remember_and_refuse_to_go_back(memory, memory_of):
    cache = memory()
    cache.data[KEY] = Document(4).signed(ROOT).dump()
    assert trusted([cache], ROOTS, sequences=memory_of).keyring == ROOTS
    assert memory_of.load(cache.url) == 4
    cache.data[KEY] = Document(3).signed(ROOT).dump()
    with pytest.raises(VerificationError):
        trusted([cache], ROOTS, sequences=memory_of)
    assert memory_of.load(cache.url) == 4


def test_nothing_is_written_where_there_is_no_keyring_or_no_home(memory, memory_of, tmp_path):
    trusted([memory()], ROOTS, sequences=memory_of)
    assert not list(tmp_path.iterdir())
    cache = memory()
    cache.data[KEY] = Document(4).signed(ROOT).dump()
    nowhere = Sequences(Path("/dev/null/calve"))
    assert trusted([cache], ROOTS, sequences=nowhere).sequences == {cache.url: 4}
    remember(nowhere, {"x": 1})
