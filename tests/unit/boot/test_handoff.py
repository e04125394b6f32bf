"""The hand-off: what is read of the closure, what is loaded, and that a plain process starts no kernel."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from calve.boot import kexec
from calve.boot.agent import Agent
from calve.boot.console import Console
from calve.boot.handoff import Handoff, read_wanted
from calve.boot.kexec import LINUX
from calve.boot.policy import Policy
from calve.contract import evidence
from calve.contract.abi import LIMIT_BYTES, Abi, Bootspec, Wanted
from calve.contract.codes import Code
from calve.contract.userdata import UserDataError
from calve.errors import DamagedError
from calve.nix.storepath import StorePath

SYSTEM = StorePath("d" * 32, "nixos-system-web-25.11")
KERNEL = StorePath("b" * 32, "linux-6.12")
INITRD = StorePath("c" * 32, "initrd-linux-6.12")
MODULES = StorePath("f" * 32, "linux-6.12-modules")


class Loader:
    """Loads nothing, and keeps what it was asked."""

    def __init__(self):
        self.error = None
        self.loaded = []
        self.started = []

    def load(self, root, kernel, initrd, command_line):
        if self.error is not None:
            raise self.error
        self.loaded.append((kernel.read_bytes(), initrd.read_bytes(), command_line))

    def start(self, root):
        self.started.append(root)


@pytest.fixture
def loader():
    return Loader()


@pytest.fixture
def root(tmp_path):
    """A root disk with a system, its kernel and its initrd."""
    for path, name in ((KERNEL, "bzImage"), (INITRD, "initrd")):
        place = tmp_path / str(path)[1:]
        place.mkdir(parents=True)
        (place / name).write_text(name)
    (tmp_path / str(SYSTEM)[1:]).mkdir()
    return tmp_path


def closure(root, *, release="6.12.58", extension=True, initrd=f"{INITRD}/initrd"):
    spec = Bootspec(f"{KERNEL}/bzImage", initrd, ("quiet",), f"{SYSTEM}/init", str(SYSTEM), "x")
    wanted = Wanted(spec, Abi("0.2.0", kernel_release=release) if extension else None)
    (root / str(SYSTEM)[1:] / "boot.json").write_bytes(wanted.dump())
    return wanted


def handoff(root, loader, line="console=ttyS0 root=/dev/vda", **options):
    return Handoff(root, line, release="6.1", loader=loader, **options)


def test_the_same_kernel_switches_root(root, loader):
    closure(root, release="6.1")
    made = handoff(root, loader)
    made.prepare(SYSTEM)
    assert made.phase == "switch-root"
    made.leave()
    assert (loader.loaded, loader.started, made.note) == ([], [], "")


def test_another_kernel_is_loaded_first_and_started_at_the_end(root, loader):
    closure(root)
    made = handoff(root, loader)
    made.prepare(SYSTEM)
    assert made.phase == "kexec"
    assert loader.started == []
    ((kernel, initrd, line),) = loader.loaded
    assert (kernel, initrd) == (b"bzImage", b"initrd")
    assert line.startswith("quiet console=ttyS0 root=/dev/vda init=/nix/var/nix/profiles/system/")
    assert line.endswith(f"calve.kexec=1 calve.kernel={KERNEL} calve.initrd={INITRD}")
    made.leave()
    assert loader.started == [root]
    # Under that command line, the same closure is at its end.
    after = Handoff(root, line, release="6.12.58", loader=loader)
    after.prepare(SYSTEM)
    assert after.phase == "switch-root"


def test_not_a_second_time(root, loader):
    closure(root)
    made = handoff(root, loader, "calve.kexec=1")
    with pytest.raises(UserDataError) as caught:
        made.prepare(SYSTEM)
    assert caught.value.code is Code.KEXEC_LOOP
    made.leave()
    assert (loader.loaded, loader.started) == ([], [])


def test_what_cannot_be_loaded_is_told_and_not_started(root, loader):
    closure(root)
    loader.error = kexec.refusal(errno.EPERM)
    made = handoff(root, loader)
    with pytest.raises(UserDataError) as caught:
        made.prepare(SYSTEM)
    assert caught.value.code is Code.KEXEC_DENIED
    made.leave()
    assert loader.started == []


def test_where_the_running_kernel_will_do_it_is_used_instead(root, loader):
    closure(root, release="6.1")
    loader.error = kexec.refusal(errno.EPERM)
    made = handoff(root, loader, f"calve.kernel=/nix/store/{'a' * 32}-linux-6.1")
    made.prepare(SYSTEM)
    assert made.phase == "switch-root"
    assert made.note.startswith("kexec-denied: ")
    made.leave()
    assert loader.started == []


def test_the_initrd_says_what_it_offers(root, loader):
    closure(root, release="6.1")
    offered = json.dumps(Abi("0.2.0", nixos_init=True).dump()).encode()
    made = handoff(root, loader, offered=offered)
    made.prepare(SYSTEM)
    assert made.phase == "kexec"
    with pytest.raises(DamagedError):
        handoff(root, loader, offered=b"{}")


@pytest.mark.parametrize("initrd", [None, f"{INITRD}/initrd"])
def test_an_initrd_without_the_agent_is_not_started(root, loader, initrd):
    closure(root, extension=False, initrd=initrd)
    modules(root)
    with pytest.raises(UserDataError) as caught:
        handoff(root, loader).prepare(SYSTEM)
    assert caught.value.code is Code.KERNEL_FOREIGN
    assert "6.12.58, 6.1 runs" in str(caught.value)
    assert loader.loaded == []


def modules(root):
    """Add modules as NixOS does: a link in the toplevel."""
    (root / str(MODULES)[1:] / "lib/modules/6.12.58").mkdir(parents=True)
    (root / str(SYSTEM)[1:] / "kernel-modules").symlink_to(str(MODULES))


def test_read(root):
    assert read_wanted(root, SYSTEM) == Wanted()
    modules(root)
    assert read_wanted(root, SYSTEM) == Wanted(modules_release="6.12.58")
    wanted = closure(root)
    found = read_wanted(root, SYSTEM)
    assert (found.bootspec, found.abi, found.modules_release) == (
        wanted.bootspec,
        wanted.abi,
        "6.12.58",
    )
    (root / str(MODULES)[1:] / "lib/modules/other").mkdir()
    assert read_wanted(root, SYSTEM).modules_release == ""


@pytest.mark.parametrize("text", ["", "{", "{}", '{"org.calve.v1": {}}', " " * (LIMIT_BYTES + 1)])
def test_a_damaged_boot_json_is_refused(root, loader, text):
    (root / str(SYSTEM)[1:] / "boot.json").write_text(text)
    with pytest.raises(UserDataError) as caught:
        handoff(root, loader).prepare(SYSTEM)
    assert caught.value.code is Code.CONTRACT_UNKNOWN
    assert f"{SYSTEM}/boot.json" in str(caught.value)


def test_links_are_followed_on_the_machine_s_disk_and_not_on_ours(root, loader):
    place = root / str(INITRD)[1:] / "initrd"
    place.rename(place.with_name("real"))
    place.symlink_to(f"{INITRD}/../{INITRD.basename}/real")
    closure(root)
    made = handoff(root, loader)
    made.prepare(SYSTEM)
    assert loader.loaded[0][1] == b"initrd"
    place.unlink()
    place.symlink_to(place.name)
    with pytest.raises(UserDataError) as caught:
        handoff(root, loader).prepare(SYSTEM)
    assert caught.value.code is Code.SYSTEM_INVALID


# The agent's end


@pytest.mark.parametrize("error", [None, UserDataError(Code.KEXEC_FAILED, "it did not start")])
def test_the_agent_leaves_last_and_tells_where_that_fails(root, loader, monkeypatch, error):
    closure(root)
    made = handoff(root, loader)
    out = io.StringIO()
    agent = Agent(
        Policy(("k-1:AAAA",), root, hold_s=0, run=root / "run"), Console(out), handoff=made
    )
    order = []

    def start(_root):
        order.append("start")
        if error is not None:
            raise error

    monkeypatch.setattr(loader, "start", start)
    monkeypatch.setattr(agent, "_boot", lambda: (made.prepare(SYSTEM), order.append("boot")))
    assert agent.run() == (0 if error is None else 1)
    assert order == ["boot", "start"]
    last = [*evidence.read(out.getvalue())][-1]
    assert (last.kind, last.fields.get("code")) == (
        ("start", None) if error is None else ("fail", "kexec-failed")
    )


# The kernel's own calls: none is made here


@pytest.fixture
def calls(monkeypatch):
    """Stand in for every call that could start a kernel."""
    made = []

    class Libc:
        failing = ()

        def __getattr__(self, name):
            def call(*arguments):
                made.append((name, *arguments))
                return -1 if name in self.failing else 0

            return call

    libc = Libc()
    monkeypatch.setattr(kexec, "_libc", lambda: libc)
    monkeypatch.setattr(kexec.os, "sync", lambda: made.append(("sync",)))
    return libc, made


@pytest.mark.parametrize("place", ["/", "tmp", "missing"])
def test_a_plain_process_starts_no_kernel(tmp_path, calls, place):
    root = Path("/") if place == "/" else tmp_path / place
    (tmp_path / "tmp").mkdir()
    with pytest.raises(UserDataError) as caught:
        LINUX.load(root, tmp_path / "kernel", tmp_path / "initrd", "quiet")
    assert caught.value.code is Code.KEXEC_FAILED
    with pytest.raises(UserDataError):
        LINUX.start(root)
    assert calls[1] == []


@pytest.fixture
def machine(tmp_path, calls, monkeypatch):
    """A directory that passes for a machine's root disk."""
    monkeypatch.setattr(kexec.os.path, "ismount", lambda place: place == tmp_path)
    monkeypatch.setattr(kexec.memory, "available_bytes", lambda: 300 << 20)
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_text(name)
    return tmp_path


