"""Another kernel without firmware: load it beside the one that runs, then leave the disk and start it.

kexec_file_load(2) by its number, as glibc has no function for it; umount(2), mount(2) and reboot(2) by glibc's.
Source: kexec_load(2), reboot(2), umount(2).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Final, Protocol

from calve.boot import memory
from calve.contract.codes import Code
from calve.contract.userdata import UserDataError

__all__ = ["COMMAND_LINE_BYTES", "LINUX", "Linux", "Loader", "check_memory", "refusal"]

COMMAND_LINE_BYTES: Final = 2048
"""The most that x86 and arm64 take, the zero at its end included."""

_FILE_LOAD: Final = {"x86_64": 320, "aarch64": 294, "riscv64": 294}
_REBOOT_KEXEC: Final = 0x45584543
_MS_RDONLY, _MS_REMOUNT = 1, 32
_SPARE_BYTES: Final = 64 << 20

_DENIED: Final = frozenset(
    {errno.EPERM, errno.EACCES, errno.EKEYREJECTED, errno.ENOKEY, errno.ENODATA, errno.EBADMSG}
)
_NO_MEMORY: Final = frozenset({errno.ENOMEM, errno.EADDRNOTAVAIL})
_DISK: Final = frozenset({errno.EIO, errno.EROFS})


class Loader(Protocol):
    """What starts another kernel; a test's does nothing."""

    def load(self, root: Path, kernel: Path, initrd: Path, command_line: str) -> None:
        """Load a kernel; nothing has changed where that fails.

        Raises:
            UserDataError: it cannot be, and its code says why.
        """

    def start(self, root: Path) -> None:
        """Leave the file system at `root` and start what was loaded; does not return.

        Raises:
            UserDataError: it does not start.
        """


def check_memory(images_bytes: int, available_bytes: int) -> None:
    """Refuse to load images for which there is too little memory: they are in it twice for a moment.

    Raises:
        UserDataError: too little.
    """
    need = 2 * images_bytes + _SPARE_BYTES
    if available_bytes < need:
        raise UserDataError(
            Code.MEMORY_SMALL,
            f"the closure's kernel needs {need >> 20} MiB to be loaded, "
            f"{available_bytes >> 20} are available",
        )


def refusal(number: int) -> UserDataError:
    """Return the error of a kernel that would not load, by its errno."""
    text = f"the closure's kernel cannot be loaded: {os.strerror(number)}"
    if number in _DENIED:
        return UserDataError(Code.KEXEC_DENIED, text)
    if number in _NO_MEMORY:
        return UserDataError(Code.MEMORY_SMALL, text)
    if number in _DISK:
        return UserDataError(Code.DISK_FAULT, text)
    return UserDataError(Code.KEXEC_FAILED, text)


class Linux:
    """The kernel itself."""

    def load(self, root: Path, kernel: Path, initrd: Path, command_line: str) -> None:
        """Load a kernel; see `Loader`. Refused where `root` is not a machine's: a plain process starts no kernel."""
        _refuse_host(root)
        line = command_line.encode() + b"\0"
        if len(line) > COMMAND_LINE_BYTES:
            raise UserDataError(
                Code.KEXEC_FAILED, f"a kernel command line of {len(line)} bytes is too long"
            )
        number = _FILE_LOAD.get(os.uname().machine)
        if number is None:
            raise refusal(errno.ENOSYS)
        try:
            with kernel.open("rb") as first, initrd.open("rb") as second:
                size = os.fstat(first.fileno()).st_size + os.fstat(second.fileno()).st_size
                check_memory(size, memory.available_bytes())
                _file_load(number, first.fileno(), second.fileno(), line)
        except OSError as error:
            raise refusal(error.errno or 0) from error

    def start(self, root: Path) -> None:
        """Start what was loaded; see `Loader`."""
        _refuse_host(root)
        libc = _libc()
        os.sync()
        place = os.fsencode(root)
        # An initrd with systemd has mounts of its own below it: then it is at least made clean.
        if libc.umount2(place, 0) and libc.mount(None, place, None, _MS_REMOUNT | _MS_RDONLY, None):
            raise UserDataError(Code.DISK_FAULT, f"{root} cannot be unmounted: {_reason()}")
        libc.reboot(_REBOOT_KEXEC)
        raise UserDataError(
            Code.KEXEC_FAILED, f"the closure's kernel was loaded and did not start: {_reason()}"
        )


LINUX: Final = Linux()


def _refuse_host(root: Path) -> None:
    if root == Path("/") or not os.path.ismount(root):
        raise UserDataError(Code.KEXEC_FAILED, f"{root} is no machine's root disk: no kexec here")


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _reason() -> str:
    import ctypes

    return os.strerror(ctypes.get_errno())


def _file_load(number: int, kernel_fd: int, initrd_fd: int, line: bytes) -> None:
    import ctypes

    word = ctypes.c_long
    arguments = (word(number), word(kernel_fd), word(initrd_fd), word(len(line)), line, word(0))
    if _libc().syscall(*arguments):
        raise OSError(ctypes.get_errno(), "kexec_file_load")
