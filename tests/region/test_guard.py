"""Children after our own end: also a `kill -9` leaves none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calve.errors import CalveError, NotFoundError
from calve.process import Process
from calve.region import guard
from calve.region.machine import Launch
from calve.region.qemu import DiskImage, Firmware, MachineImage, QemuMachines
from calve.region.server import Server

OWNER = """
import contextlib, sys, time
from calve.process import Process
from calve.region import guard
with contextlib.ExitStack() as owner:
    child = Process(["sh", "-c", "trap '' TERM; sleep 60 & sleep 60"])
    guard.keep(child, owner)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def alive(session):
    """Return the processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(stat)
    return found


def test_a_killed_owner_takes_its_children_along():
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        session = int(owner.stdout.readline())
        assert alive(session)
        owner.kill()
    end = time.monotonic() + 10
    while alive(session):
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.02)


def test_an_owner_that_ends_leaves_neither_child_nor_guard_nor_descriptor():
    before = os.listdir("/proc/self/fd")
    with contextlib.ExitStack() as owner:
        child = Process(["sleep", "60"])
        guard.keep(child, owner)
        assert child.returncode is None
    assert child.returncode == -signal.SIGTERM
    assert os.listdir("/proc/self/fd") == before


# Machines that do not come to life; QEMU is a script.


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Return a function: a shell script that is QEMU in, the machines out; each has the image "ami"."""
    made = []
    for folder in (tmp_path, *tmp_path.parents):  # QEMU is nobody's, where we are root
        if "pytest-of-" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o011)

    def make(script):
        programs = tmp_path / "bin"
        programs.mkdir(mode=0o755)
        (programs / "qemu-system-x86_64").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "qemu-system-x86_64").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        one = QemuMachines(tmp_path / "machines", lambda _launch: Server(lambda _request: None))
        for name in ("kernel", "initrd", "disk"):
            (tmp_path / name).write_bytes(b"x")
        one.images["ami"] = MachineImage(
            tmp_path / "kernel", tmp_path / "initrd", "", tmp_path / "disk"
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


LAUNCH = Launch("i-1", "ami", "t3.nano", b"")


def test_qemu_that_does_not_start_is_told_with_its_words(machines):
    with pytest.raises(CalveError, match="QEMU did not start: no such machine"):
        machines("echo no such machine >&2; exit 1").launch(LAUNCH)


def test_a_disk_that_cannot_be_copied_is_our_error(machines, tmp_path):
    one = machines("exit 1")
    (tmp_path / "disk").unlink()
    with pytest.raises(CalveError, match="cannot make a machine: No such file"):
        one.launch(LAUNCH)


# Answers the two questions as QEMU does, on the control socket it was given.
ALIVE = """
for arg in "$@"; do case $arg in socket,id=control,fd=*) fd=${arg##*=};; esac; done
exec python3 -c '
import socket, sys, time
with socket.socket(fileno=int(sys.argv[1])) as control:
    control.sendall(b"{}\\n")
    control.recv(4096)
    control.sendall(b"{\\"return\\": {}}\\n")
    control.recv(4096)
    control.sendall(b"{\\"return\\": \\"TCP[HOST_FORWARD] 1 127.0.0.1 5555 x\\"}\\n")
time.sleep(60)' $fd
"""


def test_a_machine_that_ends_by_itself_is_told_of_and_a_terminated_one_is_not(machines):
    one = machines(ALIVE)
    one.launch(LAUNCH)
    assert one.ended() == {}
    one.kill("i-1")
    assert one.ended() == {"i-1": -signal.SIGKILL}
    one.terminate("i-1")
    assert one.ended() == {}


# Machines that are a disk alone; QEMU writes down what it was asked for.

ASKED = f"""
printf '%s\\n' "$@" > "$(dirname "$0")/asked"
for arg in "$@"; do case $arg in *unit=1*) cat "${{arg##*file=}}" > "$(dirname "$0")/variables"; esac; done
{ALIVE}"""


def asked(tmp_path):
    return (tmp_path / "bin" / "asked").read_text().splitlines()


@pytest.fixture
def asking(machines, tmp_path):
    one = machines(ASKED)
    (tmp_path / "bin").chmod(0o777)  # QEMU is nobody's, where we are root
    return one


def test_a_disk_is_booted_by_its_firmware_alone(asking, tmp_path):
    (tmp_path / "code").write_bytes(b"code")
    (tmp_path / "variables").write_bytes(b"variables")
    firmware = Firmware(tmp_path / "code", tmp_path / "variables")
    asking.images["ami"] = DiskImage(tmp_path / "disk", firmware)
    asking.launch(LAUNCH)
    arguments = asked(tmp_path)
    assert not {"-kernel", "-initrd", "-append"} & set(arguments)
    assert "-no-reboot" in arguments
    drives = [one for one in arguments if "file=/dev/fd/" in one]
    assert [one.partition(",file=")[0] for one in drives] == [
        "if=pflash,unit=0,format=raw,readonly=on",
        "if=pflash,unit=1,format=raw",
        "if=none,id=root,format=raw",
    ]
    assert "nvme,drive=root,bootindex=0,serial=vol1" in arguments
    assert (tmp_path / "bin" / "variables").read_bytes() == b"variables"
    assert (tmp_path / "machines" / "i-1" / "disk.raw").read_bytes() == b"x"


def test_a_registered_image_s_volume_is_made_for_the_instance(asking, tmp_path, monkeypatch):
    seen = []

    def volume(image_id, path):
        seen.append(image_id)
        path.write_bytes(b"volume")
        return "legacy-bios" if len(seen) == 1 else "uefi-preferred"

    asking._volumes = volume
    asking.launch(Launch("i-1", "ami-1", "t3.nano", b""))
    assert not any("pflash" in one for one in asked(tmp_path))
    (tmp_path / "code").write_bytes(b"code")
    (tmp_path / "variables").write_bytes(b"variables")
    firmware = Firmware(tmp_path / "code", tmp_path / "variables")
    monkeypatch.setattr("calve.region.qemu.ovmf", lambda: firmware)
    asking.launch(Launch("i-2", "ami-1", "t3.nano", b""))
    assert sum("pflash" in one for one in asked(tmp_path)) == 2
    assert seen == ["ami-1", "ami-1"]
    assert (tmp_path / "machines" / "i-2" / "disk.raw").read_bytes() == b"volume"


def test_an_image_that_nobody_knows(machines):
    with pytest.raises(NotFoundError, match="no image ami-1"):
        machines("exit 1").launch(Launch("i-1", "ami-1", "t3.nano", b""))
