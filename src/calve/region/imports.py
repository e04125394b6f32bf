"""ImportSnapshot: a snapshot out of a disk in S3, by tasks that take their time.

Source: EC2 API reference, ImportSnapshot and DescribeImportSnapshotTasks; "Import a disk as a snapshot" and
"Required service role" (VM Import/Export User Guide). Only raw disks become snapshots: a VHD or VMDK is looked at,
and its task ends with what AWS would say of a damaged one, or with a word that it is not simulated.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calve.region.message import FileRange
from calve.region.names import identifier
from calve.region.query import EC2, Action, Params, Replays, filters, page
from calve.region.signature import Identity, Principals, Refusal
from calve.region.snapshot import BLOCK_BYTES, Entry, Start, State
from calve.region.tags import specified, tag_facts, tag_set
from calve.tasks import Group

if TYPE_CHECKING:
    from calve.region.blocks import Snapshots
    from calve.region.objects import ObjectService

__all__ = ["ROLE", "Imports"]

ROLE = "vmimport"
"""The service role, where a request names no other; AWS makes none by itself."""
TASKS_MOST = 20
_GIB = 1 << 30
_VHD_FOOTER_BYTES = 512
_COOKIES = {"VHD": b"conectix", "VMDK": b"KDMV"}


@dataclass(frozen=True, slots=True)
class _Task:
    """One import.

    Attributes:
        progress: In percent.
        failure: Why it was given up; "" where it was not.
        snapshot_id: What it makes, once that is begun.
        sealed: Whether all its blocks are written.
    """

    id: str
    bucket: str
    key: str
    form: str
    size: int
    ask: Start
    description: str | None
    tags: Mapping[str, str]
    progress: int = 0
    failure: str = ""
    snapshot_id: str | None = None
    sealed: bool = False


class Imports:
    """EC2's imports of disks.

    Args:
        snapshots: Where they end.
        objects: S3 of the region.
        principals: Who knows the service role.
        threads: Runs the tasks; it has room for `TASKS_MOST`.
        seed: Names the region's story; see `names`.
    """

    dialect = EC2

    def __init__(
        self,
        snapshots: Snapshots,
        objects: ObjectService,
        principals: Principals,
        threads: Group,
        seed: str,
    ) -> None:
        self._snapshots = snapshots
        self._objects = objects
        self._principals = principals
        self._threads = threads
        self._seed = seed
        self._stopping = False
        self._serial = itertools.count(1)
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}
        self._tokens = Replays[str]()
        self.actions: Mapping[str, Action] = {
            "ImportSnapshot": self._import,
            "DescribeImportSnapshotTasks": self._describe,
        }

    def _import(self, params: Params, _now: float) -> Mapping[str, Any]:
        container = params.struct("DiskContainer")
        if container is None:
            raise _invalid("The parameter DiskContainer is missing.")
        place = container.struct("UserBucket")
        if place is None:
            raise _invalid("Only a UserBucket is simulated.")
        bucket, key = place.need("S3Bucket"), place.need("S3Key")
        form = container.need("Format").upper()
        container.text("Description")
        role, token = params.text("RoleName") or ROLE, params.text("ClientToken")
        description = params.text("Description")
        ask = Start(
            1,
            None,
            description or "",
            encrypted=params.boolean("Encrypted"),
            key_arn=params.text("KmsKeyId"),
        )
        tags = specified(params, "import-snapshot-task")["import-snapshot-task"]
        params.done()
        asked = (bucket, key, form, role, ask, str(tags))
        done = self._tokens.find(token, asked)
        if done is not None:
            return self._row(self._tasks[done])
        if form not in {"RAW", *_COOKIES}:
            raise _invalid(f"Unsupported disk format {form}.")
        body = self._open(role, bucket, key)
        task_id = identifier("import-snap", self._seed, self._snapshots.region, next(self._serial))
        task = _Task(task_id, bucket, key, form, body.size, ask, description, tags)
        self._tasks[task_id] = task
        self._tokens.keep(token, asked, task_id)
        self._threads.spawn(self._run, task, body)
        return self._row(task)

    def _open(self, role: str, bucket: str, key: str) -> FileRange:
        """Open the object as the service role; it must know the role, and the role may read."""
        resource = f"arn:aws:s3:::{bucket}/{key}"
        if not self._principals.allows(Identity(role), "s3:GetObject", resource):
            raise _invalid(
                f"The service role {role} provided does not exist or does not have sufficient permissions"
            )
        active = sum(self._status(one) == "active" for one in self._tasks.values())
        if active >= TASKS_MOST:
            raise Refusal(
                400,
                "ResourceCountLimitExceeded",
                f"There are {active} active import tasks, which is the most.",
            )
        try:
            opened = self._objects.bucket(bucket).open(key)
        except KeyError:
            opened = None
        if opened is None:
            raise _invalid(f"Invalid S3 source location: there is no s3://{bucket}/{key}")
        return opened[1]

    # One task

    def stop(self) -> None:
        """Give up what is under way."""
        self._stopping = True

    def _run(self, task: _Task, body: FileRange) -> None:
        try:
            self._make(task, body)
        except Refusal as refusal:  # its snapshot was deleted meanwhile
            self._change(task.id, failure=f"ClientError: {refusal.message}")

    def _make(self, task: _Task, body: FileRange) -> None:
        with body.file:
            failure = _fault(task.form, body)
            if failure:
                self._change(task.id, failure=failure)
                return
            gib = -(-body.size // _GIB)
            made = self._snapshots.start(replace(task.ask, gib=gib))
            self._change(task.id, snapshot_id=made.id)
            count = -(-body.size // BLOCK_BYTES)
            for index in range(count):
                if self._stopping or self._threads.cancel.cancelled:
                    return
                data = os.pread(body.file.fileno(), BLOCK_BYTES, body.offset + index * BLOCK_BYTES)
                self._write(made.id, index, data.ljust(BLOCK_BYTES, b"\0"))
                self._change(task.id, progress=100 * index // count)
            self._snapshots.complete(made.id, count)
            self._change(task.id, sealed=True)

    def _write(self, snapshot_id: str, index: int, data: bytes) -> None:
        digest = hashlib.sha256(data).digest()
        entry = Entry(digest, self._snapshots.blobs.put(digest, data), snapshot_id)
        self._snapshots.write(snapshot_id, index, digest, entry)

    def _change(self, task_id: str, **values: Any) -> None:
        with self._lock:
            self._tasks[task_id] = replace(self._tasks[task_id], **values)

    # Showing

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        ids = params.strings("ImportTaskId")
        match = filters(params, {"task-state"}, name="Filters")
        for one in ids or ():
            if one not in self._tasks:
                raise _invalid(f"The import task '{one}' does not exist.")
        with self._lock:
            tasks = list(self._tasks.values())
        found = [
            one
            for one in tasks
            if (not ids or one.id in ids)
            and match({"task-state": self._status(one), **tag_facts(one.tags)})
        ]
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=1000)
        params.done()
        rows = [self._row(one) for one in shown]
        return {"importSnapshotTaskSet": rows, "nextToken": token}

    def _status(self, task: _Task) -> str:
        if task.failure:
            return "deleted"
        made = self._snapshots.find(task.snapshot_id) if task.snapshot_id else None
        if not task.sealed or (made is not None and made.state is State.PENDING):
            return "active"
        # A task stays completed though its snapshot was deleted since.
        return "deleted" if made is not None and made.state is State.ERROR else "completed"

    def _row(self, task: _Task) -> dict[str, Any]:
        status = self._status(task)
        active = status == "active"
        phase = "pending" if task.snapshot_id is None else "converting"
        return {
            "importTaskId": task.id,
            "description": task.description,
            "snapshotTaskDetail": {
                "description": task.description,
                "diskImageSize": float(task.size),
                "encrypted": bool(task.ask.encrypted),
                "format": task.form,
                "progress": str(task.progress) if active else None,
                "snapshotId": task.snapshot_id if status == "completed" else None,
                "status": status,
                "statusMessage": task.failure or (phase if active else None),
                "userBucket": {"s3Bucket": task.bucket, "s3Key": task.key},
            },
            "tagSet": tag_set(task.tags),
        }


def _fault(form: str, body: FileRange) -> str:
    """Say why a disk is not imported; "" where it is."""
    file, end = body.file.fileno(), body.offset + body.size
    head = os.pread(file, _VHD_FOOTER_BYTES, body.offset)
    tail = os.pread(file, _VHD_FOOTER_BYTES, max(body.offset, end - _VHD_FOOTER_BYTES))
    if body.size == 0:
        return "ClientError: Disk validation failed [The disk is empty]"
    if form == "RAW":
        for other, cookie in _COOKIES.items():
            if head.startswith(cookie):
                return f"ClientError: Disk validation failed [The disk is {other}, not RAW]"
        return ""
    if not (tail if form == "VHD" else head).startswith(_COOKIES[form]):
        return f"ClientError: Disk validation failed [Invalid {form}]"
    return f"ServerError: the conversion of {form} is not simulated"


def _invalid(message: str) -> Refusal:
    return Refusal(400, "InvalidParameter", message)
