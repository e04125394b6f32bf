"""What a closure and the initrd that starts it expect of each other, and what follows from it for the hand-off.

A toplevel's `boot.json` says which kernel and initrd are its own (`org.nixos.bootspec.v1`, RFC 125). Our extension
says that this initrd has the agent, and what stage 2 finds done when it starts:

    "org.calve.v1": {"agent": "0.2.0", "initrdAbi": 1, "kernelRelease": "6.12.58", "nixosInit": false,
                     "etcOverlay": true, "etcMutable": true, "healthUnits": []}

An initrd may carry the same object, `/etc/calve/contract.json`: that is what it offers. Where there is none, it
offers what Calve's own initrd does: the root file system mounted, and nothing of NixOS's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from calve.contract.codes import Code
from calve.errors import DamagedError
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = [
    "ABI",
    "EXTENSION",
    "INIT",
    "LIMIT_BYTES",
    "PLAIN",
    "Abi",
    "Bootspec",
    "Decision",
    "Kexec",
    "Refuse",
    "Running",
    "SwitchRoot",
    "Wanted",
    "command_line",
    "decide",
    "parse_abi",
    "parse_wanted",
]

ABI: Final = 1
EXTENSION: Final = "org.calve.v1"
BOOTSPEC: Final = "org.nixos.bootspec.v1"
LIMIT_BYTES: Final = 256 * 1024
INIT: Final = "/nix/var/nix/profiles/system/init"
"""Where the system to start is, whichever it is: the agent flips the profile."""

_TEXT = 4096
_WORDS = 512
# What a second kernel cannot know by itself: the machine's disk and console, and what somebody told its agent.
_CARRIED: Final = ("root", "rootflags", "rootfstype", "roothash", "console")
_OURS: Final = ("calve.kexec", "calve.kernel", "calve.initrd")


@dataclass(frozen=True, slots=True)
class Abi:
    """The extension: what a closure expects of the initrd that starts it, and so what its own initrd does.

    Attributes:
        agent: version of the agent in the closure's initrd.
        initrd_abi: number of this contract.
        kernel_release: of the closure's kernel and modules, as `uname -r` says it.
        nixos_init: nixos-init activates the system, in place of `prepare-root`.
        etc_overlay: the initrd mounts /etc.
        etc_mutable: it mounts it so that it can be written to.
        health_units: units that make the machine healthy.
    """

    agent: str
    initrd_abi: int = ABI
    kernel_release: str = ""
    nixos_init: bool = False
    etc_overlay: bool = False
    etc_mutable: bool = False
    health_units: tuple[str, ...] = ()

    @property
    def contract(self) -> tuple[int, bool, bool, bool]:
        """Return what must be equal; whether an overlay can be written to matters where there is one."""
        mutable = self.etc_mutable and self.etc_overlay
        return self.initrd_abi, self.nixos_init, self.etc_overlay, mutable

    def dump(self) -> dict[str, Any]:
        """Return the extension's object."""
        return {
            "agent": self.agent,
            "initrdAbi": self.initrd_abi,
            "kernelRelease": self.kernel_release,
            "nixosInit": self.nixos_init,
            "etcOverlay": self.etc_overlay,
            "etcMutable": self.etc_mutable,
            "healthUnits": list(self.health_units),
        }


PLAIN: Final = Abi(agent="")
"""What an initrd offers that says nothing of itself."""


