"""The two processors that EC2 has, and what firmware, PE files and systemd call them."""

from __future__ import annotations

from dataclasses import dataclass

from calve.errors import UsageError

__all__ = ["AARCH64", "ARCHES", "X86_64", "Arch", "arch"]


@dataclass(frozen=True, slots=True)
class Arch:
    """A processor.

    Attributes:
        name: as `uname -m` says it.
        loader: file that firmware starts from `EFI/BOOT` (UEFI specification 2.10, 3.5.1.1).
        stub: systemd's EFI stub.
        machine: `Machine` of a PE file (Microsoft's PE format, "Machine types").
    """

    name: str
    loader: str
    stub: str
    machine: int


X86_64 = Arch("x86_64", "BOOTX64.EFI", "linuxx64.efi.stub", 0x8664)
AARCH64 = Arch("aarch64", "BOOTAA64.EFI", "linuxaa64.efi.stub", 0xAA64)
ARCHES = (X86_64, AARCH64)

_ALIASES = {"arm64": "aarch64", "amd64": "x86_64"}  # EC2 says arm64


def arch(name: str) -> Arch:
    """Return a processor by name: `aarch64`, EC2's `arm64`, Nix's `aarch64-linux`.

    Raises:
        UsageError: it is neither of the two.
    """
    plain = name.removesuffix("-linux")
    for one in ARCHES:
        if _ALIASES.get(plain, plain) == one.name:
            return one
    raise UsageError(
        f"{name!r} is no processor that images are made for",
        hint=f"known are {', '.join(one.name for one in ARCHES)}",
    )
