"""Instances as real virtual machines: QEMU, software emulation, 512 MB like a t3.nano, no root needed.

One network card as EC2 shows it to an instance, without a way out: its link-local net reaches the metadata service
at 169.254.169.254, what `forwards` names, and nothing else (`restrict=on`). Each forwarded connection is one
`busybox nc` on the host. Port 80 of the machine is a free port of 127.0.0.1. Where we are root, QEMU runs as nobody;
it gets open files, not paths, so that it needs no permission on the directories.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calve.errors import CalveError, NotFoundError
from calve.process import NOBODY, Process, which
from calve.region import guard
from calve.region.machine import Launch
from calve.region.server import Server

__all__ = ["DiskImage", "Firmware", "Forward", "MachineImage", "QemuMachines", "ovmf"]

METADATA = "169.254.169.254"
_NET = "net=169.254.169.0/24,host=169.254.169.2,dns=169.254.169.3,dhcpstart=169.254.169.15"
_FULL = (
    "werror=report"  # where our disk is full, the machine is told; by default it would stand still
)
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MachineImage:
    """What an image id stands for.

    Attributes:
        kernel: of the machine.
        initrd: of the machine.
        command_line: of its kernel.
        disk: the root disk that each instance gets a copy of.
        log_writes: keep every write and flush of the root disk in `writes.log` beside it, in the order in which they
            ended: QEMU's `blklogwrites`, the format of Linux's dm-log-writes.
    """

    kernel: Path
    initrd: Path
    command_line: str
    disk: Path
    log_writes: bool = False


@dataclass(frozen=True, slots=True)
class Firmware:
    """UEFI as QEMU takes it.

    Attributes:
        code: the firmware itself, shared by all machines.
        variables: an empty variable store, of which each machine gets a copy.
    """

    code: Path
    variables: Path


def ovmf() -> Firmware:
    """Find OVMF without Secure Boot where Debian has it; NotFoundError where it is not installed."""
    folder = Path("/usr/share/OVMF")
    found = Firmware(folder / "OVMF_CODE_4M.fd", folder / "OVMF_VARS_4M.fd")
    if not (found.code.exists() and found.variables.exists()):
        raise NotFoundError("UEFI's firmware is not installed", hint="apt-get install ovmf")
    return found


@dataclass(frozen=True, slots=True)
class DiskImage:
    """An image that is a disk alone: its firmware finds what to boot on it, as on EC2.

    Attributes:
        disk: the root disk that each instance gets a copy of; it sees it as NVMe.
        firmware: UEFI; None boots by BIOS.
    """

    disk: Path
    firmware: Firmware | None


Image = MachineImage | DiskImage


@dataclass(frozen=True, slots=True)
class Forward:
    """A TCP address that machines see, and the port of 127.0.0.1 behind it."""

    address: str
    port: int
    to: int

    def option(self, busybox: str) -> str:
        """Return the piece of QEMU's -netdev."""
        return f"guestfwd=tcp:{self.address}:{self.port}-cmd:{busybox} nc 127.0.0.1 {self.to}"


