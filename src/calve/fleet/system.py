"""The system of a fleet: from what the fleet file says to a store path, by a build where one is needed.

`system` is a store path, a link to one (./result), a Nix file, or a flake attribute. A NixOS configuration stands for
its toplevel, as for nixos-rebuild. It knows `nix build`, and its sentences as far as they are worth a count.
Source: https://nix.dev/manual/nix/latest/command-ref/new-cli/nix3-build
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from calve import process
from calve.errors import CalveError, CancelledError, DamagedError, NotFoundError, UsageError
from calve.nix.links import follow
from calve.nix.storepath import STORE_DIR, StorePath
from calve.progress import Note, Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["Installable", "Source", "attribute", "build", "parse"]

_MAX_LINE_BYTES = 64 * 1024
_MAX_ANSWER_BYTES = 1 << 20
_TAIL_LINES = 20
_FEATURES = "nix-command flakes"
_TOPLEVEL = ".config.system.build.toplevel"
_NIXOS = re.compile(r"[^#]*#(?:nixosConfigurations\.)(?:[^.\"]+|\"[^\"]+\")")
_FLAKE = re.compile(r"(?:flake|git|github|gitlab|sourcehut|path|tarball|file|https?)(?:\+[a-z]+)?:")
_COUNTED = ((re.compile(r"building '"), "build"), (re.compile(r"copying path '"), "fetch"))


@dataclass(frozen=True, slots=True)
class Installable:
    """What Nix is to build: an attribute of a flake, or with `is_file` the value of a Nix file."""

    text: str
    is_file: bool = False


Source = StorePath | Installable


def attribute(system: str) -> str:
    """Return the attribute of a flake that is built: of a NixOS configuration its toplevel."""
    return system + (_TOPLEVEL if _NIXOS.fullmatch(system) else "")


def parse(system: str, base: Path, root: Path = Path("/")) -> Source:
    """Say what a system's text means; only links are looked at.

    Args:
        system: as the fleet file or the command line has it.
        base: what relative paths are meant from: the directory of calve.toml, or the current one.
        root: the store is `<root>/nix/store`.

    Raises:
        UsageError: it is nothing that leads to a system.
    """
    if "#" in system or _FLAKE.match(system):
        return Installable(attribute(system))
    path = base / system
    with contextlib.suppress(DamagedError):
        found = follow(str(path), root)
        if found is not None:
            return found
    if path.suffix == ".nix" and path.is_file():
        return Installable(str(path), is_file=True)
    if (path / "flake.nix").is_file():
        return Installable(system)
    raise UsageError(
        "this is neither a store path, nor a link to one, nor what Nix could build",
        place=system,
        hint=f"give a path in {STORE_DIR}, ./result, or an attribute such as .#nixosConfigurations.web",
    )


def build(
    system: str,
    base: Path,
    *,
    store: Path | None = None,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> StorePath:
    """Return a system's store path; a flake attribute or a Nix file is built first.

    Args:
        system: see `parse`.
        base: likewise; Nix runs there.
        store: the store is `<store>/nix/store`; None is the machine's own.
        progress: is told what is built and fetched, and Nix's warnings.
        cancel: ends the build.

    Raises:
        UsageError: the text leads to no system.
        NotFoundError: Nix is not installed.
        CalveError: the build failed; the message has the end of what Nix said.
    """
    source = parse(system, base, store or Path("/"))
    if isinstance(source, StorePath):
        return source
    try:
        nix = process.which("nix", package="nix-bin")
    except NotFoundError as error:
        raise NotFoundError(
            "Nix is not installed, and this system has to be built",
            place=system,
            hint="install Nix, or name a store path or a link to one such as ./result",
        ) from error
    argv = [nix, "--extra-experimental-features", _FEATURES, "build", "--no-link", "--json", "-v"]
    if store is not None:
        argv += ["--store", f"local?root={store.absolute()}"]
    argv += ["--file", source.text] if source.is_file else [source.text]
    return _output(_run(argv, base, progress, cancel), system)


def _run(argv: list[str], base: Path, progress: Progress, cancel: Cancel | None) -> bytes:
    """Run Nix; return what it prints while its sentences go to `progress`."""
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with tempfile.TemporaryFile() as answer, _started(argv, base, answer) as (child, log):
        unhook = cancel.on_cancel(lambda: _end(child)) if cancel is not None else lambda: None
        try:
            for line in _told(log, progress):
                tail.append(line)
            status = child.wait()
        finally:
            unhook()
        if cancel is not None and cancel.cancelled:
            raise CancelledError
        if status != 0:
            said = "\n".join(tail)
            raise CalveError(f"nix build failed with {status}: {said}", place=argv[-1])
        answer.seek(0)
        return answer.read(_MAX_ANSWER_BYTES)


def _end(child: process.Process) -> None:
    """End Nix and what it started: as long as one of them lives, there may be more to read."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    child.stop()


@contextlib.contextmanager
def _started(
    argv: list[str], base: Path, answer: IO[bytes]
) -> Iterator[tuple[process.Process, IO[bytes]]]:
    """Start a command; its output goes to `answer`, and what it says can be read."""
    read, write = os.pipe()
    with open(read, "rb") as log:  # noqa: PTH123
        try:
            child = process.Process(argv, stdout=answer, stderr=write, cwd=base)
        finally:
            os.close(write)
        with child:
            yield child, log


def _told(log: IO[bytes], progress: Progress) -> Iterator[str]:
    """Yield Nix's lines, and tell what they say."""
    counts = {name: 0 for _, name in _COUNTED}
    while data := log.readline(_MAX_LINE_BYTES):
        line = data.decode("utf-8", "replace").rstrip()
        for begins, name in _COUNTED:
            if begins.match(line):
                counts[name] += 1
                unit = "derivations" if name == "build" else "paths"
                progress(Step(name, counts[name], None, unit))
        if line.startswith("warning: "):
            progress(Note(f"nix: {line}"))
        if not line.startswith("evaluating file"):
            yield line


def _output(answer: bytes, system: str) -> StorePath:
    """Read `[{"drvPath": …, "outputs": {"out": PATH}}]`."""
    try:
        built = json.loads(answer)
        outputs = [path for one in built for name, path in one["outputs"].items() if name == "out"]
        (path,) = outputs
        return StorePath.parse(path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CalveError(
            "what Nix built is not one path with the output `out`",
            place=system,
            hint="name the attribute of one system",
        ) from error
