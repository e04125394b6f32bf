"""What the show needs before a machine starts: key, kernel, initrd, systems, root disks.

All of it is kept below one directory and made again only where an input changed, so that a second `make demo`
starts at once. One makes at a time (`kept.Turn`): two demos in one directory share what is kept. Nothing in it is
secret but the demo's own signing key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import calve
from calve.boot.policy import Policy
from calve.contract.abi import Abi
from calve.demo import kept
from calve.demo.kernel import META_PACKAGE, OTHER_META_PACKAGE, Kernel, kernel
from calve.demo.packages import Packages
from calve.demo.root import root
from calve.demo.stage2 import UNIT
from calve.demo.system import Boot, Flaw
from calve.demo.tiny import build_tiny
from calve.demo.webserver import build_webserver
from calve.disk import ext4, initrd, payload
from calve.disk.initrd_systemd import SystemdInitrd
from calve.errors import CalveError
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.process import which
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel

__all__ = ["BUILDERS", "Workshop"]

Builder = Callable[..., StorePath]
BUILDERS: dict[str, Builder] = {"tiny": build_tiny, "webserver": build_webserver}

HOLD_S = 5.0  # a failed machine of the demo is read at once; in a cloud it stays for a minute

_KEY_NAME = "calve-demo-1"
# The demo builds its initrd anew where a source changed: a fast level. `calve image initrd` packs tighter.
_LEVEL = 9


_HALF_MADE = (
    "packages/.fetch-*",
    "packages/.index-*",
    "kernel/.linux-*",
    "root/.root-*",
    "images/.tree-*",
    "images/.*.new",
    "images/*.new",
    "store/.calve-demo-*",
)


_KEPT = {"images/initrd-*.img": 6, "root/root-*": 2}
"""How many of the parts that change with a source or a package stay; older ones are made again when wanted."""


class Workshop:
    """Makes and keeps the parts.

    Args:
        directory: of its own; made where it is missing.
        progress: told what is being made.
        cancel: ends it.
    """

    def __init__(
        self, directory: Path, *, progress: Progress = silent, cancel: Cancel | None = None
    ) -> None:
        self.directory = directory
        self.progress = progress
        self.cancel = cancel if cancel is not None else Cancel()
        directory.mkdir(parents=True, exist_ok=True)
        self._turn = kept.Turn(directory, progress, self.cancel)
        self.packages = Packages(directory / "packages", progress, self.cancel)
        self._kernels: dict[str, Kernel] = {}

    def key(self) -> SecretKey:
        """Return the demo's signing key, made on first use."""
        path = self.directory / "key.sec"
        with self._turn:
            with contextlib.suppress(FileNotFoundError):
                try:
                    key = SecretKey.parse(path.read_text("ascii"))
                except (CalveError, UnicodeDecodeError):
                    self.progress(Note("the demo's signing key is damaged, making another"))
                else:
                    if path.stat().st_mode & 0o077:
                        path.chmod(0o600)
                    return key
            key = SecretKey.generate(_KEY_NAME)
            temporary = path.with_name(".key.sec.new")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(key.dump() + "\n")
            temporary.replace(path)
        return key

    @contextlib.contextmanager
    def run(self) -> Iterator[Path]:
        """Make a folder for one run, and remove it in the end; remove what killed runs left, too."""
        with self._turn:
            self._sweep()
        with kept.run_folder(self.directory, self._turn) as folder:
            yield folder

    def _sweep(self) -> None:
        """Remove what killed makers left: with the turn being ours, nobody is making anything."""
        for pattern in _HALF_MADE:
            for path in self.directory.glob(pattern):
                kept.remove(path)
        for pattern, count in _KEPT.items():
            newest = sorted(self.directory.glob(pattern), key=lambda path: -path.stat().st_mtime)
            for path in newest[count:]:
                kept.remove(path)
                kept.remove(path.with_name(f"{path.name}.sha256"))

    def kernel(self, *, other: bool = False) -> Kernel:
        """Return the kernel that machines and systems have, or another that a system may have instead."""
        name = OTHER_META_PACKAGE if other else META_PACKAGE
        with self._turn:
            if name not in self._kernels:
                self._kernels[name] = kernel(self.packages, self.directory / "kernel", name)
        return self._kernels[name]

    def root(self) -> Path:
        """Return the Debian root that an initrd with systemd is made of."""
        with self._turn:
            return root(self.packages, self.directory / "root")

    def initrd(
        self,
        *,
        hold_s: float = HOLD_S,
        ca_file: Path | None = None,
        other: bool = False,
        debug: bool = False,
        systemd: bool = False,
    ) -> Path:
        """Return an initrd with the agent, which trusts the demo's key.

        Args:
            hold_s: how long a failed machine stays on.
            ca_file: authorities for HTTPS; None where machines use plain HTTP alone.
            other: with the other kernel's modules.
            debug: a root shell may be asked for on the kernel command line.
            systemd: with Debian's systemd as PID 1 in busybox's place.
        """
        policy = Policy(
            keys=(self.key().public.dump(),),
            hold_s=hold_s,
            ca_file=None if ca_file is None else "/etc/calve/ca.pem",
            debug=debug,
        ).dump()
        agent = payload.build()
        modules = self.kernel(other=other).modules
        spec: initrd.Contents
        if systemd:
            spec = SystemdInitrd(self.root(), modules, agent, policy, ca_file)
        else:
            busybox = Path(which("busybox", package="busybox-static"))
            spec = initrd.Initrd(busybox, modules, agent, policy, ca_file, debug)
        path = self.directory / "images" / f"initrd-{_digest(spec)}.img"
        with self._turn:
            if not kept.sealed(path):
                self.progress(Note("packing the initrd"))
                initrd.write(spec, path, level=_LEVEL, cancel=self.cancel)
                kept.seal(path)
        return path

    def system(
        self,
        store: LocalStore,
        name: str,
        release: int,
        *,
        other_kernel: bool = False,
        flaw: Flaw | None = None,
    ) -> StorePath:
        """Build a release of a system ("tiny", "webserver") into a store.

        The tiny one has no initrd of its own unless it has the other kernel: it is for fast tests, and only an
        image's initrd starts it.
        """
        found = self.kernel(other=other_kernel)
        boot = Boot(found)
        if other_kernel or name != "tiny":
            units = () if name == "tiny" else (UNIT,)
            offers = Abi(calve.__version__, kernel_release=found.version, health_units=units)
            boot = Boot(
                found,
                self.initrd(other=other_kernel),
                extension=offers.dump(),
                stage_2=payload.build(payload.HEALTH) if units else None,
            )
        with self._turn:
            return BUILDERS[name](store, self.packages, release=release, boot=boot, flaw=flaw)

    def store(self) -> LocalStore:
        """Open the store that systems are built into; the caller closes it."""
        with self._turn:
            return LocalStore(self.directory / "store", create=True)

    def disk(self, size_bytes: int) -> Path:
        """Return an empty root disk."""
        path = self.directory / "images" / f"root-{size_bytes >> 20}m.raw"
        with self._turn:
            if not _has_size(path, size_bytes):
                self._make_disk(path, size_bytes)
        return path

    def _make_disk(self, path: Path, size_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        try:
            ext4.make(temporary, size_bytes, cancel=self.cancel)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _has_size(path: Path, size_bytes: int) -> bool:
    """Say whether a disk is there, and whole as far as its size tells."""
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _digest(spec: initrd.Contents) -> str:
    """Return a digest of all that goes into an initrd: paths, sizes and times of its files, and its policy."""
    digest = hashlib.sha256(f"{calve.__version__} {_LEVEL}".encode() + spec.policy)
    code = Path(initrd.__file__)
    data = code.with_name("data")
    files = [*spec.parts(), *(module.origin for module in spec.agent.modules)]
    for path in [*files, *sorted(code.parent.glob("*.py")), *sorted(data.rglob("*"))]:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
