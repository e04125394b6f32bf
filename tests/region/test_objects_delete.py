"""S3's DeleteObject with a condition and DeleteObjects, with boto3 and plain requests as clients."""

from __future__ import annotations

import base64
import hashlib

import botocore.exceptions
import pytest

from calve.region.signature import Allow

KEYS = "arn:aws:s3:::nix/*"


def refused(call, *args, **kwargs):
    """Return status and code of a call that must be refused."""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(*args, **kwargs)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def put(s3, key, body=b"content"):
    return s3.put_object(Bucket="nix", Key=key, Body=body)["ETag"]


def delete(s3, *objects, **options):
    """Delete (key, ETag or None) pairs; return the keys that were, and the codes of those that were not."""
    entries = [{"Key": key} | ({"ETag": tag} if tag else {}) for key, tag in objects]
    answer = s3.delete_objects(Bucket="nix", Delete={"Objects": entries, **options})
    deleted = [one["Key"] for one in answer.get("Deleted", [])]
    return deleted, {one["Key"]: one["Code"] for one in answer.get("Errors", [])}


# One


def test_a_conditional_delete(s3, service):
    old = put(s3, "k", b"old")
    tag = put(s3, "k", b"new")
    one = {"Bucket": "nix", "Key": "k"}
    assert refused(s3.delete_object, IfMatch=old, **one) == (412, "PreconditionFailed")
    assert service.bucket("nix").keys() == ["k"]
    s3.delete_object(IfMatch=tag, **one)
    assert service.bucket("nix").keys() == []
    for match in (tag, "*"):
        assert refused(s3.delete_object, IfMatch=match, **one) == (404, "NoSuchKey")
    put(s3, "k")
    s3.delete_object(IfMatch="*", **one)
    assert service.bucket("nix").keys() == []


def test_conditions_of_directory_buckets_are_refused(s3):
    put(s3, "k")
    assert refused(s3.delete_object, Bucket="nix", Key="k", IfMatchSize=7)[1] == "NotImplemented"


def test_whoever_may_not_read_may_not_judge(client_of, s3, principals, service):
    tag = put(s3, "k")
    user = client_of(principals.add_user("user", [Allow("s3:DeleteObject", KEYS)]))
    denied = (403, "AccessDenied")
    assert refused(user.delete_object, Bucket="nix", Key="k", IfMatch=tag) == denied
    assert delete(user, ("k", tag)) == ([], {"k": "AccessDenied"})
    assert service.bucket("nix").keys() == ["k"]
    assert delete(user, ("k", None)) == (["k"], {})


# Many


def test_many_are_deleted(s3, service):
    for key in ("a", "b/c", "d&<é>"):
        put(s3, key)
    keys = ["a", "b/c", "d&<é>", "none", "a"]
    assert delete(s3, *((key, None) for key in keys)) == (keys, {})
    assert service.bucket("nix").keys() == []
    assert service.counts["DeleteObjects"] == 1


def test_each_by_its_own_condition(s3, service):
    old = put(s3, "a", b"old")
    tags = {key: put(s3, key, b"new") for key in ("a", "b", "c")}
    found = delete(
        s3, ("a", old), ("b", tags["b"]), ("c", tags["c"].strip('"')), ("none", old), Quiet=True
    )
    assert found == ([], {"a": "PreconditionFailed", "none": "NoSuchKey"})
    assert service.bucket("nix").keys() == ["a"]
    assert delete(s3, ("a", "*")) == (["a"], {})


def test_each_by_its_own_permission(client_of, s3, principals, service):
    for key in ("mine/a", "yours/a"):
        put(s3, key)
    mine = [Allow("s3:DeleteObject", "arn:aws:s3:::nix/mine/*")]
    user = client_of(principals.add_user("user", mine))
    found = delete(user, ("mine/a", None), ("yours/a", None))
    assert found == (["mine/a"], {"yours/a": "AccessDenied"})
    assert service.bucket("nix").keys() == ["yours/a"]


def test_a_thousand_and_no_more(s3):
    keys = [(f"k{number}", None) for number in range(1001)]
    assert len(delete(s3, *keys[:1000])[0]) == 1000
    assert refused(delete, s3, *keys) == (400, "MalformedXML")


def test_a_key_that_is_too_long_is_an_error_of_its_own(s3):
    long = "x" * 1025
    assert delete(s3, ("a", None), (long, None)) == (["a"], {long: "KeyTooLongError"})


def test_of_an_unknown_bucket(s3):
    call = s3.delete_objects
    found = refused(call, Bucket="nixx", Delete={"Objects": [{"Key": "a"}]})
    assert found == (404, "NoSuchBucket")


def test_what_is_not_simulated(s3):
    call = s3.delete_objects
    entry = {"Key": "a", "VersionId": "1"}
    assert refused(call, Bucket="nix", Delete={"Objects": [entry]})[1] == "NotImplemented"


ONE = b"<Delete><Object><Key>k</Key></Object></Delete>"


def md5_of(body):
    return base64.b64encode(hashlib.md5(body).digest()).decode()


def sha256_of(body):
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


@pytest.fixture
def send(raw, principals, s3):
    """Return a function that sends a document, unsigned, and returns the answer."""
    put(s3, "k")
    principals.set_policy("", [Allow("*")])

    def send(body, **headers):
        lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items())
        head = f"POST /nix?delete HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{lines}\r\n"
        return raw(head.encode() + body)

    return send


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, b"InvalidRequest"),
        ({"Content_MD5": md5_of(b"other")}, b"BadDigest"),
        ({"Content_MD5": "?"}, b"InvalidDigest"),
        ({"x_amz_checksum_sha256": sha256_of(b"other")}, b"BadDigest"),
        ({"x_amz_checksum_sha256": "AAAA"}, b"InvalidRequest"),
        ({"x_amz_checksum_crc64nvme": "AAAA"}, b"NotImplemented"),
    ],
)
def test_a_document_without_its_checksum(send, service, headers, code):
    assert b"<Code>%s</Code>" % code in send(ONE, **headers)
    assert service.bucket("nix").keys() == ["k"]


@pytest.mark.parametrize(
    "headers", [{"Content_MD5": md5_of(ONE)}, {"x_amz_checksum_sha256": sha256_of(ONE)}]
)
def test_a_document_with_its_checksum(send, service, headers):
    assert b"<Deleted><Key>k</Key></Deleted>" in send(ONE, **headers)
    assert service.bucket("nix").keys() == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<Delete/>",
        b"<Delete><Quiet>true</Quiet></Delete>",
        b"<Other><Object><Key>k</Key></Object></Other>",
        b"<Delete><Object><Key></Key></Object></Delete>",
        b"<Delete><Object><ETag>e</ETag></Object></Delete>",
        b"<Delete><Object><Key>k</Key><Key>l</Key></Object></Delete>",
        b"<Delete><Object><Key>k</Key><Etag>e</Etag></Object></Delete>",
        b"<Delete><Object><Key>k</Key></Object><Quiet>yes</Quiet></Delete>",
        b"<Delete><Object><Key>k</Key></Object><Loud>true</Loud></Delete>",
        b"<Delete><Object><Key>k</Key></Object>",
        b'<?xml version="1.0" encoding="foo"?>' + ONE,
    ],
)
def test_malformed_documents(send, service, body):
    assert b"<Code>MalformedXML</Code>" in send(body, Content_MD5=md5_of(body))
    assert service.bucket("nix").keys() == ["k"]
