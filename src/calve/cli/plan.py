"""`calve plan`: what a deploy would do. Only the cache is asked, for release records and manifests."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common, diff, fleet_options
from calve.cli.session import Session
from calve.errors import NotFoundError

if TYPE_CHECKING:
    from calve.cache.manifest import Manifest
    from calve.cache.objects import Objects
    from calve.fleet.config import Config, Fleet
    from calve.fleet.plan import Live, Plan
    from calve.nix.storepath import StorePath
    from calve.progress import Progress

__all__ = [
    "arguments",
    "lines",
    "planned",
    "run",
    "show",
    "system_of",
]

_MOST_MACHINES = 10_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("fleet", metavar="FLEET", help="its name in the fleet file")
    parser.add_argument(
        "system",
        nargs="?",
        metavar="SYSTEM",
        help="a store path, a link to one, a Nix file or a flake attribute (default: the fleet file's)",
    )
    parser.add_argument(
        "--machines",
        type=common.between(0, _MOST_MACHINES),
        metavar="N",
        help="how many machines the fleet has: says how they are replaced",
    )
    parser.add_argument(
        "--boot",
        type=common.duration,
        metavar="TIME",
        help="how long a machine takes until it is in service, such as 40s: with --machines, says how long all takes",
    )
    diff.add_exit_code(parser, "a deploy would change something")
    shared.add_cache(parser)
    common.add_store(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Plan."""
    with diff.Closures(options, session) as closures:
        config = fleet_options.config_of(options)
        fleet = fleet_options.fleet_of(config, options.fleet)
        with common.listen(session, options) as progress:
            system = system_of(options, session, config, fleet, progress)
        found = planned(closures, fleet, system, machines=options.machines, boot_s=options.boot)
    if options.json:
        session.document(found.document())
    else:
        show(session, found)
    return diff.CHANGES if options.exit_code and found.changes else 0


def system_of(
    options: argparse.Namespace,
    session: Session,
    config: Config,
    fleet: Fleet,
    progress: Progress,
) -> StorePath:
    """Return the system to release; one of the command line is meant from where the user is."""
    from calve.fleet.system import build

    base = Path.cwd()
    if options.system is None:
        base = config.path.absolute().parent
    return build(
        options.system or fleet.system,
        base,
        store=options.store,
        progress=progress,
        cancel=session.cancel,
    )


def live(objects: Objects, fleet: str) -> tuple[int, Live | None]:
    """Return the number of a fleet's next release, and the one that it runs; None before the first one went well."""
    from calve.cache import manifest as manifests
    from calve.fleet import history, release
    from calve.fleet.plan import Live
    from calve.nix.storepath import StorePath

    number = release.listed(objects, fleet).used + 1
    found = history.live(objects, fleet)
    if found is None:
        return number, None
    manifest: Manifest | None = None
    with contextlib.suppress(NotFoundError):
        manifest = manifests.read(objects, found.manifest)
    return number, Live(found.number, StorePath.parse(found.system), manifest, found.image)


def resumed(objects: Objects, fleet: str, system: StorePath, image: str | None) -> int | None:
    """Return the number of a release of this system that is under way, which a deploy goes on with; None else."""
    from calve.fleet import history

    found = history.under_way(objects, fleet)
    same = found is not None and (found.system, found.image) == (str(system), image)
    return found.number if found is not None and same else None


def planned(
    closures: diff.Closures,
    fleet: Fleet,
    system: StorePath,
    *,
    image: str | None = None,
    machines: int | None,
    boot_s: float | None = None,
) -> Plan:
    """Return what a deploy of a system would do."""
    from calve.fleet.plan import plan

    number, running = live(closures.objects, fleet.name)
    begun = resumed(closures.objects, fleet.name, system, image)
    return plan(
        fleet,
        manifest_of(closures, system, running),
        number=begun or number,
        resumes=begun is not None,
        live=running,
        image=image,
        machines=machines,
        boot_s=boot_s,
    )


def manifest_of(closures: diff.Closures, system: StorePath, running: Live | None) -> Manifest:
    """Return a system's manifest: the live one, the last push, the local store's, or what any root keeps."""
    from calve.fleet.plan import sized

    known = None if running is None else running.manifest
    if known is not None and known.toplevel == system:
        return known
    pushed = closures.pushed(system)
    if pushed is not None:
        return pushed
    stored = closures.stored(system)
    if stored is None:
        return closures.cached(system)
    return stored if known is None else sized(stored, known)


# Text


def show(session: Session, found: Plan, out: IO[str] | None = None) -> None:
    """Print a plan, as a result or elsewhere: what changes, then what is done."""
    out = out or session.out
    print(f"fleet    {found.fleet}\nsystem   {found.system}", file=out)
    if not found.changes:
        print(f"release  {found.live} has this system: nothing is to be done", file=out)
        return
    if found.difference is not None:
        diff.show(found.difference, out)
    print(file=out)
    for label, text in lines(found):
        print(f"{label:<8} {text}", file=out, flush=True)


def lines(found: Plan) -> Iterator[tuple[str, str]]:
    """Yield what a deploy would do: a word, and what is to be said of it."""
    from calve.ui.text import seconds

    resumed = ", which is under way already" if found.resumes else ""
    after = "no other is live" if found.live is None else f"after release {found.live}"
    lost = found.live is not None and found.difference is None
    note = ", whose manifest the cache has lost" if lost else ""
    yield "release", f"{found.number}{resumed}, {after}{note}, by {found.delivery.value}"
    if found.image is not None:
        yield "image", found.image
    if found.fetch is not None:
        yield from _fetches(found)
    one = found.surge
    if one is None:
        yield "machines", "how many is not known: --machines N says how they are replaced"
    else:
        if one.canary:
            yield "canary", f"{one.canary} first, then a pause of {one.pause_s} s"
        turns = "one batch" if one.batches == 1 else f"{one.batches} batches"
        yield (
            "machines",
            (
                f"{one.machines} replaced, {one.at_once} at once in {turns};"
                f" at least {one.fewest} healthy, at most {one.most} in all"
            ),
        )
    if found.predicted_s is not None:
        yield "time", f"about {seconds(found.predicted_s)}, {found.bake_s} s of it baking"


def _fetches(found: Plan) -> Iterator[tuple[str, str]]:
    from calve.ui.text import mb

    for label, fetch, whose in (
        ("fetch", found.fetch, ""),
        ("", found.fetch_seeded, f" where its image has release {found.live}"),
    ):
        if fetch is not None:
            about = "" if fetch.exact else "about "
            much = f"{common.plural(fetch.paths, 'path')}, {mb(fetch.nar_bytes)} unpacked"
            yield label, f"{about}{mb(fetch.file_bytes)} a machine{whose} ({much})"
