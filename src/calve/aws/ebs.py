"""EBS direct: snapshots written and read block by block, over the HTTP client in place of boto3.

One request a call: what may be sent again, and when, is the caller's. A block's checksum is given, not computed: the
service holds the data against it, so that a file that changed since it was planned is refused.
Source: EBS direct API reference (2019-11-02); the request's body is left out of the signature over TLS and else, as its
model says (`v4-unsigned-body`): the checksum's header is signed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from calve.errors import DamagedError
from calve.transport import sigv4
from calve.transport.call import signed_request

if TYPE_CHECKING:
    from calve.transport.credentials import Provider
    from calve.transport.http import Client, Response

__all__ = ["BLOCK_BYTES", "EbsDirect", "Listed", "Started", "configured_endpoint"]

BLOCK_BYTES: Final = 512 << 10

_ANSWER_BYTES: Final = 8 << 20  # a page of 10,000 blocks and their tokens
_PAGE: Final = 10_000
_EMPTY_PAGES: Final = 1000
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Started:
    """A snapshot that was started; or that an earlier request with the same token had started.

    Attributes:
        id: of EC2.
        status: `pending`, `completed`, `error`.
        started_s: since 1970, by the service's clock; None where it does not say.
    """

    id: str
    status: str
    started_s: float | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """A block that can be read: its index, and the token that reading it wants."""

    index: int
    token: str


def configured_endpoint(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the endpoint that the environment names, by the variables that boto3 reads; None for AWS's own.

    Source: https://docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html
    """
    return environ.get("AWS_ENDPOINT_URL_EBS") or environ.get("AWS_ENDPOINT_URL") or None


def _acts(*actions: str) -> Callable[[F], F]:
    """Mark a method with the IAM actions it needs; see `session.actions_of`."""

    def mark(method: F) -> F:
        method.actions = actions  # type: ignore[attr-defined]
        return method

    return mark


