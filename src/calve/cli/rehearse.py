"""`calve rehearse`: releases over a group like the fleet's, on a virtual clock: what each does, and when it is noticed.

Settings are the group's own, read from AWS, or those that are given; nothing is changed and nothing is launched.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from calve.cli import common, fleet_options
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.demo.rehearse import Advice, Settings, Told
    from calve.fleet.config import Fleet
    from calve.progress import Progress

__all__ = ["arguments", "run"]

_MOST_MACHINES: Final = 10_000
_BOOT_S: Final = 40
_HEADERS: Final = (
    "RELEASE",
    "JUDGE",
    "OUTCOME",
    "NOTICED",
    "OVER",
    "FEWEST",
    "EXTRA",
    "LAUNCHED",
    "BY",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--machines",
        type=common.between(1, _MOST_MACHINES),
        metavar="N",
        help="of a group of N with AWS's own settings, and ask AWS nothing (default: the fleet's group)",
    )
    parser.add_argument(
        "--boot",
        type=common.duration,
        default=_BOOT_S,
        metavar="TIME",
        help=f"how long a machine takes from its launch until it serves (default: {_BOOT_S}s)",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Rehearse."""
    from calve.demo.rehearse import advise, rehearse

    if options.boot < 1:
        raise UsageError("--boot must be at least 1s")
    with common.listen(session, options) as progress:
        settings = _given(options) if options.machines else _read(options, session)
        told = []
        for one in rehearse(settings, session.cancel):
            told.append(one)
            _tell(progress, one)
        advice = advise(settings)
    if options.json:
        session.document(
            {
                "settings": asdict(settings),
                "releases": [asdict(one) for one in told],
                "advice": [asdict(one) for one in advice],
            }
        )
    else:
        _print(session, settings, told, advice)
    return 0


# Settings


def _given(options: argparse.Namespace) -> Settings:
    """Return those of a group that nobody asks: the fleet file's, where there is one, and AWS's own."""
    from calve.demo.rehearse import Settings
    from calve.fleet.config import Rollout, load

    config = load(options.config)
    if config is None and options.fleet is None:
        return Settings(options.machines, options.boot, Rollout(100, 200, 120))
    fleet = fleet_options.fleet_of(fleet_options.config_of(options), options.fleet)
    return Settings(options.machines, options.boot, **_of_file(fleet))


def _of_file(fleet: Fleet) -> dict[str, Any]:
    found: dict[str, Any] = {"rollout": fleet.rollout}
    if fleet.health is None:
        return {**found, "hook_s": None}
    return {**found, "within_s": fleet.health.within_s}


def _read(options: argparse.Namespace, session: Session) -> Settings:
    """Return those of the fleet's group."""
    from calve.aws.elb import Check
    from calve.demo.rehearse import Settings
    from calve.rollout.start import own_hook

    with fleet_options.open_fleet(session, options) as there:
        group = there.gateways.scaling.group(there.fleet.group)
        hooks = there.gateways.scaling.hooks(group.name)
        if group.desired < 1:
            raise UsageError(
                "the group has no machines", place=group.name, hint="--machines N says how many"
            )
        ours = own_hook(hooks)
        arn = next(iter(group.target_groups), None)
        return Settings(
            group.desired,
            options.boot,
            **{
                **_of_file(there.fleet),
                "hook_s": None if ours is None else ours.heartbeat_s,
                "grace_s": group.grace_s,
                "warmup_s": group.warmup_s,
                "check": Check()
                if arn is None
                else there.gateways.elb.target_groups([arn])[0].check,
            },
        )


# Saying


def _tell(progress: Progress, told: Told) -> None:
    from calve.progress import Fact

    progress(Fact("rehearsed", "", asdict(told)))


def _print(
    session: Session, settings: Settings, told: list[Told], advice: tuple[Advice, ...]
) -> None:
    from calve.cli.fleet_rows import span
    from calve.ui.table import table
    from calve.ui.text import one_line

    rules = settings.rollout
    session.prose(
        f"{common.plural(settings.machines, 'machine')} that boot in {settings.boot_s:.0f} s,"
        f" {rules.min_healthy_percent} to {rules.max_healthy_percent} % healthy,"
        f" {'no launch hook' if settings.hook_s is None else f'launch hook of {settings.hook_s} s'}"
    )
    rows = [
        (
            one.release,
            {"aws": "AWS alone", "calve": "Calve"}[one.judge],
            one.outcome,
            span(one.noticed_s),
            span(one.done_s),
            f"{one.least_healthy} of {one.machines}",
            f"{one.surge_machine_s / 3600:.1f} h",
            one.launched,
            one.by,
        )
        for one in told
    ]
    table(rows, _HEADERS, session.out)
    for each in advice:
        session.result(one_line(f"{each.code}: {each.message}"))
        session.result(one_line(f"  {each.hint}"))
