"""Puts a release on its group, or watches one that is under way: look, decide, act, again.

    verdict = Rollout(release, gateways, group, settings, …).run()

Nothing is remembered that AWS and the bucket do not know too: killed anywhere and run again, by any host, it goes on
where it stands. Two hosts at once do no harm: what is created is created once, and a second rollback is refused.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from calve.aws.refreshes import Preferences
from calve.clock import SYSTEM, Clock
from calve.contract.userdata import UserData, UserDataError
from calve.errors import CalveError, ConflictError, NotFoundError, TransientError
from calve.fleet import ends, history
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.progress import Progress, silent
from calve.rollout import judge as judges
from calve.rollout import steps, words
from calve.rollout.judge import Rules
from calve.rollout.observe import Observer
from calve.rollout.patience import Patience
from calve.rollout.steps import Situation, Step
from calve.rollout.telling import Telling
from calve.tasks import Cancel

if TYPE_CHECKING:
    from calve.aws.autoscaling import Group
    from calve.aws.ec2 import Ec2, TemplateVersion
    from calve.aws.refreshes import Refresh
    from calve.fleet.lock import Held
    from calve.fleet.release import Release
    from calve.rollout.observation import Observation
    from calve.rollout.observe import Gateways

__all__ = ["POLL_S", "Host", "Rollout", "Settings", "description", "version_of"]

POLL_S: Final = 5.0
_UNATTENDED_S: Final = 180.0
"""So long nobody need do what is due until who only watches gives up."""
_SKEW: Final = dt.timedelta(minutes=5)
"""So far apart an operator's clock and AWS's may be."""
_KEPT: Final = 6

Change = Callable[["TemplateVersion"], bytes]
"""Makes a release's user data from what the live version says."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a rollout is begun with.

    Attributes:
        preferences: of the refresh.
        rules: of the judge.
        user_data: makes the release's from the live launch template version; None for a host that begins nothing.
    """

    preferences: Preferences = field(default_factory=Preferences)
    rules: Rules = field(default_factory=Rules)
    user_data: Change | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """Who runs it.

    Attributes:
        by: "cli", "guard" or "lambda".
        lock: the deploy lock, renewed between rounds; None for who only judges.
        poll_s: between two rounds.
    """

    by: str = "cli"
    lock: Held | None = None
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)
    clock: Clock = SYSTEM
    poll_s: float = POLL_S


def description(release: Release) -> str:
    """Return how a launch template version is found again: its description."""
    return f"calve {release.fleet} release {release.number}"


def version_of(ec2: Ec2, group: Group, release: Release) -> TemplateVersion | None:
    """Return the version of a group's launch template that carries a release; None before there is one.

    One of the same number may be of an older bucket that counted releases from the beginning.
    """
    if group.template_id is None:
        return None
    found = ec2.find_version(group.template_id, description(release))
    return found if found is not None and _is_of(found, release) else None


class Rollout:
    """One release on its way.

    Args:
        release: which.
        group: name of its Auto Scaling group.
        gateways: AWS and the bucket.
        settings: what it is begun with.
        host: who runs it.
    """

    def __init__(
        self, release: Release, group: str, gateways: Gateways, settings: Settings, host: Host
    ) -> None:
        self.release = release
        self._group = group
        self._gateways = gateways
        self._settings = settings
        self._host = host
        self._version: TemplateVersion | None = None
        self._observer: Observer | None = None
        self._reason: Reason | None = None
        self._telling = Telling(release.number, host.progress)

    def run(self, *, detach: bool = False) -> Verdict | None:
        """Go on until it has ended; return how.

        Args:
            detach: stop as soon as the refresh has started, and return None.

        Raises:
            ConflictError: it cannot begin.
            TransientError: AWS did not answer for a quarter of an hour.
        """
        host = self._host
        patience = Patience(host.clock, host.progress)
        step: Step | None = None
        while True:
            host.cancel.check()
            before = step
            try:
                self._renew()
                step = self.round()
                patience.rest()
            except TransientError as error:
                patience.bear(error)
                step = steps.Watch()
            if isinstance(step, steps.Done):
                return step.verdict
            if detach and isinstance(step, steps.Watch):
                return None
            if isinstance(step, steps.Watch) or type(step) is type(before):  # it was not taken
                host.cancel.wait(host.poll_s, host.clock)

    def _renew(self) -> None:
        """Keep the lock; who has lost it begins nothing more, and goes on as a judge."""
        if self._host.lock is None:
            return
        try:
            self._host.lock.renew()
        except ConflictError as error:
            self._telling.once("lock", f"{error.message}; this goes on as a judge")
            self._host = replace(self._host, lock=None)
            self._settings = replace(self._settings, user_data=None)

    def follow(self) -> Verdict:
        """Only look, until somebody has written the verdict; return it.

        Raises:
            ConflictError: for three minutes nobody has done what is due: it never began, or its refresh has ended.
            TransientError: AWS did not answer for a quarter of an hour.
        """
        host = self._host
        patience = Patience(host.clock, host.progress)
        left_s = _UNATTENDED_S
        while True:
            try:
                situation, _ = self._look()
                patience.rest()
            except TransientError as error:
                patience.bear(error)
            else:
                if situation.verdict is not None:
                    return situation.verdict
                left_s = left_s - host.poll_s if _is_due(situation) else _UNATTENDED_S
                if left_s <= 0:
                    raise _unattended(situation, self.release)
            host.cancel.wait(host.poll_s, host.clock)

    def round(self) -> Step:
        """Look once, and do what is next; return what that was."""
        situation, seen = self._look()
        step = steps.next_step(situation)
        self._perform(step, situation, seen)
        return step

    def standing(self) -> Step:
        """Return what would be next; nothing is done."""
        return steps.next_step(self._look()[0])

    # Looking

    def _look(self) -> tuple[Situation, Observation | None]:
        """Return where it stands and what is seen of its machines; None before it has a version."""
        gateways, release = self._gateways, self.release
        verdict = ends.read(gateways.objects, release.fleet, release.number)
        group = gateways.scaling.group(self._group)
        version = self._find(group)
        mine: Refresh | None = None
        other: Refresh | None = None
        for one in reversed(gateways.refreshes.newest(self._group, _KEPT)):
            if version is not None and one.goes_to(version.template_id, version.number):
                mine = one
            elif one.active:
                other = one
        reason, seen = None, None
        if verdict is None and version is not None and mine is not None:
            seen = self._see(group, version, mine)
            reason = self._judge(seen, mine)
        return (
            Situation(
                release.number,
                None if version is None else version.number,
                group.version or "",
                mine,
                other,
                reason,
                verdict,
                self._settings.user_data is not None,
            ),
            seen,
        )

    def _find(self, group: Group) -> TemplateVersion | None:
        if self._version is None:
            self._version = version_of(self._gateways.ec2, group, self.release)
        return self._version

    def _see(self, group: Group, version: TemplateVersion, refresh: Refresh) -> Observation:
        if self._observer is None:
            self._observer = Observer(self._gateways, self._group, version, self._telling.once)
        seen = self._observer.look(group, refresh, self._host.clock.now())
        self._telling.round(group, refresh, seen)
        return seen

    def _judge(self, seen: Observation, refresh: Refresh) -> Reason | None:
        known = ends.read_reason(self._gateways.objects, self.release.fleet, self.release.number)
        if known is not None and _is_older(known, refresh):
            known = None
        if known is not None or not (refresh.can_roll_back or refresh.rollback is not None):
            return known
        return judges.judge(seen, self._settings.rules, self._host.clock.now(), by=self._host.by)

    # Acting

    def _perform(self, step: Step, situation: Situation, seen: Observation | None) -> None:
        match step:
            case steps.CreateVersion(source):
                self._create(source)
            case steps.StartRefresh(version):
                self._start(version)
            case steps.RollBack(reason):
                self._roll_back(reason, situation.refresh, seen)
            case steps.Conclude(outcome, reason):
                known = reason or (self._reason if outcome is not Outcome.RELEASED else None)
                known = known or _of_aws(outcome, situation, self._now())
                self._conclude(outcome, known, situation.refresh)
            case steps.Refuse(message, hint):
                raise ConflictError(message, place=self._group, hint=hint)

    def _create(self, source: int) -> None:
        ec2, change = self._gateways.ec2, self._settings.user_data
        template = self._gateways.scaling.group(self._group).template_id
        if template is None or change is None:
            raise ConflictError("the group has no launch template", place=self._group)
        live = ec2.version(template, source)
        name = description(self.release)
        self._version = ec2.create_version(
            template,
            source=source,
            description=name,
            user_data=change(live),
            image_id=self.release.image,
            token=f"{self.release.manifest[:32]}-{self.release.number}",
        )
        self._telling.fact(
            "version",
            f"launch template version {self._version.number}, from {source}",
            version=self._version.number,
            source=source,
        )

    def _start(self, version: int) -> None:
        group = self._gateways.scaling.group(self._group)
        try:
            refresh = self._gateways.refreshes.start(
                self._group,
                template_id=str(group.template_id),
                version=version,
                preferences=self._settings.preferences,
            )
        except ConflictError as error:
            # Ours, which AWS does not list yet, or somebody else's: the next round sees.
            self._telling.once("start", f"the refresh was not started: {error.message}")
            return
        self._telling.fact(
            "refresh",
            f"instance refresh {refresh} of {group.desired} machines",
            refresh=refresh,
            version=version,
            machines=group.desired,
        )

    def _roll_back(self, reason: Reason, refresh: Refresh | None, seen: Observation | None) -> None:
        """Keep why, then call the rollback, then keep what machines said: a minute is short."""
        kept = self._keep_reason(reason, refresh)
        try:
            self._gateways.refreshes.rollback(self._group)
        except (ConflictError, NotFoundError) as error:
            # Another host was first, it ended by itself, or AWS is at work on the group: the next round sees.
            self._telling.once("rollback", f"the rollback was not taken: {error.message}")
            return
        self._telling.fact("rollback", f"rolling back: {kept.text}", **kept.document())
        if self._observer is not None:
            words.keep(
                self._observer, self._gateways.objects, self.release, kept, self._host.progress
            )
        if seen is not None:
            self._telling.again(one.id for one in seen.machines)

    def _keep_reason(self, reason: Reason, refresh: Refresh | None) -> Reason:
        """Write a reason; where the bucket does not take it the fleet is what counts, and the verdict may still have it."""
        objects, release = self._gateways.objects, self.release
        self._reason = reason
        try:
            kept = ends.write_reason(objects, release.fleet, release.number, reason)
        except CalveError as error:
            self._telling.once("reason", f"the reason could not be kept: {error}")
            return reason
        return reason if refresh is not None and _is_older(kept, refresh) else kept

    def _conclude(self, outcome: Outcome, reason: Reason | None, refresh: Refresh | None) -> None:
        verdict = ends.write(
            self._gateways.objects,
            Verdict(
                self.release.fleet,
                self.release.number,
                outcome,
                "" if refresh is None else refresh.id,
                self._host.by,
                self._now(),
                reason,
            ),
        )
        text = f"release {self.release.number}: {verdict.outcome.value.replace('-', ' ')}"
        if verdict.reason is not None:
            text += f": {verdict.reason.text}"
        self._telling.fact("verdict", text, **verdict.document())
        try:
            history.keep(self._gateways.objects, self.release.fleet, self._now())
        except CalveError as error:
            # How it ended is what counts; the next release sees to it.
            self._telling.once("keep", f"what keeps closures was not renewed: {error}")

    def _now(self) -> dt.datetime:
        return self._host.clock.now()


def _is_older(reason: Reason, refresh: Refresh) -> bool:
    """Say whether a reason was given before the refresh began: it was about something else."""
    return refresh.started_at is not None and reason.at < refresh.started_at - _SKEW


def _is_due(situation: Situation) -> bool:
    """Say whether something is to be done that does not come about by itself."""
    return not isinstance(steps.next_step(situation), steps.Watch | steps.RollBack)


def _unattended(situation: Situation, release: Release) -> ConflictError:
    step = steps.next_step(situation)
    if isinstance(step, steps.Refuse):
        return ConflictError(step.message, place=release.fleet, hint=step.hint)
    return ConflictError(
        f"the instance refresh of release {release.number} has ended, and nobody has written the verdict",
        place=release.fleet,
        hint=f"calve attach {release.fleet} does",
    )


def _is_of(version: TemplateVersion, release: Release) -> bool:
    """Say whether a version is a release's own: the template may be older than the bucket that counts releases."""
    try:
        return UserData.parse(version.user_data).manifest == release.manifest
    except UserDataError:
        return True


def _of_aws(outcome: Outcome, situation: Situation, now: dt.datetime) -> Reason | None:
    """Return AWS's own reason, where no judge of ours had one."""
    refresh = situation.refresh
    if outcome is Outcome.RELEASED or refresh is None:
        return None
    said = refresh.rollback.reason if refresh.rollback is not None else ""
    text = said or refresh.reason or f"the instance refresh is {refresh.status}"
    return Reason("aws", text, (), "aws", now)
