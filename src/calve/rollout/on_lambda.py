"""The guard in AWS Lambda: `calve.rollout.on_lambda.handler`, for Auto Scaling's events and for a schedule.

The function's package has this wheel and `calve.toml` beside it (or where CALVE_CONFIG says). EventBridge calls it for
"EC2 Auto Scaling Instance Refresh Started", "EC2 Instance Launch Unsuccessful" and the like, and once a minute: events
are best effort, and a refresh outlasts an invocation. docs/how-to/guard.md has the rule, the role and the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from calve.aws.session import Session, credentials_provider
from calve.cache.objects import open_objects
from calve.cache.url import S3, parse
from calve.errors import CalveError, TransientError, UsageError
from calve.fleet.config import FILE_NAME, Config, Fleet, load
from calve.progress import Event, Fact, Note
from calve.rollout import start
from calve.rollout.guard import Guard
from calve.rollout.observe import Gateways
from calve.rollout.run import Host
from calve.transport.http import Client

__all__ = ["handler"]

_SPARE_MS: Final = 20_000
"""What an invocation leaves unused, so that a round never ends half-way."""


class Context(Protocol):
    """What Lambda says of an invocation."""

    def get_remaining_time_in_millis(self) -> int:
        """Return how long it may still take."""


def handler(event: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Guard the fleets that an event is about, until nothing is being rolled out or the time is over.

    Returns:
        {"fleets": [NAME, …], "events": [what happened, as JSON lines of `calve guard --json` have it]}
    """
    config = load(Path(os.environ.get("CALVE_CONFIG", FILE_NAME)))
    if config is None or config.cache is None:
        raise UsageError("the package has no fleet file with [cache]", place=FILE_NAME)
    events: list[dict[str, Any]] = []

    def told(one: Event) -> None:
        if isinstance(one, Fact):
            events.append({"event": one.kind, **one.fields})
        elif isinstance(one, Note):
            events.append({"event": "note", "text": one.text})

    place = parse(config.cache.url)
    with Client(context=None) as client:
        objects = open_objects(
            place, client, credentials_provider() if isinstance(place, S3) else None
        )
        session = Session(place.region if isinstance(place, S3) else None)
        gateways = Gateways.of(session, objects)
        host = Host(by="lambda", progress=told)
        failed: list[CalveError] = []
        fleets = list(_meant(config, event, gateways, failed))
        watch([Guard(one, gateways, host) for one in fleets], context, host, failed)
    return {"fleets": [one.name for one in fleets], "events": events}


def watch(guards: list[Guard], context: Context, host: Host, failed: list[CalveError]) -> None:
    """Go round until no guard has anything to do, or time is short.

    Args:
        guards: one for each fleet.
        context: says how long there is.
        host: who runs them.
        failed: errors of fleets that could not be looked at in the first place.

    Raises:
        CalveError: a fleet could not be guarded, or AWS did not answer at last; the others were, before it is raised.
    """
    busy, mute = guards, dict[Guard, TransientError]()
    while busy:
        goes_on = []
        for guard in busy:
            try:
                more = guard.round()
                mute.pop(guard, None)
            except TransientError as error:
                more, mute[guard] = True, error
                host.progress(Note(f"AWS gave no good answer, trying again: {error}"))
            except CalveError as error:
                more = False
                failed.append(error)
            if more:
                goes_on.append(guard)
        busy = goes_on
        if context.get_remaining_time_in_millis() < _SPARE_MS:
            break
        if busy:
            host.cancel.wait(host.poll_s, host.clock)
    failed += mute.values()
    if failed:
        raise failed[0]


def _meant(
    config: Config, event: Mapping[str, Any], gateways: Gateways, failed: list[CalveError]
) -> Iterator[Fleet]:
    """Yield the fleets that an event is about, with their groups' names; all for one that names no group."""
    detail = event.get("detail")
    group = detail.get("AutoScalingGroupName") if isinstance(detail, Mapping) else None
    for one in config.fleets.values():
        try:
            fleet = start.resolved(one, gateways.scaling)
        except CalveError as error:
            failed.append(error)
            continue
        if group is None or fleet.group == group:
            yield fleet
