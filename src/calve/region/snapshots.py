"""Snapshots as EC2 shows them: described, shared, copied, deleted; encryption by default.

Source: EC2 API reference, DescribeSnapshots, DeleteSnapshot, ModifySnapshotAttribute, CopySnapshot,
EnableEbsEncryptionByDefault; "Error codes" of the same. What is held stands in `blocks`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calve.region import permissions
from calve.region.names import ACCOUNT
from calve.region.query import EC2, Action, Params, filters, page, time_of
from calve.region.signature import Refusal
from calve.region.snapshot import BLOCK_BYTES, Snapshot, Start, State
from calve.region.tags import specified, tag_facts, tag_set

if TYPE_CHECKING:
    from calve.region.blocks import Snapshots

__all__ = ["SnapshotActions", "find_snapshot"]

_FILTERS = {"snapshot-id", "owner-id", "status", "description", "encrypted", "volume-size"}
_NO_VOLUME = "vol-ffffffff"
"""What stands for the volume where a snapshot was made of none."""


class SnapshotActions:
    """EC2's actions on snapshots.

    Args:
        snapshots: Those of the region.
        neighbour: Finds another region's by its name; None where there is none.
        used_by: Says which images use a snapshot.
    """

    dialect = EC2

    def __init__(
        self,
        snapshots: Snapshots,
        neighbour: Callable[[str], Snapshots | None],
        used_by: Callable[[str], list[str]],
    ) -> None:
        self._snapshots = snapshots
        self._neighbour = neighbour
        self._used_by = used_by
        self.actions: Mapping[str, Action] = {
            "DescribeSnapshots": self._describe,
            "DeleteSnapshot": self._delete,
            "ModifySnapshotAttribute": self._modify,
            "DescribeSnapshotAttribute": self._attribute,
            "CopySnapshot": self._copy,
            "EnableEbsEncryptionByDefault": self._encrypt,
            "DisableEbsEncryptionByDefault": self._do_not_encrypt,
            "GetEbsEncryptionByDefault": self._is_encrypting,
        }

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        ids, owners = params.strings("SnapshotId"), params.strings("Owner")
        match = filters(params, _FILTERS)
        found = self._snapshots.all()
        if ids:
            found = [find_snapshot(self._snapshots, one) for one in ids]
        if owners and not set(owners) & {"self", ACCOUNT}:
            found = []
        found = [one for one in found if match(_facts(one))]
        if params.integer("MaxResults", 5, 1000) is not None and ids:
            raise Refusal(
                400,
                "InvalidParameterCombination",
                "The parameter snapshotSet cannot be used with the parameter maxResults",
            )
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=1000)
        params.done()
        return {"snapshotSet": [self._row(one) for one in shown], "nextToken": token}

    def _row(self, one: Snapshot) -> dict[str, Any]:
        done = one.state is State.COMPLETED
        blocks = len(self._snapshots.blocks(one.id)) if done else None
        return {
            "snapshotId": one.id,
            "volumeId": _NO_VOLUME,
            "status": one.state.value,
            "statusMessage": one.message or None,
            "startTime": time_of(one.started_at),
            "completionTime": None if one.completed_at is None else time_of(one.completed_at),
            "progress": f"{self._snapshots.progress(one.id)}%",
            "ownerId": ACCOUNT,
            "volumeSize": one.gib,
            "description": one.description,
            "encrypted": one.encrypted,
            "kmsKeyId": one.key_arn,
            "storageTier": "standard",
            "fullSnapshotSizeInBytes": None if blocks is None else blocks * BLOCK_BYTES,
            "tagSet": tag_set(one.tags),
        }

    def _delete(self, params: Params, _now: float) -> Mapping[str, Any]:
        found = find_snapshot(self._snapshots, params.need("SnapshotId"))
        params.done()
        users = self._used_by(found.id)
        if users:
            raise Refusal(
                400,
                "InvalidSnapshot.InUse",
                f"The snapshot {found.id} is currently in use by {', '.join(users)}",
            )
        self._snapshots.delete(found.id)
        return {"return": True}

    def _modify(self, params: Params, _now: float) -> Mapping[str, Any]:
        found = find_snapshot(self._snapshots, params.need("SnapshotId"))
        _check_attribute(params.text("Attribute") or "createVolumePermission")
        shared = permissions.change(params, "CreateVolumePermission", found.shared_with)
        params.done()
        self._snapshots.update(found.id, lambda one: replace(one, shared_with=shared))
        return {"return": True}

    def _attribute(self, params: Params, _now: float) -> Mapping[str, Any]:
        found = find_snapshot(self._snapshots, params.need("SnapshotId"))
        _check_attribute(params.need("Attribute"))
        params.done()
        return {
            "snapshotId": found.id,
            "createVolumePermission": permissions.rows(found.shared_with),
        }

    def _copy(self, params: Params, _now: float) -> Mapping[str, Any]:
        region, source_id = params.need("SourceRegion"), params.need("SourceSnapshotId")
        destination = params.text("DestinationRegion") or self._snapshots.region
        ask = Start(
            gib=0,
            description=params.text("Description") or "",
            encrypted=params.boolean("Encrypted"),
            key_arn=params.text("KmsKeyId"),
            tags=tuple(specified(params, "snapshot")["snapshot"].items()),
        )
        params.text("PresignedUrl")  # boto3 makes one; who asks was verified already
        params.done()
        source = self._neighbour(region)
        if source is None or destination != self._snapshots.region:
            raise Refusal(400, "InvalidParameterValue", f"Invalid region '{region}'.")
        if find_snapshot(source, source_id).state is not State.COMPLETED:
            raise Refusal(
                400, "IncorrectState", f"Snapshot {source_id} is not in the 'completed' state."
            )
        made = self._snapshots.copy(source, source_id, ask)
        return {"snapshotId": made.id, "tagSet": tag_set(made.tags)}

    def _encrypt(self, params: Params, _now: float) -> Mapping[str, Any]:
        return self._switch(params, on=True)

    def _do_not_encrypt(self, params: Params, _now: float) -> Mapping[str, Any]:
        return self._switch(params, on=False)

    def _is_encrypting(self, params: Params, _now: float) -> Mapping[str, Any]:
        return self._switch(params, on=self._snapshots.encrypted_by_default)

    def _switch(self, params: Params, *, on: bool) -> Mapping[str, Any]:
        params.done()
        self._snapshots.encrypted_by_default = on
        return {"ebsEncryptionByDefault": on}


def find_snapshot(snapshots: Snapshots, snapshot_id: str) -> Snapshot:
    """Return a snapshot; EC2's refusal where there is none."""
    if not re.fullmatch(r"snap-[0-9a-f]{8,17}", snapshot_id):
        raise Refusal(
            400,
            "InvalidSnapshotID.Malformed",
            f'Value ({snapshot_id}) for parameter snapshotId is invalid. Expected: "snap-...".',
        )
    found = snapshots.find(snapshot_id)
    if found is None:
        raise Refusal(
            400, "InvalidSnapshot.NotFound", f"The snapshot '{snapshot_id}' does not exist."
        )
    return found


def _facts(one: Snapshot) -> dict[str, str]:
    facts = {
        "snapshot-id": one.id,
        "owner-id": ACCOUNT,
        "status": one.state.value,
        "description": one.description,
        "encrypted": "true" if one.encrypted else "false",
        "volume-size": str(one.gib),
    }
    return facts | tag_facts(one.tags)


def _check_attribute(name: str) -> None:
    if name != "createVolumePermission":
        raise Refusal(
            400, "InvalidParameterValue", f"The attribute '{name}' is not simulated, or none."
        )