def load(machine, line="quiet"):
    LINUX.load(machine, machine / "kernel", machine / "initrd", line)


@pytest.mark.parametrize(("name", "number"), [("x86_64", 320), ("aarch64", 294)])
def test_load(machine, calls, monkeypatch, name, number):
    uname = os.uname()
    monkeypatch.setattr(kexec.os, "uname", lambda: os.uname_result((*uname[:4], name)))
    load(machine)
    ((call, *arguments),) = calls[1]
    assert call == "syscall"
    words = [getattr(one, "value", one) for one in arguments]
    assert words[0] == number
    assert words[1] != words[2]
    assert words[3:] == [6, b"quiet\0", 0]


def test_load_refuses_other_machines_long_lines_and_missing_files(machine, calls, monkeypatch):
    with pytest.raises(UserDataError) as caught:
        load(machine, "x" * kexec.COMMAND_LINE_BYTES)
    assert caught.value.code is Code.KEXEC_FAILED
    (machine / "initrd").unlink()
    with pytest.raises(UserDataError) as caught:
        load(machine)
    assert caught.value.code is Code.KEXEC_FAILED
    uname = os.uname()
    monkeypatch.setattr(kexec.os, "uname", lambda: os.uname_result((*uname[:4], "s390x")))
    with pytest.raises(UserDataError):
        load(machine)
    assert calls[1] == []


