"""An image that was built becomes an AMI: written onto its parent's snapshot, read back, registered; in one region.

Each step finds what an earlier run did: the snapshot by the plan's token, the image by its name, which follows from
what the disk holds. So whatever is run again, after whatever, ends with the same image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from calve.aws.ebs import EbsDirect
from calve.aws.images import Ami, Images
from calve.clock import SYSTEM, Clock
from calve.disk.disk import Disk
from calve.disk.inspect.report import Expected, Inspection, WantedPartition
from calve.disk.inspect.report import inspect as inspect_disk
from calve.errors import ConflictError, NotFoundError, UsageError, VerificationError
from calve.image import ami
from calve.image.built import Built
from calve.image.parent import SnapshotBlocks
from calve.image.plan import BlockPlan, Parent, plan, whole
from calve.image.upload import Snapshot, Upload, abort, journal_of
from calve.image.verify import Verified, verify
from calve.image.waiting import known
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel

__all__ = ["Published", "Publisher", "architecture"]

_EC2_ARCH: Final = {"x86_64": "x86_64", "aarch64": "arm64"}


def architecture(disk: Disk) -> str:
    """Return EC2's name of a disk's processor."""
    return _EC2_ARCH[disk.arch.name]


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it.

    Attributes:
        region: where.
        image: id of the AMI.
        name: its name.
        snapshot: what was written.
        verified: what was read back.
    """

    region: str
    image: str
    name: str
    snapshot: Snapshot
    verified: Verified


def expected(built: Built) -> Expected:
    """Return what must be on an image's disk, for the reader."""
    loader = built.loader
    sections = {} if loader is None else {".linux": loader.kernel, ".initrd": loader.initrd}
    return Expected(
        closure=dict(built.paths) or None,
        partitions=[
            WantedPartition(one.type, one.start_bytes, one.size_bytes, name=one.name)
            for one in built.disk.partitions
        ]
        or None,
        cmdline=None if loader is None else loader.command_line,
        sections=sections,
        machine=None if loader is None else built.disk.arch.name,
    )


