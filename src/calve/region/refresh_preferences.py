"""A refresh's preferences as Auto Scaling's API reads and shows them.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), RefreshPreferences, AlarmSpecification; User Guide,
"Understand the default values for an instance refresh", "Add checkpoints to an instance refresh". Its limits are AWS's,
the words of its refusals ours, but for the two on healthy percentages.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from calve.region.group import invalid
from calve.region.refresh import Preferences, Reserved

if TYPE_CHECKING:
    from calve.region.query import Params

__all__ = ["preferences_row", "read_preferences"]

MOST_WAIT_S = 172_800
MOST_ALARMS = 10
_DEFAULTS = Preferences()


def read_preferences(params: Params | None) -> Preferences:
    """Read a request's preferences; a Refusal for such as AWS refuses."""
    if params is None:
        return _DEFAULTS
    low, high = _healthy(params)
    warmup_s = params.integer("InstanceWarmup", 0, 86_400)
    checkpoints = _checkpoints(params)
    delay_s = params.integer("CheckpointDelay", 0, MOST_WAIT_S)
    if delay_s is not None and not checkpoints:
        raise invalid("CheckpointPercentages must be specified when CheckpointDelay is specified")
    return Preferences(
        low,
        high,
        None if warmup_s is None else float(warmup_s),
        params.boolean("SkipMatching") or False,
        params.boolean("AutoRollback") or False,
        checkpoints,
        _DEFAULTS.checkpoint_delay_s if delay_s is None else float(delay_s),
        float(params.integer("BakeTime", 0, MOST_WAIT_S) or 0),
        _alarms(params),
        _reserved(params, "ScaleInProtectedInstances", "Refresh"),
        _reserved(params, "StandbyInstances", "Terminate"),
    )


def _healthy(params: Params) -> tuple[int, int | None]:
    low = params.integer("MinHealthyPercentage", 0, 100)
    high = params.integer("MaxHealthyPercentage", 100, 200)
    if high is not None and low is None:
        raise invalid(
            "MinHealthyPercentage must be specified when MaxHealthyPercentage is specified"
        )
    if high is not None and low is not None and high - low > 100:
        raise invalid(
            "The difference between MaxHealthyPercentage and MinHealthyPercentage cannot be greater than 100"
        )
    return _DEFAULTS.min_healthy if low is None else low, high


def _checkpoints(params: Params) -> tuple[int, ...]:
    texts = params.strings("CheckpointPercentages") or []
    if not all(text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= 100 for text in texts):
        raise invalid("CheckpointPercentages must be whole numbers from 1 to 100")
    found = tuple(map(int, texts))
    if any(before >= after for before, after in pairwise(found)):
        raise invalid("CheckpointPercentages must be unique and in ascending order")
    return found


def _alarms(params: Params) -> tuple[str, ...]:
    specification = params.struct("AlarmSpecification")
    names = (specification.strings("Alarms") if specification is not None else None) or []
    if len(names) > MOST_ALARMS:
        raise invalid(f"AlarmSpecification can contain at most {MOST_ALARMS} alarms")
    return tuple(names)


def _reserved(params: Params, name: str, replaces: str) -> Reserved:
    text = params.text(name) or Reserved.WAIT
    known = {replaces: Reserved.REPLACE, "Ignore": Reserved.IGNORE, "Wait": Reserved.WAIT}
    if text not in known:
        raise invalid(f"{name} must be one of {', '.join(known)}, not '{text}'")
    return known[text]


def preferences_row(one: Preferences) -> dict[str, Any]:
    """Show a refresh's preferences, its defaults among them."""
    protected = "Refresh" if one.protected is Reserved.REPLACE else one.protected.value
    standby = "Terminate" if one.standby is Reserved.REPLACE else one.standby.value
    return {
        "MinHealthyPercentage": one.min_healthy,
        "MaxHealthyPercentage": one.max_healthy,
        "InstanceWarmup": None if one.warmup_s is None else round(one.warmup_s),
        "SkipMatching": one.skip_matching,
        "AutoRollback": one.auto_rollback,
        "CheckpointPercentages": list(one.checkpoints) or None,
        "CheckpointDelay": round(one.checkpoint_delay_s) if one.checkpoints else None,
        "BakeTime": round(one.bake_s),
        "AlarmSpecification": {"Alarms": list(one.alarms)} if one.alarms else None,
        "ScaleInProtectedInstances": protected,
        "StandbyInstances": standby,
    }
