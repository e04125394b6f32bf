"""A toplevel: what a machine boots, laid out as NixOS lays it out.

`init` is stage 2's first program; `kernel`, `initrd`, `kernel-params` and `boot.json` are what a boot loader or kexec
needs; `etc`, `sw` and `www` are what the running machine is made of; `nixos-version` names it. All of it in one store
path that refers to itself (boot.json names its own `init`), so two releases differ in what differs, and here.
Source: NixOS, system/activation/top-level.nix; bootspec, RFC 125.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from calve.contract.abi import EXTENSION
from calve.demo.imports import SELF, Importer, temporary
from calve.demo.kernel import Kernel
from calve.disk.payload import Payload
from calve.errors import UsageError
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = [
    "KERNEL_PARAMS",
    "SYSTEM",
    "Boot",
    "Flaw",
    "System",
    "add_toplevel",
    "render",
    "table",
    "text",
]

SYSTEM = "x86_64-linux"
KERNEL_PARAMS = ("console=ttyS0,115200n8", "loglevel=4", "panic=30")
"""Where a cloud reads the console; quiet; a machine that panics leaves, after somebody could read why."""

_VARIABLE = re.compile(r"@([a-z_]+)@")


class Flaw(StrEnum):
    """What is wrong with a bad release."""

    NO_INIT = "it cannot boot"
    ERRORS = "it boots, and answers 500"


@dataclass(frozen=True, slots=True)
class Boot:
    """How a system starts.

    Attributes:
        kernel: its image becomes a store path.
        initrd: a file that becomes a store path; None for a system that only an image's own initrd starts.
        params: the kernel's command line, without init=.
        extension: bootspec's `org.calve.v1` (`contract.abi.Abi.dump`), which says that the initrd has the agent;
            None leaves it out.
        stage_2: payload of the agent's part in stage 2; None for a system that does without.
    """

    kernel: Kernel
    initrd: Path | None = None
    params: tuple[str, ...] = KERNEL_PARAMS
    extension: Mapping[str, Any] | None = None
    stage_2: Payload | None = None


@dataclass(frozen=True, slots=True)
class System:
    """What makes up a toplevel.

    Attributes:
        name: of the machine's role ("tiny"); the store path is `nixos-system-<name>-<release>`.
        release: its number.
        links: names in the toplevel and the store paths that they are links to.
        references: what the init script names beyond the links.
        flaw: what is wrong with it.
    """

    name: str
    release: int
    links: Mapping[str, StorePath] = field(default_factory=dict)
    references: tuple[StorePath, ...] = ()
    flaw: Flaw | None = None

    @property
    def label(self) -> str:
        """Return what the release is called, for people."""
        return f"calve demo release {self.release}"

    @property
    def store_name(self) -> str:
        """Return the name of the store path."""
        return f"nixos-system-{self.name}-{self.release}"

    @property
    def toplevel(self) -> str:
        """Return the toplevel's path for texts in it: `SELF` stands for its digest."""
        return f"{STORE_DIR}/{SELF}-{self.store_name}"


def text(name: str) -> str:
    """Return a file of calve/demo/data."""
    return resources.files("calve.demo").joinpath("data", name).read_text(encoding="utf-8")


def table(name: str) -> Iterator[list[str]]:
    """Read a text file of words, without its comments."""
    for line in text(name).splitlines():
        if line and not line.startswith("#"):
            yield line.split()


def render(name: str, **values: object) -> str:
    """Return a file of calve/demo/data with each `@variable@` replaced.

    Raises:
        UsageError: a variable without a value, or the reverse.
    """
    template = text(name)
    used = set(_VARIABLE.findall(template))
    if used != set(values):
        raise UsageError(
            f"variables {', '.join(sorted(used ^ set(values)))} stand on one side only", place=name
        )
    return _VARIABLE.sub(lambda match: str(values[match[1]]), template)


def add_toplevel(importer: Importer, system: System, init: str, boot: Boot) -> StorePath:
    """Add a system's toplevel, its kernel and its initrd; return the toplevel's path.

    Args:
        importer: where to.
        system: what it is made of.
        init: stage 2's script, with its shebang.
        boot: how it starts.
    """
    kernel = importer.add_file(boot.kernel.image, f"linux-{boot.kernel.version}", "vmlinuz")
    files = {"kernel": f"{kernel}/vmlinuz"}
    references = {kernel, *system.references, *system.links.values()}
    if boot.initrd is not None:
        initrd = importer.add_file(boot.initrd, f"initrd-linux-{boot.kernel.version}", "initrd")
        files["initrd"] = f"{initrd}/initrd"
        references.add(initrd)
    with temporary(importer.store) as work:
        tree = work / "tree"
        tree.mkdir()
        for name, target in files.items():
            (tree / name).symlink_to(target)
        for name, path in system.links.items():
            (tree / name).symlink_to(str(path))
        if system.flaw is not Flaw.NO_INIT:
            (tree / "init").write_text(init, encoding="utf-8")
            (tree / "init").chmod(0o755)
        (tree / "kernel-params").write_text(" ".join(boot.params), encoding="utf-8")
        (tree / "nixos-version").write_text(system.label, encoding="utf-8")
        (tree / "system").write_text(SYSTEM, encoding="utf-8")
        document = _bootspec(system, files, boot)
        (tree / "boot.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return importer.add(tree, system.store_name, references, self_reference=True)


def _bootspec(system: System, files: Mapping[str, str], boot: Boot) -> dict[str, dict[str, Any]]:
    """Return boot.json's content; `files` holds the targets of `kernel` and, where there is one, `initrd`."""
    document: dict[str, dict[str, Any]] = {
        "org.nixos.bootspec.v1": {
            "system": SYSTEM,
            "init": f"{system.toplevel}/init",
            **files,
            "kernelParams": list(boot.params),
            "label": system.label,
            "toplevel": system.toplevel,
        },
        "org.nixos.specialisation.v1": {},
    }
    if boot.extension is not None:
        document[EXTENSION] = dict(boot.extension)
    return document
