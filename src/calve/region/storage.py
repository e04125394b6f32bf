"""Snapshots, images and imports of one region, put together; and the volumes that instances boot from.

with Storage("eu-central-1", Snapshots(directory)) as storage:
    machines = QemuMachines(folder, metadata, volumes=storage.volume)
    cloud = Cloud(machines, balancer, storage=storage)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from calve.errors import NotFoundError
from calve.region.images import Images
from calve.region.imports import TASKS_MOST, Imports
from calve.region.signature import Refusal
from calve.region.snapshots import SnapshotActions
from calve.region.tags import Shelf
from calve.tasks import Group

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from calve.region.blocks import Snapshots
    from calve.region.objects import ObjectService
    from calve.region.query import Service
    from calve.region.volumes import Omitted

__all__ = ["Storage"]


class Storage:
    """What EC2 knows of disks. A context manager: leaving it stops the imports that are under way.

    Args:
        region: Its name.
        snapshots: EBS's; None where images are only added, with whoever makes machines knowing what they are.
        objects: S3, out of which disks are imported; None where none are.
        omitted: What a volume's blocks read as that nobody wrote; `random` is what an encrypted volume gives.
        neighbour: Finds another region by its name, for copies.
        seed: Names the region's story; see `names`.

    Attributes:
        services: What answers EC2's actions.
        shelves: The tags of snapshots and images, by the prefix of their ids.
    """

    def __init__(
        self,
        region: str,
        snapshots: Snapshots | None = None,
        *,
        objects: ObjectService | None = None,
        omitted: Omitted = "zeros",
        neighbour: Callable[[str], Storage | None] = lambda _region: None,
        seed: str = "region",
    ) -> None:
        self.region = region
        self.snapshots = snapshots
        self._omitted = omitted
        self._neighbour = neighbour
        self._owner = contextlib.ExitStack()
        self.images = Images(region, snapshots, self._images_of, seed)
        self.services: list[Service] = [self.images]
        self.shelves = {
            "snap": Shelf("snapshot", "InvalidSnapshot.NotFound", self._tags, self._put_tags),
            "ami": Shelf("image", "InvalidAMIID.NotFound", self.images.tags, self.images.put_tags),
        }
        if snapshots is not None:
            self.services.append(SnapshotActions(snapshots, self._snapshots_of, self.images.users))
        if snapshots is not None and objects is not None:
            threads = self._owner.enter_context(Group("region-imports", limit=TASKS_MOST))
            imports = Imports(snapshots, objects, objects.principals, threads, seed)
            self._owner.callback(imports.stop)
            self.services.append(imports)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner.__exit__(kind, error, trace)

    def _images_of(self, region: str) -> Images | None:
        found = self if region == self.region else self._neighbour(region)
        return None if found is None else found.images

    def _snapshots_of(self, region: str) -> Snapshots | None:
        found = self if region == self.region else self._neighbour(region)
        return None if found is None else found.snapshots

    def _tags(self) -> dict[str, Mapping[str, str]]:
        held = self.snapshots.all() if self.snapshots is not None else []
        return {one.id: one.tags for one in held}

    def _put_tags(self, snapshot_id: str, tags: Mapping[str, str]) -> None:
        if self.snapshots is not None:
            self.snapshots.update(snapshot_id, lambda one: replace(one, tags=dict(tags)))

    def volume(self, image_id: str, path: Path) -> str:
        """Write the root volume of an instance that is launched from an image.

        Args:
            image_id: A registered image.
            path: A new file: a raw disk.

        Returns:
            How it boots: `uefi`, `uefi-preferred` or `legacy-bios`.

        Raises:
            NotFoundError: There is no such image, or it has no snapshot.
        """
        try:
            image = self.images.find(image_id)
        except Refusal as refusal:
            raise NotFoundError(refusal.message, place=image_id) from refusal
        root = image.root
        if root is None or root.snapshot_id is None or self.snapshots is None:
            raise NotFoundError("the image has no snapshot", place=image_id)
        key = str(path).encode()
        self.snapshots.export(root.snapshot_id, path, omitted=self._omitted, key=key, gib=root.gib)
        # x86_64 boots by BIOS where the image does not say otherwise.
        return image.boot_mode or "legacy-bios"
