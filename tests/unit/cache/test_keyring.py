"""The keyring of a cache: what it says, who may say it, and what is made of a wrong one."""

from __future__ import annotations

import json

import pytest

from calve.cache import keyring
from calve.cache.keyring import KEY, MAX_BYTES, Document, effective, read, trusted
from calve.errors import (
    AccessError,
    DamagedError,
    NotFoundError,
    SignatureError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix.signing import Keyring, PublicKey, SecretKey

ROOT, ROOT2, NEW, OLD = (
    SecretKey.generate(name) for name in ("root-1", "root-2", "new-1", "old-1")
)
ROOTS = Keyring((ROOT.public, ROOT2.public))


def document(sequence=1, add=(), revoke=(), signers=(ROOT,)):
    keys = tuple(key.public for key in add)
    gone = tuple(key.public for key in revoke)
    return Document(sequence, keys, gone).signed(*signers)


def names(ring):
    return [key.name for key in ring.keys]


@pytest.fixture
def cache(memory):
    return memory()


def put(cache, made):
    cache.data[KEY] = made if isinstance(made, bytes) else made.dump()
    return cache


# The format


def test_it_is_written_as_it_is_documented():
    root = SecretKey.generate("root", bytes)
    made = Document(7, (PublicKey("b", bytes(32)), PublicKey("a", bytes(32))), ()).signed(root)
    zeros = "A" * 43 + "="
    assert made.signed_bytes == f"calve-keyring-1;7\nkey a:{zeros}\nkey b:{zeros}\n".encode()
    assert json.loads(made.dump()) == {
        "version": 1,
        "sequence": 7,
        "keys": [f"a:{zeros}", f"b:{zeros}"],
        "revoked": [],
        "signatures": [root.sign(made.signed_bytes).dump()],
    }
    gone = Document(7, (), (PublicKey("a", bytes(32)),))
    assert gone.signed_bytes == f"calve-keyring-1;7\nrevoked a:{zeros}\n".encode()


def test_golden_version_1():
    """A document of version 1, as it was once written: it is read for ever."""
    data = (
        b'{"version":1,"sequence":2,"keys":["ci-1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="],'
        b'"revoked":["old-1:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="],"signatures":["root-1:'
    )
    root = SecretKey.generate("root-1", bytes)
    signed = (
        b"calve-keyring-1;2\n"
        b"key ci-1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n"
        b"revoked old-1:AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n"
    )
    data += root.sign(signed).dump().encode().partition(b":")[2] + b'"]}\n'
    made = Document.parse(data)
    assert made.verify(Keyring((root.public,))) == "root-1"
    assert made.dump() == data


def test_the_order_of_keys_and_what_is_not_known_change_nothing():
    made = document(add=(NEW, OLD))
    body = json.loads(made.dump())
    body["keys"] = [*reversed(body["keys"]), body["keys"][0]]
    body["roots"] = [NEW.public.dump()]
    again = Document.parse(json.dumps(body).encode())
    assert again == made
    again.verify(ROOTS)


@pytest.mark.parametrize("field", ["sequence", "keys", "revoked"])
def test_nothing_of_it_can_be_changed(field):
    body = json.loads(document(3, add=(NEW,), revoke=(OLD,)).dump())
    body[field] = 4 if field == "sequence" else []
    with pytest.raises(SignatureError, match="the signature of root-1 is wrong"):
        Document.parse(json.dumps(body).encode()).verify(ROOTS)


def test_an_added_key_is_not_a_revoked_one():
    made = document(add=(NEW,))
    body = json.loads(made.dump())
    body["keys"], body["revoked"] = body["revoked"], body["keys"]
    with pytest.raises(SignatureError):
        Document.parse(json.dumps(body).encode()).verify(ROOTS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence": 0}, "sequence is 0"),
        ({"sequence": "1"}, "sequence is not a size"),
        ({"sequence": 1 << 63}, "sequence is not a size"),
        ({"sequence": True}, "sequence is not a size"),
        ({"keys": None}, "keys is not a list"),
        ({"keys": ["x"]}, "keys: not a public key"),
        ({"keys": [ROOT.dump()]}, "keys: not a public key"),
        ({"revoked": [3]}, "revoked is not a list of texts"),
        ({"signatures": ["root:AAAA"]}, "signatures: not a signature"),
        ({"version": None}, "version"),
    ],
)
def test_damage_is_named(change, words):
    body = json.loads(document().dump()) | change
    with pytest.raises(DamagedError, match=words) as caught:
        Document.parse(json.dumps(body).encode(), "here")
    assert str(caught.value).startswith("here: ")
    assert ROOT.dump()[7:] not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{", b"[" * 9999, b" " * (MAX_BYTES + 1)])
def test_what_is_no_document(data):
    with pytest.raises(DamagedError):
        Document.parse(data)


def test_another_version_and_too_many_keys():
    body = json.loads(document().dump()) | {"version": 2}
    with pytest.raises(UsageError, match="version 2"):
        Document.parse(json.dumps(body).encode())
    many = tuple(PublicKey(f"key-{n}", n.to_bytes(32, "big")) for n in range(1500))
    with pytest.raises(UsageError, match="too large"):
        Document(1, many).dump()


# Who counts


def test_revoked_wins_over_added_and_over_roots():
    made = document(add=(NEW, OLD), revoke=(OLD, ROOT2))
    assert names(effective(ROOTS, [made])) == ["root-1", "new-1"]


def test_a_key_is_revoked_under_every_name():
    alias = PublicKey("alias", OLD.public.key)
    assert names(effective(Keyring((ROOT.public, alias)), [document(revoke=(OLD,))])) == ["root-1"]


def test_no_key_left_is_refused():
    with pytest.raises(SignatureError, match="every trusted key is revoked"):
        effective(ROOTS, [document(revoke=(ROOT, ROOT2))])
    with pytest.raises(SignatureError, match="no key is trusted"):
        effective(Keyring(()), [])


def test_a_root_key_signs_that_the_document_does_not_revoke():
    document(revoke=(ROOT,), signers=(ROOT, ROOT2)).verify(ROOTS)
    with pytest.raises(SignatureError):
        document(revoke=(ROOT,), signers=(ROOT,)).verify(ROOTS)
    with pytest.raises(SignatureError, match="no trusted key signed"):
        document(add=(NEW,), signers=(NEW,)).verify(ROOTS)  # an added key is no root key
    with pytest.raises(SignatureError, match="nobody"):
        document(signers=()).verify(ROOTS)


# Out of a cache


def test_a_cache_without_one_has_the_root_keys(cache):
    assert read(cache, ROOTS) is None
    assert trusted([cache], ROOTS).keyring == ROOTS
    assert cache.keys("get") == [KEY, KEY]
    assert trusted([cache], ROOTS).sequences == {}


def test_one_request_for_each_cache(memory):
    caches = [put(memory("mem://1"), document(4, add=(NEW,))), memory("mem://2")]
    found = trusted(caches, ROOTS)
    assert names(found.keyring) == ["root-1", "root-2", "new-1"]
    assert found.sequences == {"mem://1": 4}
    assert found.caches == tuple(caches)
    assert [cache.calls for cache in caches] == [[("get", KEY)]] * 2


def test_an_older_one_or_none_after_one_is_refused(cache):
    put(cache, document(4))
    assert read(cache, ROOTS, seen=4).sequence == 4
    assert trusted([cache], ROOTS, {cache.url: 3}).sequences == {cache.url: 4}
    with pytest.raises(VerificationError, match="is number 4: number 5 was seen before") as caught:
        read(cache, ROOTS, seen=5)
    assert caught.value.place == f"mem://one/{KEY}"
    del cache.data[KEY]
    with pytest.raises(VerificationError, match="is gone: number 4 was seen before"):
        trusted([cache], ROOTS, {cache.url: 4})
    assert read(cache, ROOTS) is None


def test_what_was_seen_of_another_cache_counts_for_it_alone(memory):
    found = trusted([put(memory("mem://1"), document(2))], ROOTS, {"mem://2": 9})
    assert found.sequences == {"mem://1": 2, "mem://2": 9}


def raising(cache, error):
    def before(_method, _key):
        raise error

    cache.before = before
    return cache


def denied(code):
    error = AccessError("denied")
    error.service_code = code
    return error


def test_denied_is_missing_where_it_is_how_s3_says_so(cache):
    assert read(raising(cache, denied("AccessDenied")), ROOTS) is None
    assert read(raising(cache, denied("")), ROOTS) is None
    with pytest.raises(VerificationError, match="is gone"):
        read(cache, ROOTS, seen=1)
    for code in ("ExpiredToken", "SignatureDoesNotMatch", "RequestTimeTooSkewed"):
        with pytest.raises(AccessError):
            read(raising(cache, denied(code)), ROOTS)
    local = AccessError("Permission denied")
    local.__cause__ = PermissionError()
    with pytest.raises(AccessError):
        read(raising(cache, local), ROOTS)


@pytest.mark.parametrize("error", [TransientError("x"), denied("ExpiredToken")])
def test_nothing_is_taken_from_a_cache_that_cannot_say(memory, error):
    bad = raising(memory("mem://bad"), error)
    good = put(memory("mem://good"), document(1, add=(NEW,)))
    found = trusted([bad, good], ROOTS, {"mem://bad": 3})
    assert found.caches == (good,)
    assert found.sequences == {"mem://bad": 3, "mem://good": 1}
    with pytest.raises(type(error)):
        trusted([bad], ROOTS)


@pytest.mark.parametrize("data", [b"junk", document(signers=(NEW,)).dump()])
def test_a_bad_keyring_is_an_error_even_beside_a_good_one(memory, data):
    bad, good = put(memory("mem://bad"), data), put(memory("mem://good"), document())
    with pytest.raises(VerificationError, match=f"^mem://bad/{KEY}: "):
        trusted([bad, good], ROOTS)


def test_what_one_cache_revokes_counts_in_none(memory):
    one = put(memory("mem://1"), document(add=(OLD,)))
    two = put(memory("mem://2"), document(revoke=(OLD,)))
    found = trusted([one, two], ROOTS)
    assert names(found.keyring) == ["root-1", "root-2"]
    assert found.revoked == (OLD.public,)
    # Nor does a root key that another cache revokes still sign.
    put(two, document(revoke=(ROOT,), signers=(ROOT2,)))
    with pytest.raises(SignatureError):
        trusted([one, two], ROOTS)


def test_a_missing_cache_is_for_others_to_report(cache):
    from calve.cache.objects import MissingCacheError

    missing = raising(cache, MissingCacheError("no bucket"))
    assert trusted([missing], ROOTS, {cache.url: 2}).caches == (missing,)
    assert issubclass(MissingCacheError, NotFoundError)
    assert keyring.VERSION == 1
