"""The end of a boot in a plain process: what the closure says of its kernel, and that this process starts none."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import calve
from calve.contract.abi import Abi, Bootspec, Wanted

# The agent with a kernel that is neither loaded nor started; it lists what would keep the disk from being left.
PROGRAM = """
import os, sys, threading
from calve.boot import kexec, main
kexec.Linux.load = lambda self, root, *_: print("load", os.path.lexists(root / "nix/var/nix/profiles/system"))
def start(self, root):
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    print("start", [name for name in names if name.startswith(str(root))], threading.active_count())
kexec.Linux.start = start
sys.exit(main.main(sys.argv[1:]))
"""

RELEASE = os.uname().release
OTHER = "1.2.3-other"


@pytest.fixture
def release(cloud, one):
    """Return a function: what boot.json says in, a system that was pushed out."""

    def make(name, *, extension=None, modules=None, boot_json=None):
        kernel = cloud.add("linux", {"bzImage": b"no kernel"})
        initrd = cloud.add("initrd-linux", {"initrd": b"no initrd"})
        tree = cloud.add("linux-modules", {f"lib/modules/{modules}/x": b""}, of=f"{modules}")
        spec = Bootspec(
            f"{kernel.path}/bzImage", f"{initrd.path}/initrd", ("quiet",), "/init", "/x", "x"
        )
        body = Wanted(spec, extension).dump() if boot_json is None else boot_json
        files = {"init": b"#!/bin/sh\n", "boot.json": body, "nixos-version": b"1"}
        if modules is not None:
            files["kernel-modules"] = Path(str(tree.path))
        paths = [kernel, initrd, tree]
        system = cloud.add(f"system-{name}", files, paths)
        made = {info.path.name: info for info in [*paths, system]}
        digest = cloud.push(system.path, cloud.key)
        return dataclasses.replace(one, system=system.path, paths=made, manifest=digest)

    return make


@pytest.fixture
def boot(machine, monkeypatch):
    """Return a function that boots the machine with further words on the kernel command line."""
    command = machine.command

    def start(release, words=""):
        machine.wants(release)
        monkeypatch.setattr(machine, "command", lambda: changed(words))
        return machine.boot()

    def changed(words):
        policy, line = command()
        Path(line).write_text(f"console=ttyS0 root=/dev/vda calve.hold=0 {words}\n")
        return [policy, line]

    return start


def test_the_same_kernel_switches_root(release, boot, machine):
    made = release("same", extension=Abi("0.2.0", kernel_release=RELEASE))
    found = boot(made)
    assert found.phases[-1] == "switch-root"
    assert found.event("start").fields["kernel"] == RELEASE
    assert "note" not in found.ready
    machine.check_booted(made, generation=1)


def test_another_kernel_is_none_of_a_plain_process(release, boot, machine):
    """The guard that keeps this test from starting kernels; the profile is as it was, the closure stays."""
    made = release("other", extension=Abi("0.2.0", kernel_release=OTHER))
    failed = boot(made)
    assert failed.fail["code"] == "kexec-failed"
    assert failed.fail["phase"] == "commit"
    assert "no machine's root disk" in failed.fail["message"]
    assert failed.nars == 4
    assert machine.profile() is None
    assert boot(made).requests == 0


def test_no_second_kexec(release, boot, machine):
    """A loop would need an agent that starts a kernel under `calve.kexec=1`."""
    made = release("other", extension=Abi("0.2.0", kernel_release=OTHER))
    failed = boot(made, "calve.kexec=1")
    assert failed.fail["code"] == "kexec-loop"
    assert OTHER in failed.fail["message"]
    assert machine.profile() is None


def test_what_was_started_is_at_its_end(release, boot, machine):
    made = release("other", extension=Abi("0.2.0", kernel_release=OTHER, nixos_init=True))
    kernel, initrd = (made.paths[name].path for name in ("linux", "initrd-linux"))
    found = boot(made, f"calve.kexec=1 calve.kernel={kernel} calve.initrd={initrd}")
    assert found.phases[-1] == "switch-root"
    machine.check_booted(made, generation=1)


def test_another_build_of_the_same_kernel_will_do(release, boot, machine):
    made = release("same", extension=Abi("0.2.0", kernel_release=RELEASE))
    found = boot(made, f"calve.kernel=/nix/store/{'a' * 32}-linux")
    assert found.phases[-1] == "switch-root"
    assert found.ready["note"].startswith("kexec-failed: ")
    machine.check_booted(made, generation=1)


def test_another_contract_needs_the_closure_s_initrd(release, boot, machine):
    offers = machine.directory / "contract.json"
    extension = Abi("0.2.0", kernel_release=RELEASE, nixos_init=True)
    made = release("nixos-init", extension=extension)
    assert boot(made).fail["code"] == "kexec-failed"
    offers.write_text(json.dumps(extension.dump()))
    assert boot(made).phases[-1] == "switch-root"
    offers.write_text("{}")
    failed = boot(made)
    assert failed.fail["code"] == "internal"
    assert "contract.json" in failed.fail["message"]


def test_a_foreign_closure_for_another_kernel(release, boot, machine):
    failed = boot(release("foreign", modules=OTHER))
    assert failed.fail["code"] == "kernel-foreign"
    assert machine.profile() is None
    assert boot(release("foreign-same", modules=RELEASE)).phases[-1] == "switch-root"
    assert boot(release("foreign-unknown")).phases[-1] == "switch-root"


@pytest.mark.parametrize("text", [b"{", b'{"org.nixos.bootspec.v1": {}}', b'{"org.calve.v2": {}}'])
def test_a_boot_json_that_cannot_be_read(release, boot, machine, text):
    failed = boot(release("damaged", boot_json=text))
    assert failed.fail["code"] == "contract-unknown"
    assert failed.fail["phase"] == "commit"
    assert machine.profile() is None


def test_the_kernel_starts_last_and_nothing_holds_the_disk(release, machine):
    made = release("other", extension=Abi("0.2.0", kernel_release=OTHER))
    machine.wants(made)
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROGRAM, *machine.command()],
        env={"PYTHONPATH": str(Path(calve.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    # What cannot be loaded must not leave a profile that nothing can start.
    assert "load False" in lines
    assert '"n":"kexec"' in lines[-2]
    assert lines[-1] == "start [] 1"
    machine.check_booted(made, generation=1)
