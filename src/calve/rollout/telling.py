"""What a rollout tells whoever listens, as facts and notes: each once, and again when it has changed.

docs/reference/rollout.md has the events. Texts of machines in them are foreign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calve.progress import Fact, Note, Step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.aws.autoscaling import Group
    from calve.aws.refreshes import Refresh
    from calve.progress import Progress
    from calve.rollout.observation import Machine, Observation

__all__ = ["Telling"]


class Telling:
    """Tells of one release, by its number."""

    def __init__(self, release: int, progress: Progress) -> None:
        self._release = release
        self._progress = progress
        self._told: dict[str, str] = {}

    def fact(self, kind: str, text: str, /, **fields: object) -> None:
        """Tell a fact."""
        self._progress(Fact(kind, text, {"release": self._release, **fields}))

    def once(self, about: str, text: str) -> None:
        """Tell a note, unless it was the last one about this."""
        if self._is_new(about, text):
            self._progress(Note(text))

    def again(self, machines: Iterable[str]) -> None:
        """Tell of these machines once more in the next round."""
        for one in machines:
            self._told.pop(one, None)

    def round(self, group: Group, refresh: Refresh, seen: Observation) -> None:
        """Tell what changed since the last round."""
        if self._is_new("refresh", f"{refresh.status} {refresh.reason or ''}"):
            reason = f": {refresh.reason}" if refresh.reason else ""
            self.fact(
                "status",
                f"{refresh.status}, {refresh.percent} %{reason}",
                status=refresh.status,
                percent=refresh.percent,
                reason=refresh.reason,
                serving=seen.serving,
                desired=group.desired,
            )
        self._progress(Step(f"release {self._release}", seen.serving, group.desired, "machines"))
        for one in seen.machines:
            self._machine(one)
        for each in seen.refused:
            if self._is_new(each.activity, "refused"):
                self.fact("refused", f"a launch was refused: {each.message}", message=each.message)

    def _machine(self, one: Machine) -> None:
        state = _state(one)
        if self._is_new(one.id, state):
            self.fact(
                "machine",
                f"{one.id}: {state}",
                instance=one.id,
                lifecycle=one.lifecycle,
                phase=one.phase,
                target=None if one.target is None else one.target.state,
                state=state,
            )

    def _is_new(self, about: str, text: str) -> bool:
        new = self._told.get(about) != text
        self._told[about] = text
        return new


def _state(one: Machine) -> str:
    """Say in a few words where a machine is."""
    failure = one.failure
    if failure is not None:
        return f"failed: {failure.fields.get('code')}: {failure.fields.get('message')}"
    if one.end is not None and one.lifecycle != "InService":
        return f"ended: {one.end.value}"
    if one.lifecycle == "InService":
        if one.target is None or one.target.state == "healthy":
            return "in service"
        return f"in service, {one.target.state}" + (
            f" ({one.target.reason})" if one.target.reason else ""
        )
    if one.lifecycle.startswith("Terminating"):
        return "terminating"
    return one.phase or one.lifecycle or "gone"
