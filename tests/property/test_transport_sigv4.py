"""SigV4 against botocore's signers."""

from __future__ import annotations

import datetime as dt
import hashlib
from unittest import mock
from urllib.parse import unquote

import botocore.auth
import botocore.awsrequest
import botocore.credentials
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calve.transport import sigv4
from calve.transport.credentials import Credentials

NOW = dt.datetime(2026, 11, 3, 4, 5, 6, tzinfo=dt.UTC)
ODD = "+= /~%?#é日!*'();:@&,$._-aZ09"
keys = st.one_of(
    st.text(st.sampled_from(ODD), max_size=30),
    st.text(max_size=20),
    st.sampled_from(["a//b", "a/../b", "./a", "a%2Bb", "..", "/", "a/", "nar/x.nar.zst"]),
).filter(lambda text: text.isprintable() and not any(0xD800 <= ord(char) < 0xE000 for char in text))
names = st.sampled_from(
    ["list-type", "prefix", "continuation-token", "uploads", "versioning", "a b"]
)
pairs = st.lists(st.tuples(names, keys), max_size=5)
flags = st.lists(st.sampled_from(["uploads", "versioning", "acl", "restore"]), max_size=2)
fields = st.dictionaries(
    st.sampled_from(["Range", "If-Match", "If-None-Match", "Content-Type", "X-Amz-Meta-A"]),
    st.text(st.sampled_from('bytes=0-9*"/;, a'), min_size=1, max_size=20),
)
tokens = st.none() | st.text("abc+/=", min_size=1, max_size=30)
hosts = st.sampled_from(
    ["https://bucket.s3.eu-central-1.amazonaws.com", "http://127.0.0.1:9000", "https://host:443"]
)


def oracle(kind, method, url, headers, credentials, service, payload_hash):
    """Return what botocore adds to a request."""
    request = botocore.awsrequest.AWSRequest(method=method, url=url, headers=headers)
    if payload_hash == sigv4.UNSIGNED_PAYLOAD:
        request.context["payload_signing_enabled"] = False
        if not url.startswith("https"):  # botocore signs every body over http
            request.headers["X-Amz-Content-SHA256"] = payload_hash
    else:
        request.data = request.body_bytes = b"body"
    keys = botocore.credentials.Credentials(
        credentials.access_key, credentials.secret_key, credentials.token
    )
    signer = kind(keys, service, "eu-central-1")
    with (
        mock.patch.object(botocore.auth, "get_current_datetime", return_value=NOW),
        mock.patch.object(kind, "payload", return_value=payload_hash),
    ):
        signer.add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


def agree(kind, service, method, url, headers, token, payload_hash):
    credentials = Credentials("AKIAEXAMPLE", "se/cret+", token)
    ours = sigv4.sign(
        method,
        url,
        headers,
        credentials=credentials,
        region="eu-central-1",
        service=service,
        now=NOW,
        payload_hash=payload_hash,
    )
    theirs = oracle(kind, method, url, headers, credentials, service, payload_hash)
    theirs.pop("host", None)
    assert ours == theirs


def built(host, key, query, flag):
    text = "&".join(filter(None, [sigv4.query(query), *flag]))
    return f"{host}/{sigv4.encode(key)}" + (f"?{text}" if text else "")


hashed = st.sampled_from([sigv4.UNSIGNED_PAYLOAD, hashlib.sha256(b"body").hexdigest()])


@settings(deadline=None, max_examples=150)
@given(hosts, keys, pairs, flags, fields, tokens, hashed, st.sampled_from(["GET", "PUT", "HEAD"]))
@example(
    "http://h", "a+b =//~%2B?#é/../!*'();:@&,$", [("prefix", "a b")], ["acl"], {}, "t", "00", "PUT"
)
def test_s3(host, key, query, flag, headers, token, payload_hash, method):
    url = built(host, key, query, flag)
    agree(botocore.auth.S3SigV4Auth, "s3", method, url, headers, token, payload_hash)


@settings(deadline=None, max_examples=150)
@given(hosts, keys, pairs, flags, fields, tokens, hashed, st.sampled_from(["GET", "POST"]))
@example(
    "https://ebs", "snapshots/snap-1/blocks", [("pageToken", "a+/=")], [], {}, "t", "00", "GET"
)
def test_other_services(host, key, query, flag, headers, token, payload_hash, method):
    url = built(host, key, query, flag)
    agree(botocore.auth.SigV4Auth, "ebs", method, url, headers, token, payload_hash)


@settings(deadline=None, max_examples=100)
@given(keys)
def test_encode_is_undone_by_unquote(key):
    assert unquote(sigv4.encode(key)) == key
    assert sigv4.encode(key).isascii()


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("abc/=+!*'():@,$~-._"), max_size=20))
def test_what_the_caller_left_unencoded_is_signed_as_aws_reads_it(key):
    """The same signature, whether the caller encodes `=` or not: the server decodes before it encodes."""

    def signature(url):
        return sigv4.sign(
            "GET",
            url,
            {},
            credentials=Credentials("A", "s"),
            region="r",
            service="s3",
            now=NOW,
            payload_hash=sigv4.UNSIGNED_PAYLOAD,
        )["authorization"]

    assert signature(f"http://h/b/{key}") == signature(f"http://h/b/{sigv4.encode(key)}")