@dataclass(slots=True)
class _Machine:
    process: Process
    port: int
    keyboard: int
    owner: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class QemuMachines:
    """Runs instances; see `machine.Machines`.

    Args:
        directory: where disks and consoles are kept, a folder per instance.
        metadata: starts the metadata service of one instance; closed with the instance.
        forwards: what machines can reach beside it; may be changed before a launch.
        memory_mb: of each machine.
        volumes: writes the root disk of an instance of an image that is not in `images`, as a raw disk at a path,
            and returns how it boots; `legacy-bios` is BIOS, all else UEFI. See `storage.Storage.volume`.
    """

    def __init__(
        self,
        directory: Path,
        metadata: Callable[[Launch], Server],
        *,
        forwards: Sequence[Forward] = (),
        memory_mb: int = 512,
        volumes: Callable[[str, Path], str] | None = None,
    ) -> None:
        self.images: dict[str, Image] = {}
        self.forwards = tuple(forwards)
        self._directory = directory
        self._metadata = metadata
        self._memory_mb = memory_mb
        self._volumes = volumes
        self._qemu = which("qemu-system-x86_64", package="qemu-system-x86")
        self._busybox = which("busybox", package="busybox-static")
        self._machines: dict[str, _Machine] = {}
        self._lock = threading.Lock()

    def launch(self, launch: Launch) -> None:
        """Start an instance; returns at once.

        Raises:
            NotFoundError: no such image.
            CalveError: no room for its disk, or QEMU does not start.
        """
        try:
            self._launch(launch)
        except OSError as error:
            raise CalveError(
                f"cannot make a machine: {error.strerror}", place=error.filename
            ) from error

    def _launch(self, launch: Launch) -> None:
        folder = self._directory / launch.instance_id
        disk = folder / "disk.raw"
        image = self._image(launch.image_id, disk)
        with contextlib.ExitStack() as undo:
            metadata = undo.enter_context(self._metadata(launch))
            machine = self._start(image, folder, disk, metadata, undo)
            machine.owner = undo.pop_all()
        with self._lock:
            self._machines[launch.instance_id] = machine

    def _image(self, image_id: str, disk: Path) -> Image:
        """Find an image, and make an instance's root disk of it."""
        image = self.images.get(image_id)
        if image is None and self._volumes is None:
            raise NotFoundError(f"no image {image_id}")
        disk.parent.mkdir(parents=True)
        if image is not None:
            copy_sparse(image.disk, disk)
            return image
        boot_mode = self._volumes(image_id, disk) if self._volumes is not None else ""
        return DiskImage(disk, None if boot_mode == "legacy-bios" else ovmf())

    def _start(
        self,
        image: Image,
        folder: Path,
        disk: Path,
        metadata: Server,
        undo: contextlib.ExitStack,
    ) -> _Machine:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        console = folder / "console.log"
        with theirs, contextlib.ExitStack() as files:
            if isinstance(image, DiskImage):
                boot, descriptors = _boot_disk(image, folder, disk, files)
            else:
                boot, descriptors = _boot_kernel(image, folder, disk, files)
            out = files.enter_context(console.open("wb"))
            messages = files.enter_context((folder / "qemu.log").open("wb"))
            forwards = [Forward(METADATA, 80, metadata.port), *self.forwards]
            read, keyboard = os.pipe()
            files.callback(os.close, read)
            undo.callback(os.close, keyboard)
            net = ",".join(forward.option(self._busybox) for forward in forwards)
            argv: list[str | Path] = [
                self._qemu,
                *("-nodefaults", "-display", "none", "-machine", "pc", "-accel", "tcg"),
                *("-cpu", "max", "-smp", "1", "-m", str(self._memory_mb), "-no-reboot"),
                *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
                *("-chardev", f"socket,id=control,fd={theirs.fileno()}"),
                *("-mon", "chardev=control,mode=control"),
                *boot,
                *("-netdev", f"user,id=net,{_NET},restrict=on,hostfwd=tcp:127.0.0.1:0-:80,{net}"),
                *("-device", "virtio-net-pci,netdev=net,romfile="),
            ]
            process = Process(
                argv,
                stdin=read,
                stdout=out,
                stderr=messages,
                pass_fds=[theirs.fileno(), *descriptors],
                unprivileged=True,
                cwd=Path("/"),  # ours may not be nobody's to enter
            )
        guard.keep(process, undo)
        try:
            port = _Control(ours).forwarded_port()
        except (OSError, ValueError, KeyError) as error:
            text = (folder / "qemu.log").read_text("utf-8", "replace").strip()
            raise CalveError(f"QEMU did not start: {text or error}", place=folder) from error
        return _Machine(process, port, keyboard)

    def instances(self) -> list[str]:
        """Return those that were launched and not terminated, in the order of their launch."""
        with self._lock:
            return list(self._machines)

    def address(self, instance_id: str) -> tuple[str, int] | None:
        """Return where the machine's port 80 is reached; None where it has ended."""
        machine = self._machines.get(instance_id)
        return None if machine is None else ("127.0.0.1", machine.port)

    def running(self, instance_id: str) -> bool:
        """Say whether it runs: false once it powered off."""
        machine = self._machines.get(instance_id)
        return machine is not None and machine.process.returncode is None

    def ended(self) -> dict[str, int]:
        """Return those that ended by themselves, with QEMU's exit status: minus a signal's number, 0 a power-off."""
        with self._lock:
            machines = list(self._machines.items())
        codes = {name: machine.process.returncode for name, machine in machines}
        # One that is terminated just now has left the table before it ends.
        return {
            name: code
            for name, code in codes.items()
            if code is not None and name in self._machines
        }

    def console(self, instance_id: str) -> bytes:
        """Return the console's text so far, of an ended instance too."""
        try:
            return (self._directory / instance_id / "console.log").read_bytes()
        except FileNotFoundError:
            return b""

    def type(self, instance_id: str, keys: bytes) -> None:
        """Type on the serial console, as EC2's serial console does; nothing happens where the machine has ended."""
        machine = self._machines.get(instance_id)
        if machine is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(machine.keyboard, keys)

    def kill(self, instance_id: str) -> None:
        """End the machine as a crash of its host would: kill -9."""
        machine = self._machines.get(instance_id)
        if machine is not None:
            machine.process.signal(signal.SIGKILL)
            machine.process.wait()

    def terminate(self, instance_id: str) -> None:
        """End the instance; nothing happens where it has ended."""
        with self._lock:
            machine = self._machines.pop(instance_id, None)
        if machine is not None:
            machine.owner.close()

    def close(self) -> None:
        """End all instances."""
        for instance_id in list(self._machines):
            self.terminate(instance_id)


