"""The names by which a group in AWS says what it is to Calve: its tags, and its launch hook."""

from __future__ import annotations

from typing import Final

__all__ = ["ALARMS_TAG", "FLEET_TAG", "HOOK", "HOOK_TAG", "REPORTS_TAG"]

FLEET_TAG: Final = "calve:fleet"
"""On a group and its launch template: the fleet that they belong to."""
HOOK: Final = "calve-launch"
"""The launch hook that holds a machine until it is healthy."""
HOOK_TAG: Final = "calve:hook"
"""On a group: the hook that it is to get once its machines know how to let go of it."""
ALARMS_TAG: Final = "calve:alarms"
"""On a group: the alarms that `calve adopt` made for it, with spaces between them."""
REPORTS_TAG: Final = "calve:reports"
"""On a group: the key under which its machines' role may write boot reports."""
