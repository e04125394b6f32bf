"""What the region asks of whatever makes its instances: virtual machines, plain processes, or a test's threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Launch", "Machines"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One instance to start.

    Attributes:
        instance_id: `i-` and 17 hexadecimal digits; never used twice.
        image_id: A registered image.
        instance_type: As the launch template says; `t3.nano` where it does not.
        user_data: Decoded, at most 16 KiB.
    """

    instance_id: str
    image_id: str
    instance_type: str
    user_data: bytes


class Machines(Protocol):
    """A driver of machines; thread-safe. Whoever made it closes it, after the `Cloud` that uses it."""

    def launch(self, launch: Launch) -> None:
        """Start a machine and return at once.

        Raises:
            CalveError: It cannot be started; its message becomes the scaling activity's.
        """

    def address(self, instance_id: str) -> tuple[str, int] | None:
        """Return where the machine's port 80 is reached, None while that is not known."""

    def running(self, instance_id: str) -> bool:
        """Say whether it is on: True once `launch` has returned, False once it powered off or is unknown."""

    def console(self, instance_id: str) -> bytes:
        """Return all that its console said; kept after its end."""

    def terminate(self, instance_id: str) -> None:
        """End it, and return once it is off; nothing happens where it is off already, or unknown.

        The region's only driver waits for this, so it should not take long.
        """

    def close(self) -> None:
        """End all machines and free everything; idempotent."""
