"""What failed machines said, kept beside their release before a rollback has ended them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from calve.errors import CalveError
from calve.fleet import ends
from calve.progress import Note, Progress

if TYPE_CHECKING:
    from calve.cache.objects import Objects
    from calve.fleet.release import Release
    from calve.fleet.verdict import Reason
    from calve.rollout.observe import Observer

__all__ = ["keep"]

_MOST: Final = 5


def keep(
    observer: Observer, objects: Objects, release: Release, reason: Reason, progress: Progress
) -> None:
    """Listen to the machines that a reason rests on once more, and keep it; what is lost is told.

    Args:
        observer: has heard them.
        objects: where it is kept.
        release: theirs.
        reason: names them.
        progress: is told.
    """
    for failure in reason.failures[:_MOST]:
        try:
            text = _heard(observer, failure.instance, progress)
            if text:
                ends.keep_log(objects, release.fleet, release.number, failure.instance, text)
        except CalveError as error:
            progress(Note(f"{failure.instance}: what it said is lost: {error}"))


def _heard(observer: Observer, instance: str, progress: Progress) -> str:
    try:
        return observer.listen(instance)
    except CalveError as error:
        progress(Note(f"{instance}: nothing more to hear: {error}"))
        return observer.said(instance)
