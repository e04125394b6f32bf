"""The peer: a machine whose disk has a system that reaches multi-user.target, and Nix, which then pulls the closure.

The texts that matter stand in benchmarks/data/amazon_init. The system is the web server's own files in two store
paths of another name, so that nothing of the closure is there beforehand, as on our machine's empty disk. The initrd
is ours, with a script in the agent's place that does nothing: the network is up before stage 2, which spares the
peer its wait for network-online.target.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks._nix import Nix
from calve.boot.policy import Policy
from calve.demo.imports import SELF, Importer, temporary
from calve.demo.system import render
from calve.demo.workshop import Workshop
from calve.disk import ext4, initrd, payload
from calve.nix.store import LocalStore
from calve.nix.storepath import STORE_DIR, StorePath
from calve.process import which

DEFAULTS: Mapping[str, str] = {}
TUNED: Mapping[str, str] = {
    "http-connections": "50",
    "max-substitution-jobs": "32",
    "fsync-metadata": "false",
}
"""nix.conf(5): more at once, and no flush of the database at each path."""

_TEXTS = Path(__file__).parent / "data/amazon_init"
_NAME = "nixos-system-base-0"
_WRAPPER = """#!/bin/sh
exec {nix}/lib/{linker} --library-path {nix}/lib --argv0 {program} {nix}/bin/nix "$@"
"""


def user_data(system: StorePath, cache: str, key: str, options: Mapping[str, str]) -> bytes:
    """Return the script that the machine runs."""
    text = (_TEXTS / "user-data").read_text()
    values = {
        "system": str(system),
        "cache": cache,
        "key": key,
        "options": "\n".join(f"{name} = {value}" for name, value in options.items()),
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text.encode()


def bare_initrd(workshop: Workshop, out: Path) -> Path:
    """Write our initrd with nothing in the agent's place."""
    script = out.with_suffix(".sh")
    script.write_text("#!/bin/busybox sh\nexit 0\n")
    nothing = payload.Payload("0", script, (), ())
    busybox = Path(which("busybox", package="busybox-static"))
    spec = initrd.Initrd(busybox, workshop.kernel().modules, nothing, Policy(keys=()).dump())
    initrd.write(spec, out, level=9)
    return out


def make_disk(store: LocalStore, system: StorePath, nix: Nix, work: Path, size_bytes: int) -> Path:
    """Make the root disk.

    Args:
        store: has the web server.
        system: its toplevel.
        nix: what the disk gets.
        work: a directory for what is made.
        size_bytes: of the file system.
    """
    root = work / "base"
    with LocalStore(root, create=True) as base:
        importer = Importer(base)
        top = _add_top(importer, store, system, _add_nix(importer, nix))
        importer.flush()
    profiles = root / "nix/var/nix/profiles"
    profiles.mkdir(parents=True, exist_ok=True)
    (profiles / "system-1-link").symlink_to(str(top))
    (profiles / "system").symlink_to("system-1-link")
    disk = work / "base.raw"
    ext4.make(disk, size_bytes, tree=root)
    return disk


def _add_nix(importer: Importer, nix: Nix) -> tuple[StorePath, str]:
    """Add Nix with its dynamic linker and its libraries; return the path and the linker's name."""
    program, linker, libraries = nix.files()
    with temporary(importer.store) as work:
        for name, files in (("bin", [program]), ("lib", [linker, *libraries])):
            (work / "tree" / name).mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, work / "tree" / name / file.name)
                (work / "tree" / name / file.name).chmod(0o755)
        return importer.add(work / "tree", f"nix-{nix.version}"), linker.name


def _add_top(
    importer: Importer, store: LocalStore, system: StorePath, nix: tuple[StorePath, str]
) -> StorePath:
    with temporary(importer.store) as work:
        tree = work / "sw"
        _flatten(store, store.real(system) / "sw", tree)
        for name in ("nix-store", "nix-env"):
            _write(
                tree / "usr/bin" / name, _WRAPPER.format(nix=nix[0], linker=nix[1], program=name)
            )
        software = importer.add(tree, "base-system-path", [nix[0]])
    with temporary(importer.store) as work:
        tree = work / "etc"
        _flatten(store, store.real(system) / "etc", tree)
        units = tree / "systemd/system"
        (units / "multi-user.target.wants/nginx.service").unlink()
        shutil.copyfile(_TEXTS / "amazon-init.service", units / "amazon-init.service")
        (units / "multi-user.target.wants/amazon-init.service").symlink_to("../amazon-init.service")
        _write(tree / "amazon-init", (_TEXTS / "amazon-init").read_text())
        etc = importer.add(tree, "base-etc")
    with temporary(importer.store) as work:
        tree = work / "top"
        tree.mkdir()
        (tree / "sw").symlink_to(str(software))
        (tree / "etc").symlink_to(str(etc))
        top = f"{STORE_DIR}/{SELF}-{_NAME}"
        init = render("webserver/init.sh", busybox=software, system=top, label="base")
        _write(tree / "init", init)
        return importer.add(tree, _NAME, [software, etc], self_reference=True)


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def _flatten(store: LocalStore, source: Path, into: Path) -> None:
    """Copy a farm of links, each link into the store as what it leads to."""
    into.mkdir()
    for entry in sorted(os.scandir(_follow(store, source)), key=lambda entry: entry.name):
        place, target = Path(entry.path), into / entry.name
        if entry.name.partition("-")[0] == "calve":
            continue  # a stock image has nothing of ours
        if entry.is_dir(follow_symlinks=False):
            _flatten(store, place, target)
        elif entry.is_symlink() and not os.readlink(place).startswith(f"{STORE_DIR}/"):
            target.symlink_to(os.readlink(place))
        else:
            shutil.copy(_follow(store, place), target)


def _follow(store: LocalStore, place: Path) -> Path:
    """Return where a link into the store leads on this machine; what is no link stays as it is."""
    while place.is_symlink() and (target := os.readlink(place)).startswith(f"{STORE_DIR}/"):
        place = store.root / target.lstrip("/")
    return place
