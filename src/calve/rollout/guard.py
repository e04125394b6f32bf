"""The guard: watches a fleet without a person, judges what is being rolled out, and breaks loops of failing launches.

    Guard(fleet, gateways, Host(by="guard")).run()

It begins nothing: it needs no lock, and a guard beside a watching CLI does no harm. One round asks little while
nothing goes on. `calve guard` is its host at a terminal or in cron, `on_lambda` in AWS Lambda.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Final

from calve.contract.userdata import UserData, UserDataError
from calve.errors import CalveError, CancelledError, ConflictError, TransientError
from calve.fleet import ends, history
from calve.fleet.verdict import Failure, Outcome, Reason
from calve.progress import Fact, Note
from calve.rollout import breaker, start
from calve.rollout.patience import Patience
from calve.rollout.run import Host, Rollout, Settings, version_of

if TYPE_CHECKING:
    from calve.aws.autoscaling import Activity, Group
    from calve.fleet.config import Fleet
    from calve.fleet.release import Release
    from calve.rollout.breaker import Run
    from calve.rollout.observe import Gateways

__all__ = ["IDLE_S", "Guard"]

IDLE_S: Final = 10.0
"""Between two rounds while nothing is being rolled out."""
_WINDOW: Final = dt.timedelta(hours=1)
_LOOKED: Final = 50
"""Releases that are looked through, at most."""


class Guard:
    """Guards one fleet.

    Args:
        fleet: which.
        gateways: AWS and the bucket.
        host: who runs it.
        timeout_s: as `Rules.timeout_s`.
    """

    def __init__(
        self, fleet: Fleet, gateways: Gateways, host: Host, timeout_s: int | None = None
    ) -> None:
        self._fleet = fleet
        self._gateways = gateways
        self._host = host
        self._settings = Settings(rules=start.rules(fleet, timeout_s))
        self._rollout: Rollout | None = None
        self._told = ""

    def run(self, *, once: bool = False) -> None:
        """Go round until it is cancelled; with `once` until nothing is being rolled out.

        A first round that fails is the caller's affair. Later ones say so, and go on: permissions come back.

        Raises:
            CancelledError: the host was cancelled.
            TransientError: AWS did not answer the first round, or any with `once`, for a quarter of an hour.
            CalveError: that round could not look.
        """
        host = self._host
        patience = Patience(host.clock, host.progress)
        looked, said = False, ""
        while True:
            busy = False
            try:
                busy, said = self.round(), ""
                looked = True
                patience.rest()
                if once and not busy:
                    return
            except CancelledError:
                raise
            except CalveError as error:
                busy = isinstance(error, TransientError)
                if once or not looked:
                    if not isinstance(error, TransientError):
                        raise
                    patience.bear(error)
                elif str(error) != said:
                    said = str(error)
                    host.progress(Note(f"could not look, trying again: {said}"))
            host.cancel.wait(host.poll_s if busy else IDLE_S, host.clock)

    def round(self) -> bool:
        """Look once, and do what is due; say whether something is being rolled out.

        Raises:
            TransientError: AWS gave no good answer; the next round asks again.
        """
        release = history.under_way(self._gateways.objects, self._fleet.name)
        if release is None:
            self._rollout = None
            self._break()
            return False
        if self._rollout is None or self._rollout.release != release:
            self._rollout = Rollout(
                release, self._fleet.group, self._gateways, self._settings, self._host
            )
        try:
            self._rollout.round()
        except ConflictError as error:
            # It has a number and no refresh: its deploy has not come so far, or was killed.
            self._say(error.message)
            self._break()
            return False
        return True

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._host.progress(Note(text))

    # The breaker

    def _break(self) -> None:
        gateways, name = self._gateways, self._fleet.group
        newest = gateways.refreshes.newest(name)
        if newest and newest[0].active:
            return
        since = self._host.clock.now() - _WINDOW
        if newest and newest[0].ended_at is not None:
            since = max(since, newest[0].ended_at)
        activities = gateways.scaling.activities(name, since=since)
        run = breaker.run_of(activities)
        if not run.trips:
            return
        group = gateways.scaling.group(name)
        failing = self._configured(group)
        if failing is None:
            self._say(f"{len(run.instances)} launches in a row failed, of no release of this fleet")
            return
        run = breaker.run_of(self._since_pinned_back(failing, activities))
        if run.trips:
            self._trip(group, failing, run)

    def _since_pinned_back(
        self, number: int, activities: tuple[Activity, ...]
    ) -> tuple[Activity, ...]:
        """Return what a group did since it was pinned back to a release or an earlier one; all where it was not.

        What failed to launch before then failed of a later release; its names tell, whatever our clock says.
        """
        objects, fleet = self._gateways.objects, self._fleet.name
        later = (one.release.number for one in history.recent(objects, fleet, most=_LOOKED))
        tripped = [ends.tripped(objects, fleet, one) for one in later if one > number]
        last = max(
            (one for one in tripped if one is not None), key=lambda one: one.at, default=None
        )
        if last is None:
            return activities
        names = {one.instance for one in last.failures}
        theirs = (one for one in activities if any(name in one.description for name in names))
        end = max((one.started_at for one in theirs), default=last.at)
        return tuple(one for one in activities if one.started_at > end)

    def _configured(self, group: Group) -> int | None:
        """Return the release that a group launches, as its version's user data says; None for none of ours."""
        if group.template_id is None or not (group.version or "").isdecimal():
            return None
        version = self._gateways.ec2.version(group.template_id, str(group.version))
        try:
            data = UserData.parse(version.user_data)
        except UserDataError:
            return None
        return data.release if data.fleet == self._fleet.name else None

    def _trip(self, group: Group, failing: int, run: Run) -> None:
        good = self._earlier(failing)
        version = None if good is None else version_of(self._gateways.ec2, group, good)
        count = len(run.instances)
        if good is None or version is None:
            self._say(f"{count} launches of release {failing} in a row failed; none is earlier")
            return
        text = f"{count} launches in a row failed, outside a rollout: pinned back to release {good.number}"
        failures = tuple(self._heard(one, failing) for one in run.instances[: breaker.MOST])
        reason = Reason("breaker", text, failures, self._host.by, self._host.clock.now())
        ends.trip(self._gateways.objects, self._fleet.name, failing, reason)
        self._gateways.scaling.set_version(group.name, version.template_id, version.number)
        self._host.progress(
            Fact("breaker", f"release {failing}: {text}", {"release": failing, **reason.document()})
        )

    def _earlier(self, failing: int) -> Release | None:
        """Return the newest release before it that went well, and did not trip."""
        objects, fleet = self._gateways.objects, self._fleet.name
        for one in history.recent(objects, fleet, most=_LOOKED):
            if (
                one.release.number < failing
                and one.verdict is not None
                and one.verdict.outcome is Outcome.RELEASED
                and ends.tripped(objects, fleet, one.release.number) is None
            ):
                return one.release
        return None

    def _heard(self, instance: str, release: int) -> Failure:
        try:
            console = self._gateways.ec2.console(instance)
        except CalveError:
            console = ""  # what it said would be good to have; that the loop ends is better
        lines = [line.rstrip() for line in console.splitlines() if line.strip()]
        return Failure(instance, "launch", f"of release {release}", "", tuple(lines[-8:]))
