"""Changes of a keyring: the sequence, who may make them, and two who do at once."""

from __future__ import annotations

import pytest

from calve.cache.keyring import KEY, Document, read
from calve.cache.rekey import rekey
from calve.errors import ConflictError, SignatureError, UsageError, VerificationError
from calve.nix.signing import Keyring, PublicKey, SecretKey

ROOT, ROOT2, NEW, OLD = (
    SecretKey.generate(name) for name in ("root-1", "root-2", "new-1", "old-1")
)
ROOTS = Keyring((ROOT.public, ROOT2.public))


@pytest.fixture
def cache(memory):
    return memory()


def change(cache, **options):
    return rekey(cache, options.pop("roots", ROOTS), options.pop("signers", (ROOT,)), **options)


def test_from_nothing_to_a_second_key_to_the_first_revoked(cache):
    assert change(cache).document.sequence == 1
    assert change(cache, add=[OLD.public]).document.sequence == 2
    assert change(cache, add=[NEW.public]).changed
    done = change(cache, revoke=["old-1"])
    assert (done.document.sequence, done.document.keys) == (4, (NEW.public,))
    assert done.document.revoked == (OLD.public,)
    assert read(cache, ROOTS, seen=4) == done.document
    with pytest.raises(UsageError, match="revoked for ever"):
        change(cache, add=[OLD.public])


def test_what_is_already_so_is_not_written(cache):
    change(cache, add=[NEW.public])
    before = dict(cache.data)
    assert not change(cache, add=[NEW.public]).changed
    assert not change(cache).changed
    assert cache.data == before
    # Other root keys shall sign: that is a change.
    assert change(cache, signers=(ROOT, ROOT2)).document.sequence == 2


def test_a_dry_run_writes_nothing(cache):
    done = change(cache, add=[NEW.public], dry_run=True)
    assert (done.changed, done.document.sequence, cache.data) == (True, 1, {})


def test_who_may_sign(cache):
    with pytest.raises(UsageError, match="new-1 is not one of the root keys"):
        change(cache, signers=(NEW,))
    with pytest.raises(UsageError, match="root-1 cannot sign: it is revoked"):
        change(cache, revoke=[ROOT.public])
    done = change(cache, signers=(ROOT2,), revoke=["root-1"])
    done.document.verify(ROOTS)
    with pytest.raises(UsageError, match="root-1 cannot sign"):
        change(cache, add=[NEW.public])
    assert cache.count("put") == 1


def test_a_keyring_that_cannot_be_trusted_is_not_signed_over(cache):
    stranger = SecretKey.generate("stranger")
    cache.data[KEY] = Document(9).signed(stranger).dump()
    with pytest.raises(SignatureError):
        change(cache, add=[NEW.public])
    cache.data[KEY] = b"junk"
    with pytest.raises(VerificationError):
        change(cache, add=[NEW.public])


def test_no_key_left(cache):
    only = Keyring((ROOT.public,))
    with pytest.raises(UsageError, match="cannot sign"):
        change(cache, roots=only, revoke=["root-1"])


@pytest.mark.parametrize(("name", "words"), [("none", "no key has"), ("twin", "several keys have")])
def test_a_name_is_one_key_s(cache, name, words):
    change(cache, add=[PublicKey("twin", bytes(32)), PublicKey("twin", b"1" * 32)])
    with pytest.raises(UsageError, match=words):
        change(cache, revoke=[name])
    assert change(cache, revoke=[PublicKey("twin", bytes(32))]).changed


def test_two_at_once(cache):
    change(cache, add=[OLD.public])
    raced = []

    def before(method, key):
        if method == "put" and key == KEY and not raced:
            raced.append(1)
            change(cache, add=[NEW.public])

    cache.before = before
    with pytest.raises(ConflictError) as caught:
        change(cache, revoke=["old-1"])
    assert caught.value.exit_code == 6
    assert set(read(cache, ROOTS).keys) == {NEW.public, OLD.public}
    # Both begin one.
    del cache.data[KEY]
    raced.clear()
    with pytest.raises(ConflictError):
        change(cache, add=[OLD.public])


def test_our_own_write_whose_answer_was_lost(cache):
    put = cache.put

    def lost(*args, **options):
        assert put(*args, **options)
        return False

    cache.put = lost
    assert change(cache, add=[NEW.public]).changed


def test_a_keyring_that_was_lost_or_rolled_back(cache):
    change(cache, add=[OLD.public])
    with pytest.raises(VerificationError, match="is number 1: number 5 was seen") as caught:
        change(cache, add=[NEW.public], seen=5)
    assert "--sequence" in caught.value.hint
    with pytest.raises(UsageError, match="5 is not higher than 5"):
        change(cache, add=[NEW.public], seen=5, sequence=5)
    assert change(cache, add=[NEW.public], seen=5, sequence=6).document.sequence == 6
    del cache.data[KEY]
    with pytest.raises(VerificationError, match="is gone") as caught:
        change(cache, seen=6)
    assert caught.value.hint.startswith("--sequence 7 ")
    assert change(cache, seen=6, sequence=7).document == read(cache, ROOTS, seen=6)
    assert change(cache, seen=3).document.sequence == 7
