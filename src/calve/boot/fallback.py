"""What a machine does after a failure: pure. A new one never serves another system than the one it was told.

A machine that has served may go on with the system that was healthy last, where what failed may pass, or where the
system that user data names has been tried here and was not healthy. User data that is not ours ends the machine,
unless the image's policy says `rescue`: then the image's own system starts.
"""

from __future__ import annotations

from calve.boot.failure import Failure
from calve.boot.served import Served
from calve.contract.codes import Code
from calve.nix.storepath import StorePath

__all__ = ["after", "instead"]

_FOREIGN = frozenset({Code.USERDATA_ABSENT, Code.USERDATA_FOREIGN})


def after(
    failure: Failure, served: Served, *, current: StorePath | None, rescue: bool = False
) -> StorePath | None:
    """Return the system that starts after a failure; None where the machine tells, holds, and powers off.

    Args:
        failure: what ended the boot.
        served: what is known of the disk.
        current: the system of the profile, the image's own where the machine is new.
        rescue: the image's policy.
    """
    if failure.code in _FOREIGN:
        return current if rescue else None
    return served.good if failure.code.transient else None


def instead(wanted: StorePath, served: Served) -> StorePath:
    """Return the system to start where user data names `wanted`: the last good one if `wanted` was not healthy here."""
    if wanted == served.bad and served.good is not None:
        return served.good
    return wanted
