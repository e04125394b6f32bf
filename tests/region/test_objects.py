"""S3's data plane, with boto3 as its client."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import botocore.exceptions
import pytest

from calve.region.objects import ObjectService
from calve.region.objects_multipart import MINIMUM_PART_BYTES
from calve.region.objects_store import Condition, Object
from calve.region.server import Server
from calve.region.signature import Allow, Refusal


def refused(call, *args, **kwargs):
    """Return status and code of a call that must be refused."""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(*args, **kwargs)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def put(s3, key, body=b"content", **options):
    return s3.put_object(Bucket="nix", Key=key, Body=body, **options)


def read(s3, key, **options):
    with s3.get_object(Bucket="nix", Key=key, **options)["Body"] as body:
        return body.read()


# Objects


def test_what_is_put_is_got(s3):
    written = put(
        s3, "a/b.narinfo", b"StorePath", ContentType="text/x-nix-narinfo", Metadata={"who": "me"}
    )
    got = s3.get_object(Bucket="nix", Key="a/b.narinfo")
    with got["Body"] as body:
        assert body.read() == b"StorePath"
    assert got["ETag"] == written["ETag"] == f'"{hashlib.md5(b"StorePath").hexdigest()}"'
    assert got["ContentType"] == "text/x-nix-narinfo"
    assert got["Metadata"] == {"who": "me"}
    assert got["AcceptRanges"] == "bytes"
    assert got["ContentLength"] == 9
    head = s3.head_object(Bucket="nix", Key="a/b.narinfo")
    assert (head["ETag"], head["ContentLength"]) == (got["ETag"], 9)
    assert head["LastModified"] == got["LastModified"]


def test_a_large_object_is_streamed_over_one_connection(s3, server, service):
    data = os.urandom(3 * 1024 * 1024 + 1)
    put(s3, "big", io.BytesIO(data))
    assert read(s3, "big") == data
    s3.head_bucket(Bucket="nix")  # the connection's thread is done with what came before
    assert server.connections == 1
    assert service.sent_bytes == {"admin": len(data)}


def test_an_empty_object(s3):
    put(s3, "empty", b"")
    assert read(s3, "empty") == b""


@pytest.mark.parametrize(
    "key",
    [
        "../../../etc/passwd",
        "a//b",
        "a/../b",
        "/leading",
        "space and+plus",
        "%2B%2F~",
        "ünï/☃",
        "!*'();:@&=$,?#[]",
        "a\tb",
        "x" * 1024,
        "dir/",
    ],
)
def test_any_key_is_stored_within_the_directory(s3, service, tmp_path, key):
    put(s3, key, key.encode())
    assert read(s3, key) == key.encode()
    assert service.bucket("nix").keys() == [key]
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 2
    assert {path.parent for path in files} == {tmp_path / "s3" / "nix"}
    s3.delete_object(Bucket="nix", Key=key)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_key_beyond_1024_bytes_is_refused(s3):
    assert refused(put, s3, "x" * 1025) == (400, "KeyTooLongError")


def test_overwriting_leaves_one_data_file(s3, tmp_path):
    put(s3, "k", b"one")
    put(s3, "k", b"two")
    assert read(s3, "k") == b"two"
    assert len(list((tmp_path / "s3" / "nix").glob("*.data"))) == 1


def test_objects_outlive_the_service(s3, service, principals, tmp_path):
    put(s3, "k", b"one", Metadata={"a": "b"})
    (tmp_path / "s3" / "nix" / "torn.data").write_bytes(b"of a write that was killed")
    again = ObjectService(tmp_path / "s3", principals).add_bucket("nix")
    assert again.get("k") == service.bucket("nix").get("k")
    assert not (tmp_path / "s3" / "nix" / "torn.data").exists()


def test_deleting_twice_is_no_error(s3):
    put(s3, "k")
    for _ in range(2):
        assert s3.delete_object(Bucket="nix", Key="k")["ResponseMetadata"]["HTTPStatusCode"] == 204


def test_the_log_names_what_was_asked(s3, service):
    put(s3, "k", b"0123456789")
    read(s3, "k", Range="bytes=2-3")
    assert refused(read, s3, "none")[0] == 404
    calls = [(c.method, c.key, c.status, c.range, c.code) for c in service.calls]
    assert calls == [
        ("PUT", "k", 200, "", ""),
        ("GET", "k", 206, "bytes=2-3", ""),
        ("GET", "none", 404, "", "NoSuchKey"),
    ]
    assert service.counts == {"PutObject": 1, "GetObject": 2}
    s3.head_bucket(Bucket="nix")  # the connection's thread is done with what came before
    assert service.sent_bytes == {"admin": 2}


# Ranges and conditions of reads


@pytest.mark.parametrize(
    ("header", "expected", "content_range"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=3-", b"3456789", "bytes 3-9/10"),
        ("bytes=-4", b"6789", "bytes 6-9/10"),
        ("bytes=-99", b"0123456789", "bytes 0-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
    ],
)
def test_ranges(s3, header, expected, content_range):
    put(s3, "k", b"0123456789")
    got = s3.get_object(Bucket="nix", Key="k", Range=header)
    with got["Body"] as body:
        assert body.read() == expected
    assert got["ContentRange"] == content_range
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206


@pytest.mark.parametrize(
    "header", ["bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=-", "bytes=x-"]
)
def test_a_range_that_is_none_is_ignored(s3, header):
    put(s3, "k", b"0123456789")
    assert read(s3, "k", Range=header) == b"0123456789"


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=99-100", "bytes=-0"])
def test_a_range_beyond_the_end_is_416(s3, header):
    put(s3, "k", b"0123456789")
    assert refused(read, s3, "k", Range=header) == (416, "InvalidRange")


def test_conditional_reads(s3):
    etag = put(s3, "k")["ETag"]
    assert read(s3, "k", IfMatch=etag, Range="bytes=1-") == b"ontent"
    assert refused(read, s3, "k", IfMatch='"other"') == (412, "PreconditionFailed")
    assert refused(read, s3, "k", IfNoneMatch=etag) == (304, "304")
    assert read(s3, "k", IfNoneMatch='"other"') == b"content"
    modified = s3.head_object(Bucket="nix", Key="k")["LastModified"]
    assert refused(read, s3, "k", IfModifiedSince=modified)[0] == 304
    assert read(s3, "k", IfUnmodifiedSince=modified) == b"content"


def test_a_reader_keeps_the_version_it_opened(s3, service):
    put(s3, "k", b"old")
    _, body = service.bucket("nix").open("k")
    put(s3, "k", b"newer")
    with body.file:
        assert body.file.read() == b"old"


# Conditions of writes


def test_if_none_match_creates_once(s3):
    put(s3, "k", b"first", IfNoneMatch="*")
    assert refused(put, s3, "k", b"second", IfNoneMatch="*") == (412, "PreconditionFailed")
    assert read(s3, "k") == b"first"
    assert refused(put, s3, "k", IfNoneMatch='"etag"') == (501, "NotImplemented")


def test_if_match_replaces_what_was_read(s3):
    etag = put(s3, "lock", b"1")["ETag"]
    second = put(s3, "lock", b"2", IfMatch=etag)["ETag"]
    assert refused(put, s3, "lock", b"3", IfMatch=etag) == (412, "PreconditionFailed")
    assert refused(put, s3, "none", b"3", IfMatch=etag) == (404, "NoSuchKey")
    assert refused(s3.delete_object, Bucket="nix", Key="lock", IfMatch=etag) == (
        412,
        "PreconditionFailed",
    )
    s3.delete_object(Bucket="nix", Key="lock", IfMatch=second)
    assert refused(read, s3, "lock")[0] == 404


def test_of_conditional_writers_exactly_one_wins(client_of, admin, service):
    clients = [client_of(admin) for _ in range(8)]
    barrier = threading.Barrier(len(clients))

    def create(number):
        barrier.wait()
        try:
            put(clients[number], "k", f"{number}".encode() * 300_000, IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            return error.response["Error"]["Code"]
        return "won"

    with ThreadPoolExecutor(len(clients)) as pool:
        results = list(pool.map(create, range(len(clients))))
    assert results.count("won") == 1
    assert set(results) <= {"won", "PreconditionFailed", "ConditionalRequestConflict"}
    assert read(clients[0], "k") == f"{results.index('won')}".encode() * 300_000
    assert len(list(service.bucket("nix").root.glob("*.data"))) == 1


def _during_upload(service, condition, happen):
    """Do something within a conditional write, below HTTP; return the code of its refusal."""
    bucket = service.bucket("nix")
    with bucket.flight("k", condition) as flight:
        draft = bucket.draft()
        happen()
        entry = Object("k", 0, "etag", service.clock.now(), draft.path.name)
        try:
            bucket.publish(flight, draft, entry)
        except Refusal as refusal:
            return refusal.status, refusal.code
        finally:
            draft.discard()
    return None


def test_a_write_that_was_overtaken_conflicts(s3, service):
    new = Condition(only_new=True)
    conflict = (409, "ConditionalRequestConflict")
    assert _during_upload(service, new, lambda: put(s3, "k", IfNoneMatch="*")) == conflict
    assert read(s3, "k") == b"content"
    etag = s3.head_object(Bucket="nix", Key="k")["ETag"].strip('"')
    happen = lambda: s3.delete_object(Bucket="nix", Key="k")  # noqa: E731
    assert _during_upload(service, Condition(etag=etag), happen) == conflict
    assert _during_upload(service, new, happen) == conflict
    assert _during_upload(service, new, lambda: None) is None
    assert _during_upload(service, Condition(), lambda: put(s3, "k")) is None


# Integrity


def _b64(data):
    return base64.b64encode(data).decode()


def test_checksums_are_compared_and_given_back(s3):
    digest = _b64(hashlib.sha256(b"content").digest())
    written = put(s3, "k", ChecksumSHA256=digest)
    assert written["ChecksumSHA256"] == digest
    head = s3.head_object(Bucket="nix", Key="k", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"] == digest
    wrong = _b64(hashlib.sha256(b"other").digest())
    assert refused(put, s3, "bad", ChecksumSHA256=wrong) == (400, "BadDigest")
    assert refused(put, s3, "bad", ChecksumSHA256="AAAA") == (400, "InvalidRequest")
    assert refused(put, s3, "bad", ChecksumCRC32="AAAAAA==") == (400, "BadDigest")
    assert refused(read, s3, "bad")[0] == 404


def test_content_md5(s3):
    put(s3, "k", ContentMD5=_b64(hashlib.md5(b"content").digest()))
    assert refused(put, s3, "k", ContentMD5=_b64(bytes(16))) == (400, "BadDigest")
    assert refused(put, s3, "k", ContentMD5="x") == (400, "InvalidDigest")


def test_a_refused_upload_leaves_nothing(s3, tmp_path):
    assert refused(put, s3, "bad", ContentMD5=_b64(bytes(16)))[0] == 400
    assert list((tmp_path / "s3" / "nix").iterdir()) == []


# Buckets and access


def test_buckets(s3, service):
    s3.create_bucket(
        Bucket="fresh", CreateBucketConfiguration={"LocationConstraint": "test-region"}
    )
    head = s3.head_bucket(Bucket="fresh")
    assert head["BucketRegion"] == "test-region"
    assert s3.get_bucket_location(Bucket="fresh")["LocationConstraint"] == "test-region"
    assert refused(
        s3.create_bucket,
        Bucket="fresh",
        CreateBucketConfiguration={"LocationConstraint": "test-region"},
    ) == (409, "BucketAlreadyOwnedByYou")
    assert refused(s3.head_bucket, Bucket="none") == (404, "404")
    assert refused(s3.get_object, Bucket="none", Key="k") == (404, "NoSuchBucket")


def test_a_bucket_elsewhere_is_a_redirect(s3, service):
    service.add_bucket("far", "other-region")
    # botocore signs again for the region that the redirect names; this endpoint then wants its own.
    assert refused(s3.get_object, Bucket="far", Key="k") == (400, "AuthorizationHeaderMalformed")
    first = service.calls[0]
    assert (first.status, first.code) == (301, "PermanentRedirect")


def test_missing_is_denied_to_whoever_may_not_list(client_of, s3, principals):
    reader = client_of(principals.add_user("r", [Allow("s3:GetObject", "arn:aws:s3:::nix/*")]))
    put(s3, "k")
    assert read(reader, "k") == b"content"
    assert refused(read, s3, "none") == (404, "NoSuchKey")
    assert refused(read, reader, "none") == (403, "AccessDenied")
    assert refused(reader.head_object, Bucket="nix", Key="none") == (403, "403")
    assert refused(put, reader, "k") == (403, "AccessDenied")
    assert refused(reader.delete_object, Bucket="nix", Key="k") == (403, "AccessDenied")
    assert refused(reader.list_objects_v2, Bucket="nix") == (403, "AccessDenied")


def test_anonymous_reads_of_public_buckets_alone(s3, service, raw):
    service.add_bucket("open", public=True)
    s3.put_object(Bucket="open", Key="k", Body=b"content")
    put(s3, "k")
    request = b"%s /%s/k HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    assert raw(request % (b"GET", b"open")).endswith(b"\r\n\r\ncontent")
    assert raw(request % (b"GET", b"nix")).startswith(b"HTTP/1.1 403 ")
    assert raw(request % (b"PUT", b"open")).startswith(b"HTTP/1.1 403 ")


def test_errors_are_documents(s3):
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        read(s3, "none")
    response = caught.value.response
    assert response["Error"]["Key"] == "none"
    assert response["Error"]["Message"] == "The specified key does not exist."
    metadata = response["ResponseMetadata"]
    assert metadata["RequestId"] == metadata["HTTPHeaders"]["x-amz-request-id"]
    assert metadata["HostId"]


@pytest.mark.parametrize(
    "call",
    [
        lambda s3: s3.get_object_tagging(Bucket="nix", Key="k"),
        lambda s3: s3.list_object_versions(Bucket="nix"),
        lambda s3: s3.list_objects(Bucket="nix"),
        lambda s3: s3.copy_object(Bucket="nix", Key="k", CopySource="nix/k"),
        lambda s3: s3.list_buckets(),
    ],
)
def test_what_is_not_simulated_says_so(s3, call):
    assert refused(call, s3) == (501, "NotImplemented")


def test_virtual_hosted_addressing(client_of, admin, server, service, monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        return real("127.0.0.1" if str(host).endswith(".localhost") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://s3.localhost:{server.port}"
    s3 = client_of(admin, style="virtual", url=url)
    put(s3, "a/k")
    assert read(s3, "a/k") == b"content"
    assert s3.list_objects_v2(Bucket="nix")["KeyCount"] == 1
    assert service.calls[0].bucket == "nix"
    assert service.calls[0].key == "a/k"


# Listing


def _pages(s3, **options):
    keys, prefixes, pages = [], [], 0
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="nix", **options):
        pages += 1
        assert page["KeyCount"] == len(page.get("Contents", [])) + len(
            page.get("CommonPrefixes", [])
        )
        keys += [entry["Key"] for entry in page.get("Contents", [])]
        prefixes += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
    return keys, prefixes, pages


@pytest.fixture
def listed(s3):
    for key in ["a", "b/1", "b/2", "b/3", "b0", "c/x/1", "c/y", "ü é&<", "z"]:
        put(s3, key, key.encode())
    return s3


def test_listing_in_pages(listed):
    everything = ["a", "b/1", "b/2", "b/3", "b0", "c/x/1", "c/y", "z", "ü é&<"]
    assert _pages(listed) == (everything, [], 1)
    for size in (1, 2, 4):
        found = _pages(listed, PaginationConfig={"PageSize": size})
        assert found == (everything, [], -(-len(everything) // size))


def test_listing_by_prefix_and_delimiter(listed):
    assert _pages(listed, Prefix="b/") == (["b/1", "b/2", "b/3"], [], 1)
    assert _pages(listed, Prefix="none") == ([], [], 1)
    tops = (["a", "b0", "z", "ü é&<"], ["b/", "c/"])
    assert _pages(listed, Delimiter="/") == (*tops, 1)
    assert _pages(listed, Delimiter="/", PaginationConfig={"PageSize": 1}) == (*tops, 6)
    assert _pages(listed, Prefix="c/", Delimiter="/") == (["c/y"], ["c/x/"], 1)
    assert _pages(listed, StartAfter="b/2", Prefix="b")[0] == ["b/3", "b0"]


def test_listing_says_what_an_object_is(s3):
    etag = put(s3, "k")["ETag"]
    (entry,) = s3.list_objects_v2(Bucket="nix")["Contents"]
    assert (entry["Key"], entry["Size"], entry["ETag"]) == ("k", 7, etag)
    assert entry["LastModified"] == s3.head_object(Bucket="nix", Key="k")["LastModified"]


def test_wrong_parameters_of_a_listing(s3):
    listing = s3.list_objects_v2
    assert refused(listing, Bucket="nix", ContinuationToken="?")[1] == "InvalidArgument"
    assert refused(listing, Bucket="nix", MaxKeys=-1)[1] == "InvalidArgument"
    put(s3, "k")
    nothing = listing(Bucket="nix", MaxKeys=0)
    assert (nothing["KeyCount"], nothing["IsTruncated"]) == (0, False)


# Multipart uploads


def _upload(s3, parts, key="big", **options):
    upload = s3.create_multipart_upload(Bucket="nix", Key=key)["UploadId"]
    done = []
    for number, data in parts:
        etag = s3.upload_part(Bucket="nix", Key=key, UploadId=upload, PartNumber=number, Body=data)[
            "ETag"
        ]
        done.append({"PartNumber": number, "ETag": etag})
    return upload, done


def _complete(s3, upload, parts, key="big", **options):
    return s3.complete_multipart_upload(
        Bucket="nix", Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **options
    )


def test_parts_become_one_object(s3, service, tmp_path):
    first, last = os.urandom(MINIMUM_PART_BYTES), b"tail"
    upload, parts = _upload(s3, [(2, last), (1, first)])
    parts.reverse()
    assert service.uploads.pending() == [("nix", "big")]
    etag = _complete(s3, upload, parts)["ETag"]
    digests = hashlib.md5(first).digest() + hashlib.md5(last).digest()
    assert etag == f'"{hashlib.md5(digests).hexdigest()}-2"'
    assert read(s3, "big") == first + last
    assert _complete(s3, upload, parts)["ETag"] == etag  # the answer may have been lost
    assert service.uploads.pending() == []
    assert len(list((tmp_path / "s3" / "nix").iterdir())) == 2


def test_uploads_that_do_not_fit(s3):
    upload, parts = _upload(s3, [(1, b"small"), (2, b"last")])
    assert refused(_complete, s3, upload, parts) == (400, "EntityTooSmall")
    assert refused(_complete, s3, upload, parts[::-1]) == (400, "InvalidPartOrder")
    wrong = [{"PartNumber": 1, "ETag": '"no"'}]
    assert refused(_complete, s3, upload, wrong) == (400, "InvalidPart")
    missing = [{"PartNumber": 7, "ETag": parts[0]["ETag"]}]
    assert refused(_complete, s3, upload, missing) == (400, "InvalidPart")
    assert refused(_complete, s3, upload, []) == (400, "MalformedXML")
    assert refused(_complete, s3, "none", parts) == (404, "NoSuchUpload")
    assert refused(_complete, s3, upload, parts, key="other") == (404, "NoSuchUpload")
    for number in (0, 10_001):
        assert refused(_upload, s3, [(number, b"")]) == (400, "InvalidArgument")


def test_aborted_uploads_leave_nothing(s3, tmp_path):
    upload, parts = _upload(s3, [(1, b"x"), (1, b"y")])
    s3.abort_multipart_upload(Bucket="nix", Key="big", UploadId=upload)
    assert list((tmp_path / "s3" / "nix").iterdir()) == []
    assert refused(_complete, s3, upload, parts[1:]) == (404, "NoSuchUpload")


def test_a_conditional_upload(s3):
    upload, parts = _upload(s3, [(1, b"x")])
    put(s3, "big", b"first")
    assert refused(_complete, s3, upload, parts, IfNoneMatch="*") == (412, "PreconditionFailed")
    s3.delete_object(Bucket="nix", Key="big")
    _complete(s3, upload, parts, IfNoneMatch="*")
    assert read(s3, "big") == b"x"


def test_boto_s_transfer_manager(s3, tmp_path):
    data = os.urandom(MINIMUM_PART_BYTES * 4 + 3)  # beyond its threshold of 8 MB
    s3.upload_fileobj(io.BytesIO(data), "nix", "managed")
    target = io.BytesIO()
    s3.download_fileobj("nix", "managed", target)
    assert target.getvalue() == data
    assert s3.head_object(Bucket="nix", Key="managed")["ETag"].endswith('-3"')


# TLS, where boto3 sends unsigned payloads with trailing checksums


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    import datetime as dt
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "region")])
    now = dt.datetime.now(dt.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "region.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(pem)
    )
    return path


def test_trailing_checksums_over_tls(service, admin, certificate, client_of):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    data = os.urandom(700_001)
    with Server(service.handle, context=context) as server:
        s3 = client_of(admin, url=server.url, verify=str(certificate))
        written = put(s3, "k", io.BytesIO(data), ContentEncoding="br")
        assert written["ChecksumCRC32"]
        got = s3.get_object(Bucket="nix", Key="k", ChecksumMode="ENABLED")
        with got["Body"] as body:
            assert body.read() == data
        assert got["ContentEncoding"] == "br"
        assert got["ChecksumCRC32"] == written["ChecksumCRC32"]
        s3.close()
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")  # no TLS
            with contextlib.suppress(ConnectionResetError):
                while plain.recv(4096):
                    pass
