"""`calve init`: a project's first files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.infra.start import Begun, Start

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the project, the root of its repository (default: .)",
    )
    parser.add_argument("--bucket", metavar="NAME", help="the bucket of the binary cache")
    parser.add_argument(
        "--region", metavar="NAME", help="of the bucket and the fleet (default: AWS_REGION's)"
    )
    parser.add_argument(
        "--fleet",
        metavar="NAME",
        help="the fleet (default: web; of a fleet file that exists, its first)",
    )
    parser.add_argument(
        "--system",
        metavar="SYSTEM",
        help="its system (default: .#nixosConfigurations. and the fleet's name)",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="its Auto Scaling group (default: the fleet's name)"
    )
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Write what is missing."""
    from calve.infra.start import Project, begin

    project = Project.read(options.directory)
    start = _start(options) if project.config is None else None
    begun = begin(project, start, options.fleet, dry_run=options.dry_run)
    _print(options, session, begun)
    return 0


def _start(options: argparse.Namespace) -> Start:
    from calve.infra.start import Start

    if options.bucket is None:
        raise UsageError(
            "no bucket is named",
            hint="give --bucket NAME; it need not exist yet, `calve cache init` makes it",
        )
    region = options.region
    if region is None:
        from calve.aws.session import default_region

        region = default_region()
    fleet = options.fleet or "web"
    system = options.system or f".#nixosConfigurations.{fleet}"
    return Start(options.bucket, region, fleet, system, options.group or fleet)


def _print(options: argparse.Namespace, session: Session, begun: Begun) -> None:
    from calve.infra.workflow import KEY_NAME, ROLE_NAME

    if options.json:
        session.document(
            {
                "directory": str(options.directory),
                "dry_run": options.dry_run,
                "files": [{"path": path, "state": did.name.lower()} for path, did in begun.files],
                "public": begun.public,
            }
        )
        return
    for path, did in begun.files:
        session.result(f"{options.directory / path}: {did}")
    if options.dry_run or begun.public is None:
        return
    session.prose(f"the key {begun.public} signs; its secret half is in the file that git ignores")
    session.prose("next: calve cache init, and calve iam show for each role")
    session.prose(f"the workflow wants the secret {KEY_NAME} and the variable {ROLE_NAME}")
