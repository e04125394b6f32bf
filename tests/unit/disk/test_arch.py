"""Processors: every name that somebody gives them."""

from __future__ import annotations

import pytest

from calve.disk.arch import AARCH64, ARCHES, X86_64, arch
from calve.errors import UsageError


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("x86_64", X86_64),
        ("x86_64-linux", X86_64),
        ("amd64", X86_64),
        ("aarch64", AARCH64),
        ("aarch64-linux", AARCH64),
        ("arm64", AARCH64),
    ],
)
def test_names(name, found):
    assert arch(name) == found


@pytest.mark.parametrize("name", ["", "i686", "x86-64", "riscv64-linux", "arm64-linux-linux"])
def test_others_are_refused(name):
    with pytest.raises(UsageError, match="processor") as caught:
        arch(name)
    assert "x86_64, aarch64" in caught.value.hint


def test_what_firmware_and_systemd_call_them():
    assert [(one.loader, one.stub) for one in ARCHES] == [
        ("BOOTX64.EFI", "linuxx64.efi.stub"),
        ("BOOTAA64.EFI", "linuxaa64.efi.stub"),
    ]
