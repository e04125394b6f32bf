"""Objects in S3: signed, conditional, with checksums, in parts where they are large.

Source: the S3 API Reference of PutObject, CreateMultipartUpload, UploadPart, CompleteMultipartUpload,
AbortMultipartUpload, ListObjectsV2. Every body is sent with its SHA-256, which S3 compares and keeps. A stream is
held in memory up to `PART_BYTES`, and goes out in parts of that size where it is longer: nothing of it is visible
before its end.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from calve.cache import objects, web
from calve.cache.url import S3
from calve.errors import CalveError, ConflictError, DamagedError, NotFoundError, UsageError
from calve.transport import sigv4
from calve.transport.call import signed_request
from calve.transport.credentials import Provider
from calve.transport.http import Client, Response
from calve.transport.sigv4 import Signer
from calve.transport.status import error_from, parse_error

__all__ = ["PART_BYTES", "S3Objects"]

PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_ANSWER_BYTES = 64 * 1024
_LISTING_BYTES = 8 << 20  # 1,000 keys of 1 KiB, and what XML makes of them
_LAST_S = 3.0  # for the network, when the user has already asked us to stop
_COMPLETE_READ_S = 120.0  # S3 may take minutes to join parts
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

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        self.send("DELETE", key, limit=_ANSWER_BYTES)

    # Listing

    def list(self, prefix: str) -> Iterator[str]:
        """Return the keys that begin so, sorted by their bytes; a request for every 1,000."""
        token: str | None = None
        while True:
            pairs = [("list-type", "2"), ("prefix", self._prefix + prefix)]
            if token is not None:
                pairs.append(("continuation-token", token))
            keys, token = self._page(sigv4.query(sorted(pairs)))
            for key in keys:
                yield key.removeprefix(self._prefix)
            if token is None:
                return

    def _page(self, query: str) -> tuple[Sequence[str], str | None]:
        from xml.etree import ElementTree as ET

        place = f"{self._url}/"
        _, body = self.send("GET", "", query=f"?{query}", limit=_LISTING_BYTES)
        try:
            root = ET.fromstring(body)  # noqa: S314  (expat bounds the expansion of entities)
        except (ET.ParseError, LookupError, ValueError) as error:  # the latter of its encoding
            raise DamagedError(f"the listing is not XML: {error}", place=place) from error
        space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
        keys = [found.text or "" for found in root.iterfind(f"{space}Contents/{space}Key")]
        more = root.findtext(f"{space}IsTruncated") == "true"
        token = root.findtext(f"{space}NextContinuationToken")
        if more and not token:
            raise DamagedError("the listing goes on nowhere", place=place)
        return keys, token if more else None


def _parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream into parts of PART_BYTES; the last is shorter, and not there where nothing is left."""
    kept: list[bytes] = []
    size = 0
    for chunk in chunks:
        rest = chunk
        while size + len(rest) >= PART_BYTES:
            cut = PART_BYTES - size
            kept.append(rest[:cut])
            rest = rest[cut:]
            size = 0
            yield _joined(kept)
        kept.append(rest)
        size += len(rest)
    if size:
        yield _joined(kept)


def _joined(kept: list[bytes]) -> bytes:
    """Join chunks and let go of them: only the part is held while it is sent."""
    part = b"".join(kept)
    kept.clear()
    return part