class _Control:
    """QEMU's machine protocol (QMP), as far as one question goes."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        self._connection = connection

    def forwarded_port(self) -> int:
        with self._connection.makefile("rwb") as stream:
            stream.readline()
            self._ask(stream, {"execute": "qmp_capabilities"})
            answer = self._ask(
                stream,
                {
                    "execute": "human-monitor-command",
                    "arguments": {"command-line": "info usernet"},
                },
            )
        for line in str(answer["return"]).splitlines():
            if "HOST_FORWARD" in line:
                return int(line.split()[3])
        raise ValueError("QEMU forwards no port")

    @staticmethod
    def _ask(stream: Any, question: Mapping[str, Any]) -> Any:
        stream.write(json.dumps(question).encode() + b"\n")
        stream.flush()
        while True:
            answer = json.loads(stream.readline() or b"x")
            if "event" not in answer:
                return answer


def _boot_kernel(
    image: MachineImage, folder: Path, disk: Path, files: contextlib.ExitStack
) -> tuple[list[str], list[int]]:
    """Return QEMU's options that boot a kernel from outside the disk, and the descriptors they name."""
    kernel, initrd = (_open(path, os.O_RDONLY, files) for path in (image.kernel, image.initrd))
    descriptors = [kernel, initrd, _open(disk, os.O_RDWR, files)]
    drive = f"format=raw,file=/dev/fd/{descriptors[-1]}"
    if image.log_writes:
        log_fd = _open(folder / "writes.log", os.O_RDWR | os.O_CREAT | os.O_EXCL, files)
        drive = _logged(descriptors[-1], log_fd)
        descriptors.append(log_fd)
    options = [
        *("-kernel", f"/dev/fd/{kernel}", "-initrd", f"/dev/fd/{initrd}"),
        *("-append", image.command_line),
        *("-drive", f"{drive},if=virtio,discard=unmap,{_FULL}"),
    ]
    return options, descriptors


def _boot_disk(
    image: DiskImage, folder: Path, disk: Path, files: contextlib.ExitStack
) -> tuple[list[str], list[int]]:
    """Return QEMU's options that boot from the disk, which the machine sees as NVMe, and their descriptors."""
    root = _open(disk, os.O_RDWR, files)
    descriptors = [root]
    options: list[str] = []
    if image.firmware is not None:
        variables = folder / "variables.fd"
        copy_sparse(image.firmware.variables, variables)
        code_fd = _open(image.firmware.code, os.O_RDONLY, files)
        variables_fd = _open(variables, os.O_RDWR, files)
        descriptors += [code_fd, variables_fd]
        options += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file=/dev/fd/{code_fd}"]
        options += ["-drive", f"if=pflash,unit=1,format=raw,file=/dev/fd/{variables_fd}"]
    drive = f"if=none,id=root,format=raw,file=/dev/fd/{root},discard=unmap,{_FULL}"
    # EC2's serial number is the volume's id without its hyphen.
    device = f"nvme,drive=root,bootindex=0,serial=vol{folder.name.removeprefix('i-')}"
    return [*options, "-drive", drive, "-device", device], descriptors


def _logged(disk_fd: int, log_fd: int) -> str:
    """Return the piece of QEMU's -drive for a disk whose writes are logged."""
    nodes = {"file": disk_fd, "log": log_fd}
    return "driver=blklogwrites," + ",".join(
        f"{node}.driver=raw,{node}.file.driver=file,{node}.file.filename=/dev/fd/{fd}"
        for node, fd in nodes.items()
    )


def _open(path: Path, flags: int, owner: contextlib.ExitStack) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    owner.callback(os.close, descriptor)
    if flags & os.O_RDWR and os.geteuid() == 0:
        os.fchown(descriptor, NOBODY, NOBODY)
    return descriptor


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a disk without filling its holes; it is private to us."""
    with source.open("rb") as reader, target.open("xb") as writer:
        target.chmod(0o600)
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole is left
                break
            end = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            reader.seek(at)
            writer.seek(at)
            while at < end:
                count = min(end - at, _COPY_BYTES * 64)
                sent = os.sendfile(writer.fileno(), reader.fileno(), at, count)
                if not sent:
                    raise OSError(errno.EIO, "it became shorter while it was copied", str(source))
                at += sent
