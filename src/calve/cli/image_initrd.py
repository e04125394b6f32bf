"""`calve image initrd`: the initrd in which the agent pulls a machine's system."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.disk.initrd import Initrd

__all__ = ["arguments", "run"]

_CA_FILE = "/etc/calve/ca.pem"
_MOST_HOLD_S = 3600


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--kernel-modules",
        type=Path,
        required=True,
        metavar="DIR",
        help="lib/modules/VERSION of the kernel that it runs under",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the initrd")
    parser.add_argument(
        "--busybox", type=Path, metavar="FILE", help="a static busybox (default: that in PATH)"
    )
    common.add_trusted(parser)
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="certificate authorities for HTTPS (PEM); without it the machine trusts none",
    )
    parser.add_argument(
        "--hold",
        type=common.between(0, _MOST_HOLD_S),
        default=60,
        metavar="SECONDS",
        help="how long a failed machine stays on before it powers off (default: 60)",
    )
    parser.add_argument(
        "--rescue",
        action="store_true",
        help="where user data is not Calve's, start the image's own system; else the machine powers off",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="allow a root shell on the console, where calve.debug=1 is on the kernel command line too",
    )
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Build it, and print its sizes."""
    import tempfile

    from calve.disk import cpio, initrd

    spec = _spec(options)
    session.cancel.check()
    compressed: int | None = None
    with common.translated("build the initrd"):
        if options.dry_run:
            with tempfile.TemporaryDirectory(prefix="calve-") as work:
                unpacked = sum(map(len, cpio.archive(spec.entries(Path(work)))))
        else:
            written = initrd.write(spec, options.out, cancel=session.cancel)
            compressed, unpacked = written.compressed_bytes, written.unpacked_bytes
    _print(options, session, spec, compressed, unpacked)
    return 0


def _spec(options: argparse.Namespace) -> Initrd:
    from calve.boot.policy import Policy
    from calve.disk import initrd, payload

    trusted = common.trusted_keys(options, common.cache_of(options, "trusted"))
    keys = tuple(key.dump() for key in trusted.keys)
    for path in filter(None, (options.ca, options.kernel_modules)):
        if not path.exists():
            raise NotFoundError("does not exist", place=path)
    policy = Policy(
        keys=keys,
        hold_s=float(options.hold),
        ca_file=None if options.ca is None else _CA_FILE,
        rescue=options.rescue,
        debug=options.debug,
    )
    return initrd.Initrd(
        busybox=_busybox(options.busybox),
        kernel_modules=options.kernel_modules,
        agent=payload.build(),
        policy=policy.dump(),
        ca_file=options.ca,
        debug=options.debug,
    )


def _busybox(given: Path | None) -> Path:
    """Find a busybox, and see that it needs no loader: the initrd has none for it."""
    from calve.disk import elf
    from calve.process import which

    path = Path(which("busybox", package="busybox-static")) if given is None else given
    if not path.is_file():
        raise NotFoundError("there is no such program", place=path)
    with common.translated("read busybox"):
        dynamic = elf.read(path)
    if dynamic is not None and dynamic.interpreter is not None:
        raise UsageError(
            "this busybox is not static", place=path, hint="apt-get install busybox-static"
        )
    return path


def _print(
    options: argparse.Namespace,
    session: Session,
    spec: Initrd,
    compressed: int | None,
    unpacked: int,
) -> None:
    from calve.ui.text import mb

    agent = spec.agent
    if options.json:
        session.document(
            {
                "file": str(options.out),
                "dry_run": options.dry_run,
                "compressed_bytes": compressed,
                "unpacked_bytes": unpacked,
                "python": agent.version,
                "modules": len(agent.modules),
                "libraries": [place for _, place in agent.libraries],
            }
        )
        return
    size = mb(unpacked) if compressed is None else f"{mb(compressed)}, {mb(unpacked)} unpacked"
    verb = "would write " if options.dry_run else ""
    session.result(
        f"{verb}{options.out}: {size}; Python {agent.version}, {len(agent.modules)} modules, "
        f"{len(agent.libraries)} libraries"
    )
