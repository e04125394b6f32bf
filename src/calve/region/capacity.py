"""EC2's capacity, as far as there is too little: the next launches are refused, in one zone or in any.

Source: EC2 User Guide, "Troubleshoot Amazon EC2 instance launch issues" (InsufficientInstanceCapacity); the sentence
is that of many reports, without its advice on other zones.
"""

from __future__ import annotations

from dataclasses import dataclass

from calve.region.signature import Refusal

__all__ = ["Capacity"]


@dataclass(slots=True)
class _Lack:
    left: int
    message: str
    zone: str | None


class Capacity:
    """What is lacking. Not thread-safe: `cloud` holds one lock."""

    def __init__(self) -> None:
        self._lacks: list[_Lack] = []

    def refuse(self, count: int, message: str = "", zone: str | None = None) -> None:
        """Have the next `count` launches refused, those in a zone or all; 0 takes back all that was said before."""
        self._lacks = [*self._lacks, _Lack(count, message, zone)] if count else []

    def take(self, instance_type: str, zone: str) -> None:
        """Give an instance its place.

        Raises:
            Refusal: InsufficientInstanceCapacity.
        """
        for lack in self._lacks:
            if lack.left and lack.zone in {None, zone}:
                lack.left -= 1
                raise Refusal(
                    500, "InsufficientInstanceCapacity", lack.message or _text(instance_type, zone)
                )


def _text(instance_type: str, zone: str) -> str:
    return (
        f"We currently do not have sufficient {instance_type} capacity in the Availability Zone you requested "
        f"({zone}). Our system will be working on provisioning additional capacity"
    )
