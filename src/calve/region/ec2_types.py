"""EC2's instance types, a handful of them, and RunInstances as far as a dry run goes.

Instances are launched by groups alone; whether somebody may launch one can be tried (`cloud` answers every `DryRun`).
Source: EC2 API reference, DescribeInstanceTypes and RunInstances; "Amazon EC2 instance types" (memory, boot modes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.region.query import EC2, Action, Params, filters, page
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["InstanceTypes", "Kind"]


@dataclass(frozen=True, slots=True)
class Kind:
    """An instance type.

    Attributes:
        architectures: In EC2's order.
        memory_mib: Of an instance.
        vcpus: By default.
        boot_modes: What its firmware can.
    """

    name: str
    architectures: tuple[str, ...]
    memory_mib: int
    vcpus: int
    boot_modes: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """Write it as EC2 does."""
        uefi = "uefi" in self.boot_modes
        return {
            "instanceType": self.name,
            "currentGeneration": True,
            "bareMetal": False,
            "hypervisor": "nitro" if uefi else "xen",
            "processorInfo": {"supportedArchitectures": self.architectures},
            "vCpuInfo": {"defaultVCpus": self.vcpus},
            "memoryInfo": {"sizeInMiB": self.memory_mib},
            "supportedBootModes": self.boot_modes,
            "nitroTpmSupport": "supported" if uefi else "unsupported",
        }


_BOTH = ("legacy-bios", "uefi")
_UEFI = ("uefi",)
_X86 = ("x86_64",)
_ARM = ("arm64",)
_KINDS = {
    one.name: one
    for one in (
        Kind("t2.nano", ("i386", "x86_64"), 512, 1, ("legacy-bios",)),
        Kind("t3.nano", _X86, 512, 2, _BOTH),
        Kind("t3.micro", _X86, 1024, 2, _BOTH),
        Kind("t3.small", _X86, 2048, 2, _BOTH),
        Kind("t3.medium", _X86, 4096, 2, _BOTH),
        Kind("m5.large", _X86, 8192, 2, _BOTH),
        Kind("t4g.nano", _ARM, 512, 2, _UEFI),
        Kind("t4g.micro", _ARM, 1024, 2, _UEFI),
        Kind("t4g.small", _ARM, 2048, 2, _UEFI),
        Kind("m7g.medium", _ARM, 4096, 1, _UEFI),
    )
}


class InstanceTypes:
    """What the region offers; it has no state."""

    dialect = EC2

    def __init__(self) -> None:
        self.actions: Mapping[str, Action] = {
            "DescribeInstanceTypes": self._describe,
            "RunInstances": self._run,
        }

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        names = params.strings("InstanceType")
        match = filters(params, {"instance-type", "processor-info.supported-architecture"})
        unknown = [name for name in names or () if name not in _KINDS]
        if unknown:
            raise Refusal(
                400,
                "InvalidInstanceType",
                f"The following supplied instance types do not exist: [{', '.join(unknown)}]",
            )
        found = [_KINDS[name] for name in names] if names else list(_KINDS.values())
        found = [one for one in found if any(map(match, _facts(one)))]
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=100)
        params.done()
        return {"instanceTypeSet": [one.row() for one in shown], "nextToken": token}

    def _run(self, _params: Params, _now: float) -> Mapping[str, Any]:
        raise Refusal(
            400, "UnsupportedOperation", "Only dry runs of RunInstances are simulated: use a group"
        )


def _facts(one: Kind) -> list[dict[str, str]]:
    """Return what filters see; a filter has a value for each architecture."""
    return [
        {"instance-type": one.name, "processor-info.supported-architecture": architecture}
        for architecture in one.architectures
    ]