@dataclass(frozen=True, slots=True)
class Bootspec:
    """What we read of the bootspec.

    Attributes:
        kernel: its file, below a store path.
        initrd: likewise; None where there is none.
        params: words of the kernel command line, without init=.
        init: stage 2's first program.
        toplevel: the system.
        label: for people.
    """

    kernel: str
    initrd: str | None
    params: tuple[str, ...]
    init: str
    toplevel: str
    label: str

    def dump(self) -> dict[str, Any]:
        """Return the object, as far as we read it."""
        files = {"kernel": self.kernel} | ({} if self.initrd is None else {"initrd": self.initrd})
        return {
            "init": self.init,
            **files,
            "kernelParams": list(self.params),
            "label": self.label,
            "toplevel": self.toplevel,
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a closure says: its bootspec, our extension (None where its initrd has no agent), its modules' release.

    Attributes:
        bootspec: None of a closure that has none.
        abi: the extension.
        modules_release: what `kernel-modules` in the toplevel is for, where that is known.
    """

    bootspec: Bootspec | None = None
    abi: Abi | None = None
    modules_release: str = ""

    @property
    def release(self) -> str:
        """Return the release of the closure's kernel; empty where nothing says it."""
        return (self.abi.kernel_release if self.abi is not None else "") or self.modules_release

    def dump(self) -> bytes:
        """Return boot.json."""
        body = {} if self.bootspec is None else {BOOTSPEC: self.bootspec.dump()}
        if self.abi is not None:
            body[EXTENSION] = self.abi.dump()
        return json.dumps(body, indent=2).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Running:
    """What runs: the kernel's release, store paths of kernel and initrd where known, what the initrd offers.

    Attributes:
        release: `uname -r`.
        abi: of the initrd.
        kernel: the kernel's store path; None where nothing says it.
        initrd: the initrd's; likewise.
        kexecs: how often this boot has started a kernel without firmware.
    """

    release: str
    abi: Abi = PLAIN
    kernel: StorePath | None = None
    initrd: StorePath | None = None
    kexecs: int = 0

    @classmethod
    def parse(cls, command_line: str, release: str, abi: Abi = PLAIN) -> Running:
        """Read the words `calve.kernel=`, `calve.initrd=` and `calve.kexec=` of the kernel command line."""
        words = dict(_split(word) for word in command_line.split())
        count = words.get("calve.kexec", "0")
        return cls(
            release,
            abi,
            _store_path(words.get("calve.kernel", "")),
            _store_path(words.get("calve.initrd", "")),
            int(count) if count.isdecimal() and len(count) < 4 else 1,
        )


@dataclass(frozen=True, slots=True)
class SwitchRoot:
    """Start stage 2 under the kernel that runs."""


@dataclass(frozen=True, slots=True)
class Kexec:
    """Start the closure's own kernel and initrd.

    Attributes:
        kernel: its file.
        initrd: its file.
        params: words of the closure's command line.
        may_switch_root: the running kernel would do if that cannot be: same release, same contract.
    """

    kernel: str
    initrd: str
    params: tuple[str, ...]
    may_switch_root: bool


@dataclass(frozen=True, slots=True)
class Refuse:
    """Start nothing: the closure cannot run on this machine."""

    code: Code
    message: str


Decision = SwitchRoot | Kexec | Refuse


def decide(running: Running, wanted: Wanted) -> Decision:
    """Say how the closure starts."""
    spec, abi = wanted.bootspec, wanted.abi
    kernel = None if spec is None else _store_path(spec.kernel)
    same_release = wanted.release in {"", running.release}
    if running.kernel is None or kernel is None:
        same_kernel = same_release
    else:
        same_kernel = running.kernel == kernel
    if abi is None:  # it knows nothing of Calve: its own initrd would find no system to start
        return SwitchRoot() if same_kernel else _foreign(running, wanted)
    same_contract = running.abi.contract == abi.contract or _is_own_initrd(running, spec)
    if same_kernel and same_contract:
        return SwitchRoot()
    if spec is None or spec.initrd is None:
        return _foreign(running, wanted)
    would_do = same_release and same_contract
    if running.kexecs and not would_do:
        return Refuse(Code.KEXEC_LOOP, f"started without firmware, but {_differs(running, wanted)}")
    if running.kexecs:
        return SwitchRoot()
    return Kexec(spec.kernel, spec.initrd, spec.params, would_do)


def _is_own_initrd(running: Running, spec: Bootspec | None) -> bool:
    if running.initrd is None or spec is None or spec.initrd is None:
        return False
    return running.initrd == _store_path(spec.initrd)


def command_line(kexec: Kexec, running: str) -> str:
    """Return the command line of the closure's kernel.

    Args:
        kexec: what is started; its own disk (`root=`) counts where it names one.
        running: the command line of the kernel that runs; its consoles come last, as the last is /dev/console.
    """
    params = kexec.params
    carried = [word for word in running.split() if _is_carried(word)]
    own = {_split(word)[0] for word in params} - {"console"}
    consoles = [word for word in carried if word.startswith("console=")]
    dropped = {*_OURS, "init"}
    words = [one for one in params if _split(one)[0] not in dropped and one not in consoles]
    words += [word for word in carried if _split(word)[0] not in own]
    words.append(f"init={INIT}")
    words.append("calve.kexec=1")
    for name, file in (("calve.kernel", kexec.kernel), ("calve.initrd", kexec.initrd)):
        words.append(f"{name}={_store_path(file)}")
    return " ".join(words)


def parse_wanted(data: bytes, place: object, *, modules_release: str = "") -> Wanted:
    """Read boot.json; fields that we do not know are passed over.

    Raises:
        DamagedError: it is no bootspec, or the extension is of another major version or incomplete.
    """
    document = _document(data, place)
    spec = document.get(BOOTSPEC)
    if spec is None:
        raise DamagedError(f"no {BOOTSPEC}", place=place)
    body = document.get(EXTENSION)
    if body is None:
        other = [name for name in document if name.startswith("org.calve.v")]
        if other:
            raise DamagedError(f"{other[0][:40]} is unknown to this image", place=place)
        return Wanted(_bootspec(_Reader(spec, place)), None, modules_release)
    return Wanted(_bootspec(_Reader(spec, place)), _abi(_Reader(body, place)), modules_release)


def parse_abi(data: bytes, place: object) -> Abi:
    """Read the extension's object alone, as an initrd has it.

    Raises:
        DamagedError: it is not one.
    """
    return _abi(_Reader(_document(data, place), place))


def _document(data: bytes, place: object) -> dict[str, Any]:
    if len(data) > LIMIT_BYTES:
        raise DamagedError(f"more than {LIMIT_BYTES} bytes", place=place)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"no JSON: {error}", place=place) from error
    if not isinstance(document, dict):
        raise DamagedError("no JSON object", place=place)
    return document


