"""S3's data plane: buckets, objects, conditions, ranges, multipart uploads, listing; signed, with S3's errors.

Source: the S3 API Reference of each operation. Objects are streamed to and from disk. Not simulated: versions,
copies, ACLs, ListObjects (version 1), presigned URLs, composite checksums; they are answered NotImplemented.
"""

from __future__ import annotations

import base64
import itertools
import re
import threading
import urllib.parse
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calve.clock import SYSTEM, Clock
from calve.region import objects_delete as deletion
from calve.region import objects_multipart as multipart
from calve.region import objects_read as reading
from calve.region import objects_xml as xml
from calve.region.bucket_settings import KINDS
from calve.region.message import Request, Response
from calve.region.objects_buckets import Buckets, Target, denied
from calve.region.objects_payload import (
    DOCUMENT_BYTES,
    MAXIMUM_BYTES,
    read_checked_document,
    read_document,
    receive,
)
from calve.region.objects_store import Bucket, Condition, Object
from calve.region.objects_write import (
    check_key,
    check_utf8,
    checksum_headers,
    condition,
    kept_headers,
)
from calve.region.signature import ANONYMOUS, Identity, Principals, Refusal, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["MAXIMUM_BYTES", "Call", "ObjectService"]

_SETTING_METHODS = frozenset({"GET", "PUT", "DELETE"})
_CALLS = 100_000
"""How many of the last requests are kept."""
_UNSIMULATED = frozenset(
    {
        "accelerate", "acl", "analytics", "attributes", "cors", "inventory", "legal-hold",
        "logging", "metrics", "notification", "object-lock", "partNumber",
        "policy", "policyStatus", "replication", "requestPayment", "restore", "retention",
        "select", "tagging", "torrent", "uploadId", "uploads", "versionId", "versioning", "versions", "website",
        "X-Amz-Signature",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the log keeps it.

    Attributes:
        operation: S3's name, such as `GetObject`; "" where it was refused before it was known.
        code: The error's code; "" where there is none.
        range: The Range header; "" where there is none.
        principal: `Identity.name`.
    """

    method: str
    operation: str
    bucket: str
    key: str
    status: int
    code: str
    range: str
    principal: str


class ObjectService:
    """S3 in one region; `handle` is what a `Server` serves.

    Args:
        root: A directory of its own; buckets that were made there before are not served until they are added.
        principals: Keys and policies.
        region: What signatures must name.
        domains: Host names below which a bucket may stand: `bucket.s3.test` with the domain `s3.test`.
        clock: For signatures, expiry and Last-Modified.
    """

    def __init__(
        self,
        root: Path,
        principals: Principals,
        *,
        region: str = "test-region",
        domains: tuple[str, ...] = (),
        clock: Clock = SYSTEM,
    ) -> None:
        self.root = root
        self.principals = principals
        self.region = region
        self.domains = domains
        self.clock = clock
        self.uploads = multipart.Uploads()
        self._buckets = Buckets(root, principals, region)
        self.settings = self._buckets.settings
        self.ignored: frozenset[tuple[str, str]] = frozenset()
        """Conditions that are taken and ignored: ("PutObject", "if-match")."""
        self.calls: deque[Call] = deque(maxlen=_CALLS)
        self._counts: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._serial = itertools.count(1)

    def add_bucket(self, name: str, region: str | None = None, *, public: bool = False) -> Bucket:
        """Make a bucket, or open the one that is there; `public`: unsigned GET and HEAD of objects are allowed."""
        return self._buckets.add(name, region, public=public)

    def bucket(self, name: str) -> Bucket:
        """Return a bucket; KeyError where there is none."""
        return self._buckets.find(name)

    @property
    def counts(self) -> Counter[str]:
        """Return how many requests there were, by operation."""
        with self._lock:
            return Counter(self._counts)

    @property
    def sent_bytes(self) -> Counter[str]:
        """Return the bytes of objects that were sent, by principal (`role/instance`)."""
        with self._lock:
            return Counter(self._sent)

    def handle(self, request: Request) -> Response:
        """Answer a request."""
        bucket, key = self._address(request)
        operation, code, identity = "", "", ANONYMOUS
        request_id = f"{next(self._serial):016X}"
        host_id = base64.b64encode(request_id.encode()).decode()
        try:
            check_utf8(key)
            identity = verify(
                request,
                self.principals,
                service="s3",
                region=self.region,
                now=self.clock.now(),
            )
            target = Target(request, identity, bucket, key, dict(request.parameters))
            operation, perform = self._route(target)
            response = perform(target)
            headers = {"x-amz-request-id": request_id, "x-amz-id-2": host_id, **response.headers}
            response = replace(response, headers=headers)
        except Refusal as refusal:
            code = refusal.code
            response = xml.error_response(refusal, request.path, request_id, host_id)
        ranged = request.headers.get("range", "")
        call = Call(
            request.method, operation, bucket, key, response.status, code, ranged, identity.name
        )
        with self._lock:
            self.calls.append(call)
            self._counts[operation] += 1
        return response

    def _address(self, request: Request) -> tuple[str, str]:
        """Split a request into bucket and key: virtual-hosted below a known domain, else path-style."""
        path = urllib.parse.unquote(request.path[1:], errors="surrogateescape")
        host = request.host.rpartition(":")[0] if ":" in request.host else request.host
        for domain in self.domains:
            if host.endswith(f".{domain}"):
                return host.removesuffix(f".{domain}"), path
        bucket, _, key = path.partition("/")
        return bucket, key

    def _route(self, target: Target) -> tuple[str, Callable[[Target], Response]]:
        names = target.parameters.keys() & (
            _UNSIMULATED
            | KINDS.keys()
            | {"delete", "uploads", "uploadId", "partNumber", "location", "list-type"}
        )
        method = target.request.method
        if not target.key and len(names) == 1 and names <= KINDS.keys():
            (name,) = names
            if method in _SETTING_METHODS:
                operation = f"{method.title()}{KINDS[name].operation}"
                return operation, lambda target: self._buckets.setting(target, name)
        table: dict[tuple[str, bool, frozenset[str]], tuple[str, Callable[[Target], Response]]] = {
            ("PUT", False, frozenset()): ("CreateBucket", self._buckets.create),
            ("HEAD", False, frozenset()): ("HeadBucket", self._buckets.head),
            ("GET", False, frozenset({"location"})): ("GetBucketLocation", self._buckets.location),
            ("GET", False, frozenset({"list-type"})): ("ListObjectsV2", self._buckets.list),
            ("POST", False, frozenset({"delete"})): ("DeleteObjects", self._delete_many),
            ("GET", True, frozenset()): ("GetObject", self._get),
            ("HEAD", True, frozenset()): ("HeadObject", self._get),
            ("PUT", True, frozenset()): ("PutObject", self._put),
            ("DELETE", True, frozenset()): ("DeleteObject", self._delete),
            ("POST", True, frozenset({"uploads"})): ("CreateMultipartUpload", self._create_upload),
            ("PUT", True, frozenset({"uploadId", "partNumber"})): ("UploadPart", self._upload_part),
            ("POST", True, frozenset({"uploadId"})): ("CompleteMultipartUpload", self._complete),
            ("DELETE", True, frozenset({"uploadId"})): ("AbortMultipartUpload", self._abort),
        }
        found = table.get((method, bool(target.key), frozenset(names)))
        if method not in {"GET", "HEAD", "PUT", "POST", "DELETE"}:
            raise Refusal(
                405,
                "MethodNotAllowed",
                "The specified method is not allowed against this resource.",
            )
        if found is None or not target.bucket or "x-amz-copy-source" in target.request.headers:
            raise Refusal(
                501,
                "NotImplemented",
                "A header or query you provided implies functionality that is not implemented",
            )
        return found

    # Objects

    def _heeded(self, target: Target, operation: str) -> Mapping[str, str]:
        """Return the headers without the conditions that this store ignores."""
        headers = target.request.headers
        gone = {name for of, name in self.ignored if of == operation}
        return {name: value for name, value in headers.items() if name not in gone}

    def _get(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "GetObject")
        opened = bucket.open(target.key)
        if opened is None:
            if not self._buckets.may(target, "ListBucket", bucket.name):
                raise denied()  # whoever may not list does not learn what is missing
            raise Refusal(
                404, "NoSuchKey", "The specified key does not exist.", [("Key", target.key)]
            )
        entry, body = opened
        try:
            status, headers, body = reading.select(target.request.headers, entry, body)
        except Refusal:
            body.file.close()
            raise
        on_sent = self._account(target.identity)
        return Response(status, headers, body, on_sent)

    def _account(self, identity: Identity) -> Callable[[int], None]:
        def add(count: int) -> None:
            with self._lock:
                self._sent[identity.name] += count

        return add

    def _put(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "PutObject")
        check_key(target.key)
        with bucket.flight(target.key, condition(self._heeded(target, "PutObject"))) as flight:
            draft = bucket.draft()
            try:
                received = receive(target.request, draft.file)
                entry = Object(
                    target.key,
                    received.size,
                    received.md5.hex(),
                    self.clock.now().replace(microsecond=0),
                    draft.path.name,
                    kept_headers(target.request.headers),
                    received.checksums,
                )
                bucket.publish(flight, draft, entry)
            finally:
                draft.discard()
        return Response(200, {"ETag": f'"{entry.etag}"'} | checksum_headers(received.checksums))

    def _delete(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "DeleteObject")
        self._remove(
            target, bucket, target.key, deletion.condition(self._heeded(target, "DeleteObject"))
        )
        return Response(204)

    def _remove(self, target: Target, bucket: Bucket, key: str, what: Condition) -> None:
        """Delete an object, where it may be; a condition is judged for those alone who may read."""
        actions = ["DeleteObject"] + (["GetObject"] if what.etag is not None else [])
        if not all(self._buckets.may(target, action, bucket.name, key) for action in actions):
            raise denied()
        bucket.delete(key, what)

    def _delete_many(self, target: Target) -> Response:
        bucket = self._buckets.open(target, None)
        named, quiet = deletion.named_objects(
            xml.parse(read_checked_document(target.request, DOCUMENT_BYTES), "Delete")
        )
        result: list[xml.Element] = []
        for key, what in named:
            heeded = Condition() if ("DeleteObjects", "etag") in self.ignored else what
            try:
                check_key(key)
                self._remove(target, bucket, key, heeded)
            except Refusal as refusal:
                result.append(deletion.failed(key, refusal))
            else:
                if not quiet:
                    result.append(("Deleted", [("Key", key)]))
        return Response(
            200, {"Content-Type": "application/xml"}, xml.document("DeleteResult", result)
        )

    # Multipart uploads

    def _create_upload(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "PutObject")
        check_key(target.key)
        upload = self.uploads.create(bucket, target.key, kept_headers(target.request.headers))
        body = xml.document(
            "InitiateMultipartUploadResult",
            [("Bucket", bucket.name), ("Key", target.key), ("UploadId", upload.id)],
        )
        return Response(200, {"Content-Type": "application/xml"}, body)

    def _upload_part(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "PutObject")
        upload = self.uploads.find(target.parameters["uploadId"], bucket, target.key)
        number = target.parameters["partNumber"]
        if not re.fullmatch(r"[1-9][0-9]{0,4}", number) or int(number) > multipart.MAXIMUM_PARTS:
            raise Refusal(
                400,
                "InvalidArgument",
                "Part number must be an integer between 1 and 10000, inclusive",
                [("ArgumentName", "partNumber"), ("ArgumentValue", number)],
            )
        draft = bucket.draft()
        try:
            received = receive(target.request, draft.file)
            draft.file.close()
        except BaseException:
            draft.discard()
            raise
        part = multipart.Part(draft, received)
        upload.put(int(number), part)
        return Response(200, {"ETag": f'"{part.etag}"'} | checksum_headers(received.checksums))

    def _complete(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "PutObject")
        upload = self.uploads.find(target.parameters["uploadId"], bucket, target.key)
        document = read_document(target.request, DOCUMENT_BYTES)
        named = multipart.named_parts(xml.parse(document, "CompleteMultipartUpload"))
        if upload.completed is None:
            headers = self._heeded(target, "CompleteMultipartUpload")
            with bucket.flight(target.key, condition(headers)) as flight:
                draft = bucket.draft()
                try:
                    parts = upload.choose(named)
                    etag = multipart.join(parts, draft.file)
                    entry = Object(
                        target.key,
                        sum(part.received.size for part in parts),
                        etag,
                        self.clock.now().replace(microsecond=0),
                        draft.path.name,
                        upload.headers,
                    )
                    bucket.publish(flight, draft, entry)
                finally:
                    draft.discard()
            upload.completed = etag
            upload.discard()
        body = xml.document(
            "CompleteMultipartUploadResult",
            [
                ("Location", f"/{bucket.name}/{target.key}"),
                ("Bucket", bucket.name),
                ("Key", target.key),
                ("ETag", f'"{upload.completed}"'),
            ],
        )
        return Response(200, {"Content-Type": "application/xml"}, body)

    def _abort(self, target: Target) -> Response:
        bucket = self._buckets.open(target, "AbortMultipartUpload")
        self.uploads.remove(self.uploads.find(target.parameters["uploadId"], bucket, target.key))
        return Response(204)
