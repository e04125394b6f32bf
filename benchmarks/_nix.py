"""The peers: Debian's Nix on this machine, and a newer one out of a Debian unstable below .calve/bench.

The newer one is not run in a chroot but by its own dynamic linker, so that it sees this machine's directories.
Where it cannot be had that is said, and it is not a peer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks._closure import HOME

_SUITE = "unstable"
# debootstrap does not find who provides what nix-bin needs of perl.
_PACKAGES = "nix-bin,libdbi-perl"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LEAST = (2, 34)


@dataclass(frozen=True)
class Nix:
    """A Nix that runs here; `root` is that of another Debian, None for this one."""

    version: str
    root: Path | None = None

    def argv(self, program: str, *arguments: str) -> list[str]:
        """Return the command of one of its programs."""
        if self.root is None:
            return [program, *arguments]
        linker = self.root / "lib64/ld-linux-x86-64.so.2"
        libraries = str(self.root / _LIBRARIES)
        binary = str(self.root / "usr/bin/nix")
        return [str(linker), "--library-path", libraries, "--argv0", program, binary, *arguments]

    @property
    def name(self) -> str:
        return f"Nix {self.version}"

    def files(self) -> tuple[Path, Path, list[Path]]:
        """Return its program, its dynamic linker, and the shared objects that the linker loads for it."""
        root = Path("/") if self.root is None else self.root
        program, linker = root / "usr/bin/nix", root / "lib64/ld-linux-x86-64.so.2"
        argv = [str(linker), "--library-path", str(root / _LIBRARIES), "--list", str(program)]
        said = subprocess.run(argv, capture_output=True, text=True, check=True)
        libraries = re.findall(r"=> (/\S+) \(0x", said.stdout)
        return program, linker, [Path(library) for library in libraries]

    def _common(self, key: str) -> list[str]:
        options = {"trusted-public-keys": key, "build-users-group": "", "max-jobs": "0"}
        return [word for name, value in options.items() for word in ("--option", name, value)]

    def copy(self, source: str, target: str, top: str, key: str) -> list[str]:
        return self.argv(
            "nix",
            *("--extra-experimental-features", "nix-command", "copy"),
            *("--from", source, "--to", target),
            *self._common(key),
            top,
        )

    def substitute(self, source: str, root: Path, top: str, key: str, **options: int) -> list[str]:
        tuned = [
            word
            for name, value in options.items()
            for word in ("--option", name.replace("_", "-"), str(value))
        ]
        return self.argv(
            "nix-store",
            *("--store", f"local?root={root}", "--option", "substituters", source),
            *self._common(key),
            *tuned,
            *("-r", top),
        )


def environment(home: Path) -> dict[str, str]:
    """Return an environment for Nix without a daemon, a configuration, or a memory of caches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIX_")}
    return kept | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "NIX_REMOTE": "",
        "NIX_CONF_DIR": "/nonexistent",
        "NIX_USER_CONF_FILES": "",
    }


def _version(nix: Nix) -> str | None:
    env: Mapping[str, str] = environment(Path("/nonexistent"))
    try:
        said = subprocess.run(
            nix.argv("nix-store", "--version"), capture_output=True, text=True, check=True, env=env
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"[0-9]+\.[0-9]+(\.[0-9]+)*", said.stdout)
    return found[0] if found else None


def _mirror() -> str | None:
    """Return where this machine's apt has Debian from."""
    said = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(CREATED_BY)|$(REPO_URI)"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in said.stdout.splitlines():
        origin, label, kind, uri = line.split("|", 3)
        if (origin, label, kind) == ("Debian", "Debian", "Packages"):
            return uri
    return None


def _install(root: Path) -> str:
    """Install unstable's Nix; return why not, where it fails."""
    mirror = _mirror()
    program = shutil.which("debootstrap", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if os.geteuid() != 0 or program is None or mirror is None:
        return "debootstrap, a Debian mirror in apt's configuration, and root are needed"
    print("  Nix of Debian unstable is installed once", file=sys.stderr)
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    argv = [program, "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(part), mirror]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"debootstrap failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    part.rename(root)
    return ""


def peers() -> tuple[list[Nix], list[str]]:
    """Return the Nixes that run here, the newest first, and notes of versions and of what is lacking."""
    found: list[Nix] = []
    notes: list[str] = []
    root = HOME.absolute() / _SUITE
    why = "" if root.exists() else _install(root)
    for place, what in ((root, f"Nix of Debian {_SUITE}"), (None, "Nix of this machine")):
        version = None if why and place else _version(Nix("", place))
        if version is None:
            notes.append(f"SKIPPED {what}: {why or 'it does not run'}")
            continue
        found.append(Nix(version, place))
        notes.append(f"{what}: {version}")
    if not found or tuple(map(int, found[0].version.split(".")[:2])) < _LEAST:
        notes.append("there is no Nix of 2.34 or later: the required figures are not comparable")
    return found, notes


def main() -> None:
    for note in peers()[1]:
        print(note)


if __name__ == "__main__":
    main()
