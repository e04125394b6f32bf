"""`calve image build`: a system becomes a raw disk that UEFI starts: a release image, or a base image."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session
from calve.clock import SYSTEM
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.disk.arch import Arch
    from calve.image.built import Built
    from calve.image.parent import Blocks
    from calve.image.source import Source
    from calve.image.start import Start
    from calve.nix.storepath import StorePath
    from calve.progress import Progress

__all__ = ["arguments", "run"]

_KERNEL_HEAD_BYTES: Final = 64 << 10


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "system", metavar="SYSTEM", help="a store path, or a link to one such as ./result"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for the disk and its description"
    )
    parser.add_argument(
        "--base",
        action="store_true",
        help="a base image, whose machines pull: SYSTEM gives kernel, initrd and parameters",
    )
    parser.add_argument(
        "--seed",
        action="append",
        default=[],
        metavar="PATH",
        help="a store path that a base image has from the beginning, with its closure; may be repeated",
    )
    parser.add_argument(
        "--line",
        metavar="NAME",
        help="what it is an image of (default: the parent's, else the system's name)",
    )
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        help="x86_64 or aarch64: refuse a kernel of the other (default: the kernel's)",
    )
    parser.add_argument(
        "--initrd", type=Path, metavar="FILE", help="in place of the system's own initrd"
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="ask for a root shell on the console, where the initrd allows one",
    )
    _add_source(parser)
    _add_parent(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def _add_source(parser: argparse.ArgumentParser) -> None:
    common.add_store(parser)
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="URL",
        help="a cache in place of the store: s3://…, https://…, file:///…; several are asked in order",
    )
    common.add_trusted(parser, "for --from, a public key")
    parser.add_argument(
        "--manifest",
        metavar="DIGEST",
        help="for --from, of the closure, as push printed it: saves a request for every path",
    )


def _add_parent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parent",
        type=Path,
        metavar="DIR",
        help="the image of the release before: only what differs is built",
    )
    parser.add_argument(
        "--parent-region",
        metavar="REGION",
        help="where the parent's snapshot is, if its file has changed blocks only",
    )
    parser.add_argument(
        "--verity",
        action="store_true",
        help="put a release image's closure under dm-verity (default: as the parent)",
    )
    parser.add_argument("--full", action="store_true", help="build it whole, whatever the parent")


@dataclass(frozen=True)
class _Plan:
    """What is built: of what, onto what."""

    system: StorePath
    seeds: tuple[StorePath, ...]
    line: str
    source: Source
    parent: Built | None
    why_full: str
    verity: bool


def run(options: argparse.Namespace, session: Session) -> int:
    """Build."""
    import tempfile

    _check(options)
    session.cancel.check()
    started_s = SYSTEM.monotonic()
    with (
        common.listen(session, options) as progress,
        _source(options, session, progress) as source,
        tempfile.TemporaryDirectory(prefix="calve-") as work,
        common.translated("build the image"),
    ):
        plan = _plan(options, source)
        if options.dry_run:
            _say_plan(options, session, plan, Path(work))
            return 0
        if plan.why_full:
            session.prose(plan.why_full)
        built = _build(options, session, plan, Path(work), progress)
    _print(options, session, plan, built, SYSTEM.monotonic() - started_s)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.sources and options.store is not None:
        raise UsageError("--from and --store exclude each other")
    if not options.sources and (options.manifest is not None or options.trusted):
        raise UsageError("--manifest and --trusted are for --from")
    if options.base and options.parent is not None:
        raise UsageError("a base image has no parent", hint="leave --parent out")
    if options.verity and options.base:
        raise UsageError("--verity is for release images: machines write to a base image's disk")
    if options.seed and not options.base:
        raise UsageError("--seed is for --base: a release image has its whole closure")
    if options.parent_region is not None and options.parent is None:
        raise UsageError("--parent-region goes with --parent")
    if options.initrd is not None and not options.initrd.is_file():
        raise NotFoundError("there is no such file", place=options.initrd)


# What it is built of


@contextlib.contextmanager
def _source(options: argparse.Namespace, session: Session, progress: Progress) -> Iterator[Source]:
    """Open the store, or the caches."""
    from calve.image.source import CacheSource, StoreSource

    if not options.sources:
        from calve.nix.store import LocalStore

        with LocalStore(options.store or Path("/")) as store:
            yield StoreSource(store, progress, session.cancel)
        return
    from calve.cache.sequences import trusted

    keys = common.trusted_keys(options, common.cache_of(options, "trusted"))
    manifest = common.manifest_digest(options)
    with common.caches(session, options.sources) as opened:
        known = trusted(opened, keys)
        yield CacheSource(known.caches, known.keyring, manifest, progress, session.cancel)


def _plan(options: argparse.Namespace, source: Source) -> _Plan:
    from calve.image import ami

    root = options.store or Path("/")
    system = common.resolve(options.system, root)
    seeds = tuple(common.resolve(text, root) for text in options.seed)
    parent, why = _parent(options)
    line = options.line or (ami.line_of(system) if parent is None else parent.line)
    onto = None if why or options.full else parent
    verity = options.verity or (parent is not None and parent.has_verity)
    return _Plan(system, seeds, ami.check_line(line), source, onto, why, verity)


def _parent(options: argparse.Namespace) -> tuple[Built | None, str]:
    """Read the parent; return it, and why the image is built whole although there is one."""
    from calve.image.built import load

    if options.parent is None:
        return None, ""
    parent = load(options.parent)
    if parent.layout is None:
        raise UsageError(
            "the parent is no release image", place=options.parent, hint="leave --parent out"
        )
    if not options.full and parent.layout.wants_rebase:
        return parent, "the parent is full of what later images do not have: building it whole"
    return parent, ""


# Building


def _build(
    options: argparse.Namespace, session: Session, plan: _Plan, work: Path, progress: Progress
) -> Built:
    from calve.image.base import Base
    from calve.image.release import Release
    from calve.image.start import start_of

    start = start_of(plan.source, plan.system, work, initrd=options.initrd, debug=options.debug)
    arch = _arch(options, start)
    if plan.parent is not None and plan.parent.disk.arch != arch:
        raise UsageError(
            f"the parent is for {plan.parent.disk.arch.name}, this is for {arch.name}",
            place=options.parent,
        )
    if options.base:
        base = Base(plan.line, arch, start, plan.source, plan.seeds)
        return base.build(options.out, progress=progress, cancel=session.cancel)
    with _blocks(options, session, plan.parent) as blocks:
        release = Release(
            plan.line, arch, start, plan.source, plan.system, plan.parent, blocks, plan.verity
        )
        return release.build(options.out, progress=progress, cancel=session.cancel)


def _arch(options: argparse.Namespace, start: Start) -> Arch:
    """Return the kernel's processor; UsageError where another one is named."""
    from calve.disk import pe
    from calve.disk.arch import ARCHES, arch

    named = None if options.arch is None else arch(options.arch)
    with start.kernel.open("rb") as file:
        machine = pe.machine(file.read(_KERNEL_HEAD_BYTES), start.kernel)
    found = next((one for one in ARCHES if one.machine == machine), None)
    if found is None or named not in {None, found}:
        wanted = [one.name for one in ARCHES] if named is None else [named.name]
        raise UsageError(f"it is no kernel for {' or '.join(wanted)}", place=start.kernel)
    return found


