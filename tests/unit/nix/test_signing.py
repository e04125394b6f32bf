from __future__ import annotations

import base64

import pytest

from calve.errors import DamagedError, SignatureError, UsageError
from calve.nix.signing import Keyring, PublicKey, SecretKey, Signature

KEY = SecretKey.generate("k-1", random=lambda n: bytes(range(n)))
OTHER = SecretKey.generate("other-1", random=bytes)


def test_text_there_and_back() -> None:
    assert SecretKey.parse(KEY.dump() + "\n") == KEY
    assert PublicKey.parse(f" {KEY.public.dump()}\n") == KEY.public
    made = KEY.sign(b"message")
    assert Signature.parse(made.dump()) == made
    assert KEY.dump().startswith("k-1:")
    assert len(base64.b64decode(KEY.dump().partition(":")[2])) == 64


def test_known_signature() -> None:
    """RFC 8032, test 2."""
    seed = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    key = SecretKey.generate("rfc", random=lambda n: seed)
    assert (
        key.public.key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    )
    assert key.sign(b"\x72").value.hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_generated_keys_differ() -> None:
    assert SecretKey.generate("a").secret != SecretKey.generate("a").secret


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a\n", "\x1b[31m", "a\0", "\udc80", "a\u202e"])
def test_names_that_a_key_cannot_have(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        SecretKey.generate(name)
    assert caught.value.hint


def test_the_secret_is_never_shown() -> None:
    text = KEY.dump().partition(":")[2]
    assert "secret" not in repr(KEY)
    for shown in (repr(KEY), str(KEY)):
        assert text[:12] not in shown
        assert repr(KEY.secret)[2:12] not in shown
    for wrong in (KEY.dump()[:-8], KEY.dump() + "AAAA", KEY.dump().replace(":", ":!")):
        with pytest.raises(UsageError) as caught:
            SecretKey.parse(wrong)
        assert text[4:16] not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k-1",
        "k-1:",
        ":AAAA",
        "k 1:AAAA",
        "k-1:====",
        "k-1:\u0663",
        "k-1:" + base64.b64encode(bytes(31)).decode(),
        "k-1:" + base64.b64encode(bytes(33)).decode(),
        "k-1:" + base64.b64encode(bytes(63)).decode(),
    ],
)
def test_what_is_no_key(text: str) -> None:
    for parse in (PublicKey.parse, SecretKey.parse):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert caught.value.hint
    with pytest.raises(DamagedError):
        Signature.parse(text)


def test_a_public_key_is_no_secret_key_and_the_reverse() -> None:
    with pytest.raises(UsageError, match="32 bytes instead of 64"):
        SecretKey.parse(KEY.public.dump())
    with pytest.raises(UsageError, match="64 bytes instead of 32"):
        PublicKey.parse(KEY.dump())


def test_halves_that_do_not_belong_together() -> None:
    mixed = base64.b64encode(KEY.secret[:32] + OTHER.secret[32:]).decode()
    with pytest.raises(UsageError, match="halves"):
        SecretKey.parse(f"k-1:{mixed}")


def test_keyring_names_the_key_that_signed() -> None:
    ring = Keyring.parse([OTHER.public.dump(), KEY.public.dump()])
    assert ring.verify(b"m", [KEY.sign(b"m")]) == "k-1"
    assert ring.verify(b"m", [OTHER.sign(b"m"), KEY.sign(b"m")]) == "other-1"


def test_keyring_skips_unknown_and_wrong_signatures() -> None:
    ring = Keyring((KEY.public,))
    unknown, wrong = OTHER.sign(b"m"), KEY.sign(b"something else")
    assert ring.verify(b"m", [unknown, wrong, KEY.sign(b"m")]) == "k-1"


def test_a_signature_counts_only_under_its_keys_name() -> None:
    ring = Keyring((KEY.public,))
    with pytest.raises(SignatureError, match="signed by other-1"):
        ring.verify(b"m", [Signature("other-1", KEY.sign(b"m").value)])


def test_a_key_that_was_replaced_under_its_name() -> None:
    renewed = SecretKey.generate("k-1")
    ring = Keyring((renewed.public, KEY.public))
    assert ring.verify(b"m", [KEY.sign(b"m")]) == "k-1"


def test_refusals_say_who_signed_and_who_is_trusted() -> None:
    ring = Keyring((KEY.public,))
    with pytest.raises(SignatureError) as caught:
        ring.verify(b"m", [OTHER.sign(b"m")], "some/place")
    assert "other-1" in caught.value.message
    assert "k-1" in (caught.value.hint or "")
    assert caught.value.place == "some/place"
    with pytest.raises(SignatureError, match="nobody"):
        ring.verify(b"m", [])
    with pytest.raises(SignatureError, match="signature of k-1 is wrong"):
        ring.verify(b"m", [OTHER.sign(b"m"), KEY.sign(b"n")])
    with pytest.raises(SignatureError) as caught:
        Keyring(()).verify(b"m", [KEY.sign(b"m")])
    assert "none" in (caught.value.hint or "")


def test_another_key_of_the_same_name_is_not_trusted() -> None:
    impostor = SecretKey.generate("k-1")
    with pytest.raises(SignatureError):
        Keyring((KEY.public,)).verify(b"m", [impostor.sign(b"m")])
