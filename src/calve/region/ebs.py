"""EBS direct: snapshots written and read over HTTP, block by block.

Source: EBS direct API reference (2019-11-02), the REST-JSON protocol of its model; "EBS direct APIs" (EBS User
Guide). Signed with SigV4; the body of PutSnapshotBlock may be unsigned, its checksum header is signed in its place.
What is held stands in `blocks`; `EbsService.handle` is what a `Server` serves.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from calve.clock import SYSTEM, Clock
from calve.region.access import denial
from calve.region.ebs_faults import EbsFault, Fail, Fewer, Forget, Late, Rot, Throttle, Twice
from calve.region.ebs_message import Call, answer, error_response, parse_start
from calve.region.faults import FaultPlan
from calve.region.message import FileRange, Request, Response
from calve.region.names import ACCOUNT, activity_uuid
from calve.region.signature import ANONYMOUS, UNSIGNED_PAYLOAD, Principals, Refusal, verify
from calve.region.snapshot import BLOCK_BYTES, Entry, invalid, not_found
from calve.region.throttles import throttled
from calve.region.tokens import BLOCK_TOKEN_S, PAGE_TOKEN_S, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calve.region.blocks import Snapshots

__all__ = ["EbsService"]

_DOCUMENT_BYTES = 64 * 1024
_RESULTS_LEAST, _RESULTS_MOST = 100, 10_000
_CHECKSUM, _ALGORITHM = "x-amz-checksum", "x-amz-checksum-algorithm"
_SHA256_BYTES = 32
_ROUTES = tuple(
    (method, re.compile(path), operation)
    for method, path, operation in (
        ("POST", r"/snapshots", "StartSnapshot"),
        ("POST", r"/snapshots/completion/(?P<id>[^/]+)", "CompleteSnapshot"),
        ("PUT", r"/snapshots/(?P<id>[^/]+)/blocks/(?P<index>[^/]+)", "PutSnapshotBlock"),
        ("GET", r"/snapshots/(?P<id>[^/]+)/blocks/(?P<index>[^/]+)", "GetSnapshotBlock"),
        ("GET", r"/snapshots/(?P<id>[^/]+)/blocks", "ListSnapshotBlocks"),
        ("GET", r"/snapshots/(?P<id>[^/]+)/changedblocks", "ListChangedBlocks"),
    )
)


class EbsService:
    """EBS direct in one region.

    Args:
        snapshots: What it serves.
        principals: Keys and policies.
        clock: For signatures.

    Attributes:
        faults: What EBS does wrong; see `ebs_faults`. What a connection does wrong is the server's.
    """

    def __init__(
        self, snapshots: Snapshots, principals: Principals, *, clock: Clock = SYSTEM
    ) -> None:
        self.faults: FaultPlan[EbsFault] = FaultPlan()
        self._snapshots = snapshots
        self._principals = principals
        self._clock = clock
        self._tokens = Tokens(hashlib.sha256(f"ebs {snapshots.region}".encode()).digest())
        self._serial = itertools.count(1)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._operations: Mapping[str, Callable[[Call], Response]] = {
            "StartSnapshot": self._start,
            "PutSnapshotBlock": self._put,
            "CompleteSnapshot": self._complete,
            "GetSnapshotBlock": self._get,
            "ListSnapshotBlocks": self._list,
            "ListChangedBlocks": self._changed,
        }

    @property
    def counts(self) -> Counter[str]:
        """Return how many requests there were, by operation, those that were refused too."""
        with self._lock:
            return Counter(self._counts)

    def handle(self, request: Request) -> Response:
        """Answer a request."""
        request_id = activity_uuid("ebs", self._snapshots.region, next(self._serial))
        try:
            operation, found = _route(request)
            with self._lock:
                self._counts[operation] += 1
            call = Call(request, operation, found, self.faults(request))
            self._identify(call)
            response = self._perform(call)
        except Refusal as refusal:
            response = error_response(refusal)
        headers = {"x-amzn-RequestId": request_id, **response.headers}
        return Response(response.status, headers, response.body)

    def _perform(self, call: Call) -> Response:
        if isinstance(call.fault, Throttle):
            raise throttled(call.fault.code, call.fault.reason)
        if call.snapshot_id:
            self._snapshots.get(call.snapshot_id)  # what is not there has no bucket
        self._snapshots.throttles.check(call.operation, call.snapshot_id)
        perform = self._operations[call.operation]
        if isinstance(call.fault, Twice):
            perform(call).close()
        return perform(call)

    # Access

    def _identify(self, call: Call) -> None:
        """Verify the signature, before the body of an unsigned one is read, and the permission."""
        request = call.request
        digest = None
        if request.headers.get("x-amz-content-sha256") != UNSIGNED_PAYLOAD:
            digest = call.digest.hex()
        elif call.operation != "PutSnapshotBlock":
            raise Refusal(403, "InvalidSignatureException", "The payload of this action is signed.")
        identity = verify(
            request,
            self._principals,
            service="ebs",
            region=self._snapshots.region,
            now=self._clock.now(),
            payload_sha256=digest,
        )
        if identity is ANONYMOUS:
            raise Refusal(
                403, "MissingAuthenticationTokenException", "Missing Authentication Token"
            )
        action = f"ebs:{call.operation}"
        resource = f"arn:aws:ec2:{self._snapshots.region}::snapshot/{call.snapshot_id or '*'}"
        if not self._principals.allows(identity, action, resource):
            raise Refusal(403, "AccessDeniedException", denial(identity, action, resource))

    # Writing

    def _start(self, call: Call) -> Response:
        ask, token = parse_start(call.body)
        late_s = call.fault.seconds if isinstance(call.fault, Late) else 0.0
        made = self._snapshots.start(ask, token, late_s=late_s)
        document = {
            "SnapshotId": made.id,
            "OwnerId": ACCOUNT,
            "Status": made.state.value,
            "StartTime": made.started_at,
            "VolumeSize": made.gib,
            "BlockSize": BLOCK_BYTES,
            "Description": made.description or None,
            "Tags": [{"Key": key, "Value": value} for key, value in made.tags.items()] or None,
            "ParentSnapshotId": made.parent_id,
            "KmsKeyArn": made.key_arn,
        }
        return answer(201, document)

    def _put(self, call: Call) -> Response:
        if call.number("x-amz-data-length") != BLOCK_BYTES:
            raise invalid(f"DataLength must be {BLOCK_BYTES}.")
        promised = _checksum(call)
        checksum = call.header(_CHECKSUM)
        progress = call.header("x-amz-progress")
        percent = call.number("x-amz-progress", 100) if progress else 0
        with self._snapshots.flight(call.snapshot_id, call.index, checksum):
            if len(call.body) != BLOCK_BYTES:
                raise invalid(f"The block has {len(call.body)} bytes, not {BLOCK_BYTES}.")
            if call.digest != promised:
                raise invalid("The checksum is not that of the data.", "INVALID_BLOCK")
            entry = self._store(call)
            self._snapshots.write(call.snapshot_id, call.index, promised, entry, percent)
        return Response(201, {"x-amz-Checksum": checksum, "x-amz-Checksum-Algorithm": "SHA256"})

    def _store(self, call: Call) -> Entry | None:
        """Put a block on disk as the call's fault has it; its blob is counted once."""
        if isinstance(call.fault, Forget):
            return None
        blobs = self._snapshots.blobs
        blob = blobs.put(call.digest, call.body)
        if not isinstance(call.fault, Rot):
            return Entry(call.digest, blob, call.snapshot_id)
        altered = blobs.alter(blob, call.fault.bit)
        blobs.drop([blob])
        digest = call.digest
        if call.fault.hidden:
            with blobs.open(altered) as file:
                digest = hashlib.sha256(file.read()).digest()
        return Entry(digest, altered, call.snapshot_id)

    def _complete(self, call: Call) -> Response:
        count = call.number("x-amz-changedblockscount")
        checksum = None
        if call.header(_CHECKSUM):
            checksum = _checksum(call)
            if call.header("x-amz-checksum-aggregation-method") != "LINEAR":
                raise invalid("ChecksumAggregationMethod must be LINEAR.")
        failure = call.fault.message if isinstance(call.fault, Fail) else ""
        self._snapshots.complete(call.snapshot_id, count, checksum, failure=failure)
        return answer(202, {"Status": "pending"})

    # Reading

    def _get(self, call: Call) -> Response:
        blocks = self._snapshots.blocks(call.snapshot_id)
        token = call.request.parameter("blockToken")
        if token is None:
            raise invalid("BlockToken is missing.")
        entry = blocks.get(call.index)
        scope = _block_scope(call.snapshot_id, call.index)
        if entry is None or self._tokens.read(scope, token, self._snapshots.now()) is None:
            raise invalid("The block token is not valid, or has expired.", "INVALID_BLOCK_TOKEN")
        headers = {
            "Content-Type": "application/octet-stream",
            "x-amz-Data-Length": str(BLOCK_BYTES),
            "x-amz-Checksum": base64.b64encode(entry.digest).decode(),
            "x-amz-Checksum-Algorithm": "SHA256",
        }
        try:
            file = self._snapshots.blobs.open(entry.blob)
        except FileNotFoundError:  # deleted this very moment
            raise not_found(call.snapshot_id) from None
        return Response(200, headers, FileRange(file, 0, BLOCK_BYTES))

    def _list(self, call: Call) -> Response:
        blocks = self._snapshots.blocks(call.snapshot_id)
        shown, following = self._page(call, f"list {call.snapshot_id}", sorted(blocks))
        expires = self._snapshots.now() + BLOCK_TOKEN_S
        rows = [
            {"BlockIndex": index, "BlockToken": self._token(call.snapshot_id, index, expires)}
            for index in shown
        ]
        return self._listing(call.snapshot_id, "Blocks", rows, expires, following)

    def _changed(self, call: Call) -> Response:
        first, second = call.request.parameter("firstSnapshotId"), call.snapshot_id
        if not first:
            raise invalid("FirstSnapshotId is missing.")
        if self._snapshots.get(first).lineage != self._snapshots.get(second).lineage:
            raise invalid(
                f"The snapshots '{first}' and '{second}' are not of one lineage.",
                "UNRELATED_SNAPSHOTS",
            )
        old, new = self._snapshots.blocks(first), self._snapshots.blocks(second)
        different = sorted(i for i in old.keys() | new.keys() if old.get(i) != new.get(i))
        shown, following = self._page(call, f"changed {first} {second}", different)
        expires = self._snapshots.now() + BLOCK_TOKEN_S
        rows = []
        for index in shown:
            row: dict[str, Any] = {"BlockIndex": index}
            if index in old:
                row["FirstBlockToken"] = self._token(first, index, expires)
            if index in new:
                row["SecondBlockToken"] = self._token(second, index, expires)
            rows.append(row)
        return self._listing(second, "ChangedBlocks", rows, expires, following)

    def _page(
        self, call: Call, scope: str, indices: Sequence[int]
    ) -> tuple[Sequence[int], str | None]:
        """Cut one page out of the indices; return it with the token of the next."""
        most = call.parameter("maxResults", _RESULTS_LEAST, _RESULTS_MOST, _RESULTS_MOST)
        start = call.parameter("startingBlockIndex", 0, 2**31 - 1, 0)
        token, now = call.request.parameter("pageToken"), self._snapshots.now()
        if token is not None:
            value = self._tokens.read(scope, token, now)
            if value is None:
                raise invalid("The page token is not valid, or has expired.", "INVALID_PAGE_TOKEN")
            start = value
        if isinstance(call.fault, Fewer):
            most = min(most, call.fault.count)
        rest = [index for index in indices if index >= start]
        if len(rest) <= most:
            return rest, None
        return rest[:most], self._tokens.issue(scope, now + PAGE_TOKEN_S, rest[most])

    def _token(self, snapshot_id: str, index: int, expires: float) -> str:
        return self._tokens.issue(_block_scope(snapshot_id, index), expires)

    def _listing(
        self,
        snapshot_id: str,
        name: str,
        rows: list[dict[str, Any]],
        expires: float,
        following: str | None,
    ) -> Response:
        document = {
            name: rows,
            "ExpiryTime": expires,
            "VolumeSize": self._snapshots.get(snapshot_id).gib,
            "BlockSize": BLOCK_BYTES,
            "NextToken": following,
        }
        return answer(200, document)


def _route(request: Request) -> tuple[str, re.Match[str]]:
    for method, pattern, operation in _ROUTES:
        found = pattern.fullmatch(request.path)
        if found and method == request.method:
            return operation, found
    raise Refusal(404, "UnknownOperationException", "There is no such operation.")


def _block_scope(snapshot_id: str, index: int) -> str:
    return f"block {snapshot_id} {index}"


def _checksum(call: Call) -> bytes:
    if call.header(_ALGORITHM) != "SHA256":
        raise invalid("ChecksumAlgorithm must be SHA256.")
    try:
        digest = base64.b64decode(call.header(_CHECKSUM), validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != _SHA256_BYTES:
        raise invalid("Checksum must be a SHA-256 in base64.")
    return digest
