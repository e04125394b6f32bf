"""Real Nix: its commands, with a store of their own below a temporary directory."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

CONFIG = """
build-users-group =
sandbox = false
substituters =
experimental-features = nix-command
"""


class Nix:
    """Nix with the store `root`/nix/store, without daemon, substituters or anybody's configuration."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        shell = shutil.which("busybox")
        config = CONFIG + (f"sandbox-paths = /bin/sh={shell}\n" if shell else "")
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "NIX_CONFIG": config,
            "NIX_CONF_DIR": str(home / "conf"),
        }

    def run(self, *args: str | Path, stdin: bytes = b"", store: bool = True) -> bytes:
        """Run a command of Nix on the store; return its output, fail with its errors.

        Commands that need no store (`store=False`) get it too: some of them open one, and it must not be /nix.
        """
        done = subprocess.run(
            args,
            input=stdin,
            capture_output=True,
            env={**self.env, "NIX_REMOTE": f"local?root={self.root}"},
            cwd=self.home,
        )
        assert done.returncode == 0, (args[:4], done.stderr.decode("utf-8", "replace")[-4000:])
        return done.stdout

    def lines(self, *args: str | Path, stdin: bytes = b"", store: bool = True) -> list[str]:
        return self.run(*args, stdin=stdin, store=store).decode().splitlines()

    def real(self, path: str) -> Path:
        """Return where a store path lies."""
        return self.root / path.lstrip("/")


@pytest.fixture(scope="session")
def nix_installed() -> None:
    if shutil.which("nix-store") is None:
        pytest.skip("Nix is not installed")


@pytest.fixture
def nix(nix_installed: None, tmp_path: Path) -> Nix:
    """Nix with an empty store in the test's directory."""
    return Nix(tmp_path / "nix-root", tmp_path / "nix-home")


LETTERS = [
    b"a",
    b"B",
    b"b",
    b"-",
    b".",
    b" ",
    b"\xff",
    b"\xc3\xa9",
    b"\xe9",
    b"~",
    b"\n",
    b"0",
    b"\x01",
]


def _name(rng: random.Random) -> bytes:
    name = b"".join(rng.choices(LETTERS, k=rng.randint(1, 12)))
    return name if name not in {b".", b".."} else b"dot"


def make_node(path: Path, rng: random.Random, depth: int = 0) -> None:
    kind = rng.choice(["file", "file", "file", "symlink", "directory", "directory", "directory"])
    if depth == 0 and rng.random() < 0.8:
        kind = "directory"
    if kind == "directory" and depth < 6:
        path.mkdir()
        for name in sorted({_name(rng) for _ in range(rng.choice([0, 1, 2, 5, 9]))}):
            make_node(path / os.fsdecode(name), rng, depth + 1)
    elif kind == "symlink":
        path.symlink_to(os.fsdecode(_name(rng) * rng.choice([1, 1, 30])))
    else:
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 4096, 65536, 131075])))
        path.chmod(rng.choice([0o644, 0o755, 0o444, 0o555, 0o745, 0o655]))


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """220 trees: every kind of node, names that are not UTF-8, sizes around the borders of padding and buffers."""
    base = tmp_path_factory.mktemp("trees")
    made = []
    for seed in range(220):
        path = base / f"t{seed}"
        make_node(path, random.Random(seed))
        made.append(path)
    return made