@dataclass(frozen=True, slots=True)
class Publisher:
    """Works in one region.

    Attributes:
        region: its name.
        ebs: EBS direct there.
        images: EC2 there.
        progress: told of steps.
        cancel: ends it.
        clock: for waits.
    """

    region: str
    ebs: EbsDirect
    images: Images
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)
    clock: Clock = SYSTEM

    def publish(
        self,
        built: Built,
        planned: BlockPlan | None = None,
        *,
        revision: str = "",
        deep: bool = False,
    ) -> Published:
        """Write, verify and register.

        Args:
            built: the image.
            planned: what `plan` says of it, where that is known already.
            revision: of the configuration that it was built from, for its tags.
            deep: read every block back, and what the disk is made of.

        Raises:
            VerificationError: the snapshot is not what was planned; it is not registered.
            CalveError: of the services.
        """
        planned = planned or self.plan(built)
        snapshot = self.upload(built, planned)
        verified = self.verify(built.disk, planned, snapshot.id, deep=deep)
        verified.check(snapshot.id)
        if deep:
            _check(self.inspect(built, snapshot.id), snapshot.id)
        image = self.register(built, planned, snapshot.id, revision=revision)
        name = ami.image_name(built.line, built.disk)
        return Published(self.region, image, name, snapshot, verified)

    def plan(self, built: Built) -> BlockPlan:
        """Decide what to write: an overlay goes onto the snapshot of its parent in this region.

        Raises:
            NotFoundError: the parent has no snapshot here.
        """
        if built.disk.parent is None:
            return plan(built.disk)
        if built.parent is None:
            raise UsageError(
                "it is an overlay, and its parent's description is gone", place=built.directory
            )
        return plan(built.disk, Parent(self.snapshot_of(built.disk.parent), built.parent))

    def snapshot_of(self, digest: str) -> str:
        """Find the completed snapshot of a disk in this region.

        Raises:
            NotFoundError: there is none.
        """
        found = self._holding(ami.DISK, digest)
        if not found:
            raise NotFoundError(
                f"no snapshot in {self.region} holds the disk {digest[:12]}",
                hint="upload the parent there first, or build the image with --full",
            )
        return found[0]

    def _holding(self, tag: str, value: str) -> list[str]:
        """Return the completed snapshots with a tag, the oldest first."""
        rows = self.images.snapshots(tag)
        found = [row for row in rows if row.tags.get(tag) == value and row.state == "completed"]
        return [row.id for row in sorted(found, key=lambda row: (row.started, row.id))]

    def written(self, planned: BlockPlan) -> str | None:
        """Return the completed snapshot that holds this very plan; None where there is none."""
        return next(iter(self._holding(ami.PLAN, planned.digest)), None)

    def find(self, built: Built) -> tuple[str, BlockPlan]:
        """Find the snapshot of an image in this region, and what is to be held against it.

        Where it was not written by the plan of today (the parent's snapshot is gone, or it was copied), that is every
        block of it.

        Raises:
            NotFoundError: it was not uploaded here.
        """
        try:
            planned = self.plan(built)
            written = self.written(planned)
        except NotFoundError:
            written = None
        if written is not None:
            return written, planned
        found = self._holding(ami.DISK, built.disk.digest)
        if not found:
            raise NotFoundError(
                f"no snapshot in {self.region} holds this image",
                place=built.directory if built.file is None else built.file,
                hint="calve image upload writes it",
            )
        return found[-1], whole(built.disk)

    def upload(self, built: Built, planned: BlockPlan) -> Snapshot:
        """Write the snapshot, or finish what an earlier run began; one that holds this very plan is taken as it is.

        Its tags say nothing of the revision: a run that goes on after a commit has to ask for the same snapshot.
        """
        done = self.written(planned)
        if done is not None:
            return Snapshot(done, len(planned.blocks), 0)
        return self._upload(built, planned).run()

    def abort(self, built: Built) -> str | None:
        """Delete the snapshot that an interrupted upload left pending; return its id, None where there is none."""
        return abort(self.images, journal_of(built.raw, self.region))

    def _upload(self, built: Built, planned: BlockPlan) -> Upload:
        return Upload(
            self.ebs,
            self.images,
            self.region,
            built.raw,
            planned,
            self.tags(built, planned),
            ami.image_name(built.line, built.disk),
            progress=self.progress,
            cancel=self.cancel,
            clock=self.clock,
        )

    def verify(
        self, disk: Disk, planned: BlockPlan, snapshot: str, *, deep: bool = False
    ) -> Verified:
        """Read a snapshot back, block by block."""
        self.progress(Note(f"verifying {snapshot}"))
        return verify(
            self.ebs,
            snapshot,
            planned,
            disk,
            deep=deep,
            progress=self.progress,
            cancel=self.cancel,
        )

    def inspect(self, built: Built, snapshot: str) -> Inspection:
        """Read a snapshot as firmware, kernel and Nix would: by a reader that shares no code with the writers."""
        # The disk's own end, not the volume's: one that was made elsewhere may end within a GiB.
        source = SnapshotBlocks(self.ebs, snapshot, self.cancel).source(built.disk.end_bytes)
        return inspect_disk(source, expected(built))

    def register(
        self, built: Built, planned: BlockPlan, snapshot: str, *, revision: str = ""
    ) -> str:
        """Register the image, unless it is; return its id.

        Raises:
            ConflictError: another image has its name.
        """
        return self.register_as(
            ami.image_name(built.line, built.disk),
            snapshot,
            architecture=architecture(built.disk),
            size_gib=planned.size_gib,
            description=f"Calve: {built.closure or built.line}",
            tags=self.tags(built, planned, revision=revision),
            holds=ami.DISK,
        )

    def register_as(
        self,
        name: str,
        snapshot: str,
        *,
        architecture: str,
        size_gib: int,
        description: str,
        tags: Mapping[str, str],
        holds: str,
    ) -> str:
        """Register an image, unless one that holds the same has the name; return its id.

        Whoever uses it at once finds it, unless EC2 does not know it after 15 s. Arguments as of `Images.register`.

        Args:
            name: its name.
            snapshot: its root volume's.
            architecture: of its kernel.
            size_gib: of the volume.
            description: for people.
            tags: its own, `holds` among them.
            holds: the tag that says what an image holds.

        Raises:
            ConflictError: an image with the name holds something else.
        """
        found = self._registered(name)
        if found is None:
            try:
                made = self.images.register(
                    name,
                    snapshot=snapshot,
                    architecture=architecture,
                    size_gib=size_gib,
                    description=description,
                    tags=tags,
                )
            except ConflictError:
                found = self._registered(name)  # somebody else was first, with the same
                if found is None:
                    raise
            else:
                known(self.images, made, cancel=self.cancel, clock=self.clock)
                return made
        if found.tags.get(holds) != tags[holds]:
            raise ConflictError(f"{found.id} has the name {name}, and holds something else")
        return found.id

    def _registered(self, name: str) -> Ami | None:
        return next(iter(self.images.images(name=name)), None)

    def tags(self, built: Built, planned: BlockPlan, *, revision: str = "") -> dict[str, str]:
        """Return the tags of an image and its snapshot."""
        closure = "" if built.closure is None else str(built.closure)
        return ami.tags(built.line, built.disk, planned, closure=closure, revision=revision)


def _check(found: Inspection, snapshot: str) -> None:
    """Raise VerificationError, which names the first finding, where there is one."""
    if found.findings:
        first = found.findings[0]
        raise VerificationError(
            f"{first.check}: {first.place}: {first.message}",
            place=snapshot,
            hint="delete the snapshot, and build the image again with --full",
        )
