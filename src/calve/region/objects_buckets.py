"""S3's buckets: which there are, who may open them, what they are set to, what is in them.

Source: the S3 API Reference of each operation.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.region import objects_xml as xml
from calve.region.bucket_settings import KINDS, Settings
from calve.region.message import Request, Response
from calve.region.objects_payload import DOCUMENT_BYTES, read_checked_document, read_document
from calve.region.objects_store import Bucket
from calve.region.signature import Identity, Principals, Refusal

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Buckets", "Target", "denied"]

_BUCKET_NAME = re.compile(r"(?!xn--|sthree-)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about."""

    request: Request
    identity: Identity
    bucket: str
    key: str
    parameters: dict[str, str]


class Buckets:
    """The buckets of one region; thread-safe.

    Args:
        root: A directory of its own; a bucket's objects stand below it.
        principals: Keys and policies.
        region: Where these buckets are.
    """

    def __init__(self, root: Path, principals: Principals, region: str) -> None:
        self._root = root
        self._principals = principals
        self._region = region
        self.settings = Settings()
        self._buckets: dict[str, Bucket] = {}
        self._lock = threading.Lock()

    def add(self, name: str, region: str | None = None, *, public: bool = False) -> Bucket:
        """Make a bucket, or open the one that is there; `public`: unsigned GET and HEAD of objects are allowed."""
        with self._lock:
            if name not in self._buckets:
                self._buckets[name] = Bucket(
                    self._root / name, name, region or self._region, public=public
                )
            return self._buckets[name]

    def find(self, name: str) -> Bucket:
        """Return a bucket; KeyError where there is none."""
        return self._buckets[name]

    def may(self, target: Target, action: str, bucket: str, key: str = "") -> bool:
        """Say whether who asks may do something to a bucket, or to a key in it."""
        resource = f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")
        return self._principals.allows(target.identity, f"s3:{action}", resource)

    def open(self, target: Target, action: str | None) -> Bucket:
        """Return the bucket, where the action on it, or on the key in it, is allowed; None: whoever asks."""
        bucket = self._buckets.get(target.bucket)
        if bucket is None:
            raise Refusal(
                404,
                "NoSuchBucket",
                "The specified bucket does not exist",
                [("BucketName", target.bucket)],
            )
        if bucket.region != self._region:
            raise Refusal(
                301,
                "PermanentRedirect",
                "The bucket you are attempting to access must be addressed using the specified endpoint. "
                "Please send all future requests to this endpoint.",
                [("Bucket", bucket.name), ("Endpoint", f"s3.{bucket.region}.amazonaws.com")],
                {"x-amz-bucket-region": bucket.region},
            )
        readable = bucket.public and action == "GetObject"
        if action and not readable and not self.may(target, action, bucket.name, target.key):
            raise denied()
        return bucket

    # Operations

    def create(self, target: Target) -> Response:
        """CreateBucket."""
        if not self.may(target, "CreateBucket", target.bucket):
            raise denied()
        if not _BUCKET_NAME.fullmatch(target.bucket) or ".." in target.bucket:
            raise Refusal(
                400,
                "InvalidBucketName",
                "The specified bucket is not valid.",
                [("BucketName", target.bucket)],
            )
        data = read_document(target.request, DOCUMENT_BYTES)
        region = self._region
        if data.strip():
            region = xml.text_of(xml.parse(data, "CreateBucketConfiguration"), "LocationConstraint")
        if region != self._region:
            raise Refusal(
                400,
                "IllegalLocationConstraintException",
                f"The {region} location constraint is incompatible for the region specific endpoint this "
                "request was sent to.",
            )
        if target.bucket in self._buckets:
            raise Refusal(
                409,
                "BucketAlreadyOwnedByYou",
                "Your previous request to create the named bucket succeeded and you already own it.",
                [("BucketName", target.bucket)],
            )
        ownership = target.request.headers.get("x-amz-object-ownership", "")
        self.settings.create(target.bucket, ownership)
        self.add(target.bucket)
        return Response(200, {"Location": f"/{target.bucket}"})

    def head(self, target: Target) -> Response:
        """HeadBucket."""
        bucket = self.open(target, "ListBucket")
        return Response(200, {"x-amz-bucket-region": bucket.region})

    def location(self, target: Target) -> Response:
        """GetBucketLocation."""
        bucket = self.open(target, "GetBucketLocation")
        body = xml.document("LocationConstraint", []).replace(
            b"></LocationConstraint>", f">{bucket.region}</LocationConstraint>".encode()
        )
        return Response(200, {"Content-Type": "application/xml"}, body)

    def list(self, target: Target) -> Response:
        """ListObjectsV2."""
        bucket = self.open(target, "ListBucket")
        if target.parameters["list-type"] != "2":
            raise Refusal(501, "NotImplemented", "Only version 2 of ListObjects is simulated.")
        listing = xml.Listing.parse(target.parameters)
        found, last = bucket.listing(
            listing.prefix, listing.delimiter, listing.after, listing.limit
        )
        body = listing.render(bucket.name, found, last if listing.limit else None)
        return Response(200, {"Content-Type": "application/xml"}, body)

    def setting(self, target: Target, name: str) -> Response:
        """Get, put or delete a setting of a bucket."""
        kind = KINDS[name]
        method = target.request.method
        # There is no action of its own for a deletion: whoever may put may delete.
        bucket = self.open(target, f"{'Get' if method == 'GET' else 'Put'}{kind.action}")
        if method == "GET":
            return self.settings.get(bucket.name, kind)
        if method == "DELETE":
            return self.settings.delete(bucket.name, kind)
        data = read_checked_document(target.request, DOCUMENT_BYTES)
        return self.settings.put(bucket.name, kind, data)


def denied() -> Refusal:
    """Return S3's refusal of who may not."""
    return Refusal(403, "AccessDenied", "Access Denied")
