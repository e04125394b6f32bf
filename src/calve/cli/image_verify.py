"""`calve image verify`: a snapshot read back and held against the disk."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.disk.inspect.report import Finding as Flaw
    from calve.image.built import Built
    from calve.image.publish import Publisher
    from calve.image.verify import Finding

__all__ = ["arguments", "run"]


@dataclass(frozen=True)
class _Result:
    """What was found in one region."""

    snapshot: str
    listed: int
    read: int
    findings: tuple[Finding | Flaw, ...]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_source(parser)
    shared.add_regions(parser)
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every block, and the disk as firmware, kernel and Nix would: down to every path's hash",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Verify."""
    from calve.errors import VerificationError

    names = shared.regions(options)
    with (
        shared.open_regions(session, names) as opened,
        common.listen(session, options) as progress,
    ):
        there = shared.publishers(opened, progress)
        built = shared.take(options, session, progress)
        found = shared.everywhere(session, there, lambda one: _verify(one, built, options.deep))
    _print(options, session, built, found)
    wrong = sum(len(one.findings) for one in found.values())
    return VerificationError.exit_code if wrong else 0


def _verify(one: Publisher, built: Built, deep: bool) -> _Result:  # noqa: FBT001
    snapshot, planned = one.find(built)
    verified = one.verify(built.disk, planned, snapshot, deep=deep)
    findings: tuple[Finding | Flaw, ...] = verified.findings
    if deep:
        findings += one.inspect(built, snapshot).findings
    return _Result(snapshot, verified.listed, verified.read, findings)


def _print(
    options: argparse.Namespace, session: Session, built: Built, found: dict[str, _Result]
) -> None:
    from calve.ui.text import one_line

    if options.json:
        rows = [_row(name, one) for name, one in found.items()]
        body = {"source": str(options.source), "disk": built.disk.digest, "deep": options.deep}
        session.document({**body, "regions": rows})
        return
    for name, one in found.items():
        for flaw in one.findings:
            session.result(
                one_line(f"{name} {one.snapshot}: {flaw.check}: {flaw.place}: {flaw.message}")
            )
        what = f"{one.read} of {common.plural(one.listed, 'block')} read"
        wrong = common.plural(len(one.findings), "finding") if one.findings else "as it should be"
        session.prose(one_line(f"{name}: {one.snapshot}: {what}, {wrong}"))


def _row(name: str, one: _Result) -> dict[str, object]:
    return {
        "region": name,
        "snapshot": one.snapshot,
        "listed_blocks": one.listed,
        "read_blocks": one.read,
        "findings": [
            {"check": str(flaw.check), "place": flaw.place, "message": flaw.message}
            for flaw in one.findings
        ],
    }