class EbsDirect:
    """EBS direct in one region; used by many threads.

    Every method raises what `transport.call.signed_request` does: TransientError for throttling and faults of the
    service, NotFoundError, ConflictError, AccessError, RefusedError for a request that is wrong.

    Args:
        client: sends requests; the caller closes it.
        region: its name.
        provider: of credentials.
        endpoint: in place of AWS's own.
    """

    def __init__(
        self, client: Client, region: str, provider: Provider, *, endpoint: str | None = None
    ) -> None:
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        self._region = region
        self._provider = provider
        self._client = client
        self._base = (endpoint or f"https://ebs.{region}.{domain}").rstrip("/")
        self._signer = sigv4.Signer("ebs", region, provider, clock=client.clock)

    @contextlib.contextmanager
    def apart(self, *, connect_s: float, read_s: float) -> Iterator[EbsDirect]:
        """Give one with connections and time-outs of its own, which `cut` ends."""
        client = self._client.heir(connect_s=connect_s, read_s=read_s)
        try:
            yield EbsDirect(client, self._region, self._provider, endpoint=self._base)
        finally:
            client.close()

    def cut(self) -> None:
        """End every request that is under way, with CancelledError, and all later ones."""
        self._client.cancel.cancel()

    @_acts("ebs:StartSnapshot", "ec2:CreateTags")
    def start(
        self,
        size_gib: int,
        *,
        token: str,
        parent: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        timeout_minutes: int = 60,
    ) -> Started:
        """Start a snapshot, or find the one that was started with the same token.

        Args:
            size_gib: of the volumes that are made of it.
            token: at most 255 characters; with other parameters, ConflictError.
            parent: the snapshot whose blocks it has where none are written.
            description: shown by EC2.
            tags: it has from its beginning.
            timeout_minutes: without a block for so long, it ends in error.
        """
        body: dict[str, Any] = {
            "VolumeSize": size_gib,
            "ClientToken": token,
            "Timeout": timeout_minutes,
        }
        if parent is not None:
            body["ParentSnapshotId"] = parent
        if description:
            body["Description"] = description
        if tags:
            body["Tags"] = [{"Key": key, "Value": value} for key, value in tags.items()]
        data = json.dumps(body).encode()
        answer = self._document("POST", "/snapshots", body=data)
        found = answer.get("SnapshotId")
        if not isinstance(found, str) or not found:
            raise DamagedError("the answer has no SnapshotId", place=f"{self._base}/snapshots")
        began = answer.get("StartTime")
        started_s = float(began) if isinstance(began, int | float) else None
        return Started(found, str(answer.get("Status", "")), started_s)

    @_acts("ebs:PutSnapshotBlock")
    def put(self, snapshot: str, index: int, data: bytes, sha256: bytes) -> None:
        """Write a block.

        Args:
            snapshot: its id; it is pending.
            index: of the block.
            data: 512 KiB.
            sha256: their digest; the service refuses other data.
        """
        headers = {
            "content-type": "application/octet-stream",
            "x-amz-content-sha256": sigv4.UNSIGNED_PAYLOAD,
            "x-amz-checksum": base64.b64encode(sha256).decode(),
            "x-amz-checksum-algorithm": "SHA256",
            "x-amz-data-length": str(len(data)),
        }
        with self._send(
            "PUT", f"/snapshots/{snapshot}/blocks/{index}", headers=headers, body=data
        ) as response:
            response.read_all(_ANSWER_BYTES)

    @_acts("ebs:CompleteSnapshot")
    def complete(self, snapshot: str, count: int, linear_sha256: bytes) -> None:
        """Seal a snapshot; it is `completed` some time later, or ends in error.

        Args:
            snapshot: its id.
            count: how many blocks were written, each counted once.
            linear_sha256: SHA-256 of the digests of these blocks, joined in the order of their indices.
        """
        headers = {
            "x-amz-changedblockscount": str(count),
            "x-amz-checksum": base64.b64encode(linear_sha256).decode(),
            "x-amz-checksum-algorithm": "SHA256",
            "x-amz-checksum-aggregation-method": "LINEAR",
        }
        self._document("POST", f"/snapshots/completion/{snapshot}", headers=headers)

    @_acts("ebs:ListSnapshotBlocks")
    def blocks(self, snapshot: str) -> Iterator[Listed]:
        """Yield the blocks that a completed snapshot has, its parents' too, by their index."""
        yield from self._listed(f"/snapshots/{snapshot}/blocks", {}, "Blocks", "BlockToken")

    @_acts("ebs:ListChangedBlocks")
    def changed(self, first: str, second: str) -> Iterator[Listed]:
        """Yield the blocks of `second` that differ from those of `first`; one that is gone has an empty token."""
        asked = {"firstSnapshotId": first}
        path = f"/snapshots/{second}/changedblocks"
        yield from self._listed(path, asked, "ChangedBlocks", "SecondBlockToken")

    @_acts("ebs:GetSnapshotBlock")
    def get(self, snapshot: str, block: Listed) -> bytes:
        """Read a block of a completed snapshot: 512 KiB."""
        query = sigv4.query([("blockToken", block.token)])
        path = f"/snapshots/{snapshot}/blocks/{block.index}?{query}"
        with self._send("GET", path) as response:
            data = response.read_all(BLOCK_BYTES)
        if len(data) != BLOCK_BYTES:
            raise DamagedError(
                f"block {block.index} has {len(data)} bytes", place=f"{self._base}{path}"
            )
        return data

    def _listed(
        self, path: str, asked: Mapping[str, str], rows: str, token: str
    ) -> Iterator[Listed]:
        page, empty = "", 0
        while empty < _EMPTY_PAGES:
            more = {**asked, "maxResults": str(_PAGE)} | ({"pageToken": page} if page else {})
            answer = self._document("GET", f"{path}?{sigv4.query(sorted(more.items()))}")
            found = answer.get(rows) or []
            if not isinstance(found, list):
                raise DamagedError(f"{rows} in the answer is no list", place=f"{self._base}{path}")
            for row in found:
                yield _listed(row, token, f"{self._base}{path}")
            empty = 0 if found else empty + 1  # a page may be empty and not the last
            page = str(answer.get("NextToken") or "")
            if not page:
                return
        raise DamagedError(
            f"the list has {empty} pages without a block", place=f"{self._base}{path}"
        )

    def _document(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> dict[str, Any]:
        sent = {"content-type": "application/json", **(headers or {})}
        with self._send(method, path, headers=sent, body=body) as response:
            data = response.read_all(_ANSWER_BYTES)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise DamagedError("the answer is no JSON object", place=f"{self._base}{path}")
        return answer

    def _send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Response:
        url = self._base + path
        return signed_request(self._client, self._signer, method, url, headers=headers, body=body)


def _listed(row: object, token: str, place: str) -> Listed:
    if not isinstance(row, dict) or type(row.get("BlockIndex")) is not int:
        raise DamagedError("a block in the answer has no index", place=place)
    return Listed(row["BlockIndex"], str(row.get(token) or ""))