def _bootspec(read: _Reader) -> Bootspec:
    return Bootspec(
        kernel=read.file("kernel"),
        initrd=read.file("initrd") if read.body.get("initrd") is not None else None,
        params=read.words("kernelParams"),
        init=read.text("init"),
        toplevel=read.text("toplevel"),
        label=read.text("label", ""),
    )


def _abi(read: _Reader) -> Abi:
    return Abi(
        agent=read.text("agent"),
        initrd_abi=read.number("initrdAbi"),
        kernel_release=read.text("kernelRelease"),
        nixos_init=read.flag("nixosInit"),
        etc_overlay=read.flag("etcOverlay"),
        etc_mutable=read.flag("etcMutable"),
        health_units=read.words("healthUnits"),
    )


class _Reader:
    """Fields of one JSON object; each is bounded and of its kind, or DamagedError names it."""

    def __init__(self, body: object, place: object) -> None:
        if not isinstance(body, dict):
            raise DamagedError("no JSON object", place=place)
        self.body: dict[str, Any] = body
        self._place = place

    def _wrong(self, name: str, wanted: str) -> DamagedError:
        return DamagedError(f"{name} must be {wanted}", place=self._place)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.body.get(name, default)
        if not isinstance(value, str) or len(value) > _TEXT or not value.isprintable():
            raise self._wrong(name, "a text")
        return value

    def file(self, name: str) -> str:
        value = self.text(name)
        if _store_path(value) is None or ".." in value.split("/"):
            raise self._wrong(name, "a file in a store path")
        return value

    def number(self, name: str) -> int:
        value = self.body.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self._wrong(name, "a number")
        return value

    def flag(self, name: str) -> bool:
        value = self.body.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def words(self, name: str) -> tuple[str, ...]:
        value = self.body.get(name, [])
        if not isinstance(value, list) or len(value) > _WORDS:
            raise self._wrong(name, "a list of texts")
        for word in value:
            if not isinstance(word, str) or len(word) > _TEXT or not word.isprintable():
                raise self._wrong(name, "a list of texts")
        return tuple(value)


def _store_path(file: str) -> StorePath | None:
    """Return the store path that a file is in; None where it is in none."""
    if not file.startswith(f"{STORE_DIR}/"):
        return None
    try:
        return StorePath.from_basename(file[len(STORE_DIR) + 1 :].split("/", 1)[0])
    except DamagedError:
        return None


def _split(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value


def _is_carried(word: str) -> bool:
    name = _split(word)[0]
    return name in _CARRIED or (name.startswith("calve.") and name not in _OURS)


def _foreign(running: Running, wanted: Wanted) -> Refuse:
    return Refuse(
        Code.KERNEL_FOREIGN,
        f"{_differs(running, wanted)}, and the closure has no initrd with the agent",
    )


def _differs(running: Running, wanted: Wanted) -> str:
    """Say what is not as the closure wants it."""
    if wanted.release and wanted.release != running.release:
        return f"the closure's kernel is {wanted.release}, {running.release} runs"
    kernel = None if wanted.bootspec is None else _store_path(wanted.bootspec.kernel)
    if running.kernel is not None and kernel is not None and kernel != running.kernel:
        return f"the closure's kernel is {kernel.name} of another build than what runs"
    ours = running.abi.contract
    theirs = ours if wanted.abi is None else wanted.abi.contract
    return f"the closure expects contract {list(theirs)} of its initrd, this one has {list(ours)}"