@contextlib.contextmanager
def _blocks(
    options: argparse.Namespace, session: Session, parent: Built | None
) -> Iterator[Blocks | None]:
    """Open what reads the parent's blocks: its file; its snapshot, where the file is an overlay."""
    from calve.image.parent import FileBlocks, SnapshotBlocks

    if parent is None:
        yield None
    elif parent.disk.parent is None or options.parent_region is None:
        yield FileBlocks(parent.raw, parent.disk)
    else:
        with shared.open_regions(session, [options.parent_region]) as (there,):
            snapshot = there.snapshot_of(parent.disk.digest)
            yield SnapshotBlocks(there.ebs, snapshot, session.cancel)


# What came of it


def _say_plan(options: argparse.Namespace, session: Session, plan: _Plan, work: Path) -> None:
    """Print what would be read, and where to."""
    from calve.image.start import start_of
    from calve.ui.text import mb

    roots = [plan.system]
    known = () if plan.parent is None or plan.parent.layout is None else plan.parent.layout.paths
    if options.base:
        start = start_of(plan.source, plan.system, work, initrd=options.initrd)
        roots = list(dict.fromkeys((*start.seeds, *plan.seeds)))
    wanted = plan.source.wanted(roots, known)
    nar_bytes = sum(info.nar_size for info in wanted)
    if options.json:
        session.document(
            {
                **_facts(options, plan),
                "dry_run": True,
                "read_paths": len(wanted),
                "nar_bytes": nar_bytes,
            }
        )
        return
    kind = "a base image" if options.base else "a release image"
    onto = "" if plan.parent is None else f", onto {options.parent}"
    session.result(
        f"would read {common.plural(len(wanted), 'path')}, {mb(nar_bytes)} of NARs, "
        f"into {kind} of the line {plan.line} in {options.out}{onto}"
    )
    if plan.why_full:
        session.prose(plan.why_full)


def _facts(options: argparse.Namespace, plan: _Plan) -> dict[str, object]:
    return {
        "directory": str(options.out),
        "line": plan.line,
        "system": str(plan.system),
        "base": options.base,
        "parent": None if plan.parent is None else plan.parent.disk.digest,
        "rebased": bool(plan.why_full),
        "verity": plan.verity,
    }


def _print(
    options: argparse.Namespace, session: Session, plan: _Plan, built: Built, took_s: float
) -> None:
    from calve.ui.text import mb, seconds

    disk = built.disk
    if options.json:
        session.document(
            {
                **_facts(options, plan),
                "dry_run": False,
                "file": str(built.raw),
                "arch": disk.arch.name,
                "disk": disk.digest,
                "size_bytes": disk.size_bytes,
                "blocks": len(disk.blocks),
                "changed_blocks": None if disk.changed is None else len(disk.changed),
                "seconds": round(took_s, 1),
            }
        )
        return
    content = mb(len(disk.blocks) * (512 << 10))
    changed = "" if disk.changed is None else f", {len(disk.changed)} of them changed"
    session.result(str(built.raw))
    session.prose(
        f"{disk.size_bytes >> 30} GiB for {disk.arch.name}, "
        f"{common.plural(len(disk.blocks), 'block')} ({content}){changed}; {seconds(took_s)}"
    )
