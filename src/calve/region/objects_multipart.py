"""Multipart uploads: parts in files, joined in the order that the client names.

Source: "Uploading and copying objects using multipart upload" (S3 User Guide). Uploads live in memory and end with
the process; composite checksums are not kept.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import uuid
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from calve.region import objects_xml as xml
from calve.region.message import BUFFER_BYTES
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from xml.etree import ElementTree as ET

    from calve.region.objects_payload import Received
    from calve.region.objects_store import Bucket, Draft

__all__ = ["MINIMUM_PART_BYTES", "Part", "Upload", "Uploads", "join", "named_parts"]

MINIMUM_PART_BYTES = 5 * 1024 * 1024
"""Of every part but the last."""
MAXIMUM_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class Part:
    """An uploaded part."""

    draft: Draft
    received: Received

    @property
    def etag(self) -> str:
        """Return the MD5 in hex."""
        return self.received.md5.hex()


@dataclass(slots=True)
class Upload:
    """One multipart upload; `completed` holds the object's ETag once it is done."""

    id: str
    bucket: Bucket
    key: str
    headers: dict[str, str]
    parts: dict[int, Part] = field(default_factory=dict)
    completed: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, number: int, part: Part) -> None:
        """Keep a part, in place of an earlier one of that number."""
        with self.lock:
            old = self.parts.get(number)
            self.parts[number] = part
        if old is not None:
            old.draft.discard()

    def choose(self, named: list[tuple[int, str]]) -> list[Part]:
        """Return the parts that the client names, in its order.

        Raises:
            Refusal: InvalidPartOrder, InvalidPart, EntityTooSmall.
        """
        numbers = [number for number, _ in named]
        if numbers != sorted(set(numbers)):
            raise Refusal(
                400,
                "InvalidPartOrder",
                "The list of parts was not in ascending order. Parts must be ordered by part number.",
            )
        with self.lock:
            parts = [self.parts.get(number) for number in numbers]
        chosen = []
        for (number, etag), part in zip(named, parts, strict=True):
            if part is None or part.etag != etag:
                raise Refusal(
                    400,
                    "InvalidPart",
                    "One or more of the specified parts could not be found. The part may not have been "
                    "uploaded, or the specified entity tag may not match the part's entity tag.",
                    [("PartNumber", str(number)), ("ETag", etag)],
                )
            chosen.append(part)
        for part in chosen[:-1]:
            if part.received.size < MINIMUM_PART_BYTES:
                raise Refusal(
                    400,
                    "EntityTooSmall",
                    "Your proposed upload is smaller than the minimum allowed size",
                    [
                        ("ProposedSize", str(part.received.size)),
                        ("MinSizeAllowed", str(MINIMUM_PART_BYTES)),
                    ],
                )
        return chosen

    def discard(self) -> None:
        """Delete all parts."""
        with self.lock:
            parts = list(self.parts.values())
            self.parts.clear()
        for part in parts:
            part.draft.discard()


class Uploads:
    """The uploads under way, and those that are done: completing twice is answered as the first time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uploads: dict[str, Upload] = {}

    def create(self, bucket: Bucket, key: str, headers: dict[str, str]) -> Upload:
        """Begin an upload."""
        upload = Upload(uuid.uuid4().hex, bucket, key, headers)
        with self._lock:
            self._uploads[upload.id] = upload
        return upload

    def find(self, identifier: str, bucket: Bucket, key: str) -> Upload:
        """Return an upload of that object; NoSuchUpload where there is none."""
        with self._lock:
            upload = self._uploads.get(identifier)
        if upload is None or upload.bucket is not bucket or upload.key != key:
            raise Refusal(
                404,
                "NoSuchUpload",
                "The specified upload does not exist. The upload ID may be invalid, or the upload may have "
                "been aborted or completed.",
                [("UploadId", identifier)],
            )
        return upload

    def remove(self, upload: Upload) -> None:
        """Forget an upload, and delete its parts."""
        with self._lock:
            self._uploads.pop(upload.id, None)
        upload.discard()

    def pending(self) -> list[tuple[str, str]]:
        """Return the (bucket, key) of every upload that was neither completed nor aborted."""
        with self._lock:
            return [
                (each.bucket.name, each.key)
                for each in self._uploads.values()
                if each.completed is None
            ]


def named_parts(root: ET.Element) -> list[tuple[int, str]]:
    """Read the (number, ETag) pairs of a CompleteMultipartUpload document; MalformedXML where there are none."""
    named = []
    for part in root.findall("Part"):
        number = (part.findtext("PartNumber") or "").strip()
        etag = (part.findtext("ETag") or "").strip().strip('"')
        if not (number.isascii() and number.isdigit() and etag):
            break
        named.append((int(number), etag))
    else:
        if 0 < len(named) <= MAXIMUM_PARTS:
            return named
    raise xml.malformed()


def join(parts: list[Part], target: IO[bytes]) -> str:
    """Copy the parts into one file; return the ETag: the MD5 of the MD5s, and how many."""
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        digest.update(part.received.md5)
        with part.draft.path.open("rb") as source:
            shutil.copyfileobj(source, target, BUFFER_BYTES)
    return f"{digest.hexdigest()}-{len(parts)}"
