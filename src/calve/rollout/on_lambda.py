"""The guard in AWS Lambda: `calve.rollout.on_lambda.handler`, for Auto Scaling's events and for a schedule.

The function's package has this wheel and `calve.toml` beside it (or where CALVE_CONFIG says). EventBridge calls it for
"EC2 Auto Scaling Instance Refresh Started", "EC2 Instance Launch Unsuccessful" and the like, and once a minute: events
are best effort, and a refresh outlasts an invocation. docs/how-to/guard.md has the rule, the role and the package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from calve.aws.session import Session, credentials_provider
from calve.cache.objects import open_objects
from calve.cache.url import S3, parse
from calve.clock import SYSTEM, Clock
from calve.errors import CalveError, TransientError, UsageError
from calve.fleet.config import FILE_NAME, Config, Fleet, load
from calve.progress import Event, Fact, Note
from calve.rollout.guard import Guard
from calve.rollout.observe import Gateways
from calve.rollout.run import POLL_S, Host
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

    fleets = _meant(config, event)
    place = parse(config.cache.url)
    with Client(context=None) as client:
        objects = open_objects(
            place, client, credentials_provider() if isinstance(place, S3) else None
        )
        session = Session(place.region if isinstance(place, S3) else None)
        gateways = Gateways.of(session, objects)
        host = Host(by="lambda", progress=told)
        guards = [Guard(fleet, gateways, host) for fleet in fleets]
        watch(guards, context, SYSTEM)
    return {"fleets": [fleet.name for fleet in fleets], "events": events}


def watch(guards: list[Guard], context: Context, clock: Clock) -> None:
    """Go round until no guard has anything to do, or time is short.

    Raises:
        CalveError: a fleet could not be guarded; the others were, before it is raised.
    """
    host = Host(clock=clock)
    busy = guards
    failed: list[CalveError] = []
    while busy:
        busy = [guard for guard in busy if _goes_on(guard, failed)]
        if context.get_remaining_time_in_millis() < _SPARE_MS:
            break
        if busy:
            host.cancel.wait(POLL_S, clock)
    if failed:
        raise failed[0]


def _goes_on(guard: Guard, failed: list[CalveError]) -> bool:
    """Let a guard look once; say whether it wants to look again in this invocation."""
    try:
        return guard.round()
    except TransientError:
        return True
    except CalveError as error:
        failed.append(error)
        return False


def _meant(config: Config, event: Mapping[str, Any]) -> list[Fleet]:
    detail = event.get("detail")
    group = detail.get("AutoScalingGroupName") if isinstance(detail, Mapping) else None
    return [fleet for fleet in config.fleets.values() if group is None or fleet.group == group]
