"""Objects in S3: signed, conditional, with checksums, in parts where they are large.

Source: the S3 API Reference of PutObject, CreateMultipartUpload, UploadPart, CompleteMultipartUpload,
AbortMultipartUpload, ListObjectsV2, DeleteObject, DeleteObjects, and "Conditional deletes" in the user guide. Every
body is sent with its SHA-256, which S3 compares and keeps. A stream is held in memory, once, up to `PART_BYTES`, and
goes out in parts of that size where it is longer: nothing of it is visible before its end.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from calve.cache import objects, web
from calve.cache.objects import Listed
from calve.cache.url import S3
from calve.errors import (
    CalveError,
    ConflictError,
    DamagedError,
    NotFoundError,
    TransientError,
    UsageError,
)
from calve.transport import sigv4
from calve.transport.call import signed_request
from calve.transport.credentials import Provider
from calve.transport.http import Client, Response
from calve.transport.retry import retry
from calve.transport.sigv4 import Signer
from calve.transport.status import Problem, error_from, parse_error

if TYPE_CHECKING:
    from xml.etree import ElementTree as ET

__all__ = ["PART_BYTES", "S3Objects"]

PART_BYTES = 16 << 20  # what goes out in one request, and what is held of a stream
_MAX_PARTS = 10_000
_ANSWER_BYTES = 64 * 1024
_LISTING_BYTES = 8 << 20  # 1,000 keys of 1 KiB, and what XML makes of them
_MOST_KEYS = 1000  # of one DeleteObjects
_LAST_S = 3.0  # for the network, when the user has already asked us to stop
_COMPLETE_READ_S = 60.0  # S3 may take minutes to join parts: asked again, it goes on
_UPLOAD_ID = re.compile(r"<UploadId>([^<]{1,1024})</UploadId>")


class S3Objects(web.Remote):
    """A cache in a bucket.

    Args:
        where: bucket, prefix, region and endpoint.
        client: sends requests.
        provider: of credentials; None where the bucket is public.
    """

    def __init__(self, where: S3, client: Client, provider: Provider | None) -> None:
        prefix = f"/{where.prefix.rstrip('/')}" if where.prefix else ""
        signer = None
        if provider is not None:
            signer = Signer("s3", where.region, provider, clock=client.clock)
        super().__init__(f"s3://{where.bucket}{prefix}", where.base, client, signer)
        self._bucket = where.bucket
        self._prefix = where.prefix

    def address(self, key: str) -> str:
        """Return the http(s) URL of an object; of the bucket for an empty key."""
        name = objects.check_key(key, self._url) if key else ""
        return f"{self._base}/{sigv4.encode(self._prefix + name)}" if name else f"{self._base}/"

    def explain(self, error: CalveError, key: str) -> CalveError:
        """Return the error to raise for one of the transport's."""
        if isinstance(error, NotFoundError) and error.service_code == "NoSuchBucket":
            return objects.MissingCacheError(
                f"there is no bucket {self._bucket}",
                place=self._url,
                hint="check its name, region and endpoint",
            )
        return super().explain(error, key)

    # Writing

    def put(
        self,
        key: str,
        data: bytes,
        *,
        only_new: bool = False,
        match: str | None = None,
        content_type: str | None = None,
    ) -> bool:
        """Write an object in one request."""
        headers = {"content-type": content_type or objects.content_type(key)}
        if only_new:
            headers["if-none-match"] = "*"
        if match is not None:
            headers["if-match"] = match
        try:
            self.send(
                "PUT", key, headers=headers | self._sums(data), body=data, limit=_ANSWER_BYTES
            )
        except ConflictError:
            if only_new or match is not None:
                return False
            raise
        except objects.MissingCacheError:
            raise
        except NotFoundError:
            if match is not None:
                return False
            raise
        return True

    def put_stream(
        self,
        key: str,
        chunks: Iterator[bytes],
        *,
        only_new: bool = False,
        content_type: str | None = None,
    ) -> bool:
        """Write an object of unknown size; its last byte is sent only after `chunks` has ended without an error."""
        upload = ""
        done: list[str] = []
        try:
            for data in _parts(chunks):
                if not upload:
                    if len(data) < PART_BYTES:
                        return self.put(key, data, only_new=only_new, content_type=content_type)
                    upload = self._begin(key, content_type)
                elif len(done) == _MAX_PARTS:
                    raise self._too_large(key)  # noqa: TRY301
                done.append(self._put_part(key, upload, len(done) + 1, data))
                del data  # while the next part grows
            if not upload:
                return self.put(key, b"", only_new=only_new, content_type=content_type)
            if self._complete(key, upload, done, only_new=only_new):
                return True
        except BaseException:
            if upload:
                self._abort(key, upload)
            raise
        self._abort(key, upload)
        return False

    def _too_large(self, key: str) -> UsageError:
        most = _MAX_PARTS * PART_BYTES >> 30
        return UsageError(f"larger than the {most} GiB of an upload", place=f"{self._url}/{key}")

    def _begin(self, key: str, content_type: str | None) -> str:
        """Begin an upload in parts; return the part of the query that names it."""
        headers = {
            "content-type": content_type or objects.content_type(key),
            "x-amz-checksum-algorithm": "SHA256",
        }
        _, body = self.send("POST", key, query="?uploads=", headers=headers, limit=_ANSWER_BYTES)
        found = _UPLOAD_ID.search(body.decode("utf-8", "replace"))
        if found is None:
            raise DamagedError("S3 began an upload without an id", place=f"{self._url}/{key}")
        return sigv4.query([("uploadId", found[1])])

    def _put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Send a part; return its entry in the list of parts."""
        sums = self._sums(data)
        query = f"?partNumber={number}&{upload}"
        response, _ = self.send(
            "PUT", key, query=query, headers=sums, body=data, limit=_ANSWER_BYTES
        )
        tag = response.headers.get("etag", "").strip('"')
        if not (tag.isascii() and tag.isalnum()):
            raise DamagedError("S3 took a part without an ETag", place=f"{self._url}/{key}")
        return (
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{tag}&quot;</ETag>"
            f"<ChecksumSHA256>{sums['x-amz-checksum-sha256']}</ChecksumSHA256></Part>"
        )

    def _complete(self, key: str, upload: str, parts: Sequence[str], *, only_new: bool) -> bool:
        """Join the parts; False where an object is there already."""
        body = (
            '<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"{''.join(parts)}</CompleteMultipartUpload>"
        ).encode("ascii")
        headers = {"content-type": "application/xml"}
        if only_new:
            headers["if-none-match"] = "*"
        try:
            response, answer = self.send(
                "POST",
                key,
                query=f"?{upload}",
                headers=headers,
                body=body,
                limit=_ANSWER_BYTES,
                read_s=_COMPLETE_READ_S,
            )
            self._check_completed(key, response, answer)
        except ConflictError:
            if only_new:
                return False
            raise
        except NotFoundError:
            # The upload is gone: an earlier attempt, whose answer was lost, may have completed it.
            if self.head(key) is None:
                raise
            return not only_new
        return True

    def _check_completed(self, key: str, response: Response, answer: bytes) -> None:
        """S3 answers 200 at once, and says how it went in the body."""
        problem = parse_error(answer, response.headers)
        if problem.code:
            raise error_from(200, problem, response.headers, place=f"{self._url}/{key}")

    def _abort(self, key: str, upload: str) -> None:
        """Remove the parts; after a Ctrl-C too, by one request that is not waited for long."""
        # Where this fails too, the bucket's lifecycle removes the parts.
        with suppress(CalveError):
            if not self._client.cancel.cancelled:
                self.send("DELETE", key, query=f"?{upload}", limit=_ANSWER_BYTES)
                return
            with (
                self._client.heir(connect_s=_LAST_S, read_s=_LAST_S) as client,
                signed_request(client, self._signer, "DELETE", f"{self.address(key)}?{upload}"),
            ):
                pass

    def _sums(self, data: bytes) -> dict[str, str]:
        digest = hashlib.sha256(data).digest()
        encoded = binascii.b2a_base64(digest, newline=False).decode("ascii")
        sums = {"x-amz-checksum-sha256": encoded}
        if self._signer is not None:
            sums["x-amz-content-sha256"] = digest.hex()
        return sums

    # Removing

    def delete(self, key: str, *, match: str | None = None) -> bool:
        """Remove an object, or only its version `match`; nothing happens where there is none."""
        headers = {} if match is None else {"if-match": match}
        try:
            self.send("DELETE", key, headers=headers, limit=_ANSWER_BYTES)
        except ConflictError:
            if match is None:
                raise
            return False
        except objects.MissingCacheError:
            raise
        except NotFoundError:
            return True  # so S3 answers where there is a condition, and nothing to hold it against
        return True

    def delete_many(self, listed: Iterable[Listed]) -> list[Listed]:
        """Remove objects unless they changed since they were listed; return those that changed and stay.

        A request for every 1,000 (DeleteObjects); S3 judges the condition of each by its own.
        """
        stayed: list[Listed] = []
        batch: dict[str, Listed] = {}
        for one in listed:
            batch[self._prefix + objects.check_key(one.key, self._url)] = one
            if len(batch) == _MOST_KEYS:
                stayed += self._delete_batch(batch)
                batch = {}
        return stayed + self._delete_batch(batch) if batch else stayed

    def _delete_batch(self, left: dict[str, Listed]) -> list[Listed]:
        """Remove what is `left`, by names in the bucket; S3 may do it for some, and want to be asked again."""
        stayed: list[Listed] = []

        def once() -> None:
            nonlocal left
            again: dict[str, Listed] = {}
            errors: list[CalveError] = []
            for name, code, error in self._delete_once(left):
                if code == "PreconditionFailed":
                    stayed.append(left[name])
                elif code != "NoSuchKey":
                    errors.append(error)
                    again[name] = left[name]
            left = again
            for error in sorted(errors, key=lambda one: isinstance(one, TransientError)):
                raise error  # a lasting one first

        retry(once, cancel=self._client.cancel, clock=self._client.clock)
        return stayed

    def _delete_once(self, left: dict[str, Listed]) -> Iterator[tuple[str, str, CalveError]]:
        """Ask S3 once to remove objects; yield what it says it did not: names, codes and errors."""
        entries = "".join(
            f"<Object><Key>{_escaped(name)}</Key><ETag>{_escaped(one.tag)}</ETag></Object>"
            for name, one in left.items()
        )
        body = (
            '<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"{entries}<Quiet>true</Quiet></Delete>"
        ).encode()
        md5 = hashlib.md5(body, usedforsecurity=False).digest()
        headers = {
            "content-type": "application/xml",
            # AWS takes either; other stores know only the older one.
            "content-md5": binascii.b2a_base64(md5, newline=False).decode("ascii"),
            **self._sums(body),
        }
        try:
            response, answer = self.send_once(
                "POST", "", query="?delete=", headers=headers, body=body, limit=_LISTING_BYTES
            )
        except CalveError as error:
            raise self.explain(error, "") from error
        root, space = self._parsed(answer, "the answer to a removal")
        if root.tag != f"{space}DeleteResult":
            problem = parse_error(answer, response.headers)
            raise error_from(200, problem, response.headers, place=self._url)
        for found in root.iterfind(f"{space}Error"):
            name = found.findtext(f"{space}Key") or ""
            if name not in left:
                raise DamagedError(
                    "S3 answers about another object than was asked", place=self._url
                )
            code = found.findtext(f"{space}Code") or ""
            problem = Problem(code, found.findtext(f"{space}Message") or "")
            yield name, code, error_from(200, problem, {}, place=f"{self._url}/{left[name].key}")

    # Listing

    def list(self, prefix: str) -> Iterator[Listed]:
        """Return the objects whose keys begin so, sorted by the bytes of their keys; 1,000 a request."""
        token: str | None = None
        while True:
            pairs = [("list-type", "2"), ("prefix", self._prefix + prefix)]
            if token is not None:
                pairs.append(("continuation-token", token))
            page, token = self._page(sigv4.query(sorted(pairs)))
            yield from page
            if token is None:
                return

    def _page(self, query: str) -> tuple[Sequence[Listed], str | None]:
        _, body = self.send("GET", "", query=f"?{query}", limit=_LISTING_BYTES)
        root, space = self._parsed(body, "the listing")
        page = [self._listed(found, space) for found in root.iterfind(f"{space}Contents")]
        more = root.findtext(f"{space}IsTruncated") == "true"
        token = root.findtext(f"{space}NextContinuationToken")
        if more and not token:
            raise DamagedError("the listing goes on nowhere", place=f"{self._url}/")
        return page, token if more else None

    def _listed(self, found: ET.Element, space: str) -> Listed:
        from datetime import datetime

        name, tag = found.findtext(f"{space}Key"), found.findtext(f"{space}ETag")
        size = found.findtext(f"{space}Size") or ""
        try:
            modified = datetime.fromisoformat(found.findtext(f"{space}LastModified") or "")
        except ValueError:
            modified = None
        if not (
            name and tag and modified and modified.tzinfo and size.isascii() and size.isdigit()
        ):
            raise DamagedError("an entry of the listing is malformed", place=f"{self._url}/")
        if len(size) > 18 or not name.startswith(self._prefix):
            raise DamagedError("an entry of the listing makes no sense", place=f"{self._url}/")
        key = name.removeprefix(self._prefix)
        return Listed(key, int(size), tag, modified.timestamp())

    def _parsed(self, body: bytes, what: str) -> tuple[ET.Element, str]:
        """Parse an answer of XML; return its root, and what stands before the names of its elements."""
        from xml.etree import ElementTree as ET

        try:
            root = ET.fromstring(body)  # noqa: S314  (expat bounds the expansion of entities)
        except (ET.ParseError, LookupError, ValueError) as error:  # the latter of its encoding
            raise DamagedError(f"{what} is not XML: {error}", place=f"{self._url}/") from error
        return root, root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""


def _escaped(text: str) -> str:
    """Return text as XML has it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream into parts of PART_BYTES; the last is shorter, and not there where nothing is left.

    A part is held once: `getvalue` gives the memory that it grew in, not a copy.
    """
    buffer = io.BytesIO()
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest) >= (left := PART_BYTES - buffer.tell()):
            buffer.write(rest[:left])
            rest = rest[left:]
            yield buffer.getvalue()
            buffer = io.BytesIO()
        buffer.write(rest)
    if buffer.tell():
        yield buffer.getvalue()