def test_load_by_errno(machine, calls, monkeypatch):
    calls[0].failing = ("syscall",)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.ENOEXEC)
    with pytest.raises(UserDataError, match="Exec format error") as caught:
        load(machine)
    assert caught.value.code is Code.KEXEC_FAILED


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EPERM, Code.KEXEC_DENIED),
        (errno.EKEYREJECTED, Code.KEXEC_DENIED),
        (errno.ENODATA, Code.KEXEC_DENIED),
        (errno.ENOMEM, Code.MEMORY_SMALL),
        (errno.EADDRNOTAVAIL, Code.MEMORY_SMALL),
        (errno.EIO, Code.DISK_FAULT),
        (errno.ENOEXEC, Code.KEXEC_FAILED),
        (errno.ENOSYS, Code.KEXEC_FAILED),
        (errno.EINVAL, Code.KEXEC_FAILED),
    ],
)
def test_errno_to_code(number, code):
    error = kexec.refusal(number)
    assert error.code is code
    assert os.strerror(number) in str(error)


def test_the_memory_guard():
    kexec.check_memory(20 << 20, 104 << 20)
    with pytest.raises(UserDataError, match=r"needs 104 MiB .* 103 are") as caught:
        kexec.check_memory(20 << 20, (104 << 20) - 1)
    assert caught.value.code is Code.MEMORY_SMALL


def test_the_memory_guard_comes_first(machine, calls, monkeypatch):
    monkeypatch.setattr(kexec.memory, "available_bytes", lambda: 60 << 20)
    with pytest.raises(UserDataError):
        load(machine)
    assert calls[1] == []


def test_start_leaves_the_disk_clean_and_then_starts(machine, calls):
    with pytest.raises(UserDataError, match="did not start"):  # here it does return
        LINUX.start(machine)
    assert [call[0] for call in calls[1]] == ["sync", "umount2", "reboot"]
    assert calls[1][1][1] == os.fsencode(machine)
    assert calls[1][2] == ("reboot", 0x45584543)


def test_start_makes_a_busy_disk_read_only(machine, calls):
    calls[0].failing = ("umount2",)
    with pytest.raises(UserDataError):
        LINUX.start(machine)
    assert [call[0] for call in calls[1]] == ["sync", "umount2", "mount", "reboot"]


def test_start_does_not_leave_a_disk_that_is_written_to(machine, calls):
    calls[0].failing = ("umount2", "mount")
    with pytest.raises(UserDataError) as caught:
        LINUX.start(machine)
    assert caught.value.code is Code.DISK_FAULT
    assert "reboot" not in [call[0] for call in calls[1]]
