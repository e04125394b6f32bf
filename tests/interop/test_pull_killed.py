"""`kill -9` of a pull, and another one: what was fetched is not fetched again, and Nix finds no fault."""

from __future__ import annotations

import functools
import http.server
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import calve
from calve.cache.directory import DirectoryObjects
from calve.cache.push import push
from calve.demo.imports import Importer
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath

JOBS = 4
PATHS = 40


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self.server.note(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    """Serves a directory and knows which NARs were asked for."""

    def __init__(self, root: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.total = 0
        self.changed = threading.Condition()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(root)))

    def note(self, path: str) -> None:
        with self.changed:
            self.asked[path] += path.startswith("/nar/")
            self.total += path.startswith("/nar/")
            self.changed.notify_all()

    def wait(self, total: int, child: subprocess.Popen[bytes]) -> None:
        """Wait until so many NARs were asked for, or the child has ended."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: self.total >= total or child.poll() is not None, 60
            )

    def handle_error(self, *_: object) -> None:
        """Say nothing: the client is killed."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StorePath, str, SecretKey]:
    """A cache with a closure of which some paths have many files, and some are large."""
    base = tmp_path_factory.mktemp("shop")
    rng = random.Random(3)
    key = SecretKey.generate("test-1")
    with LocalStore(base / "from", create=True) as store:
        importer = Importer(store)
        paths: list[StorePath] = []
        for number in range(PATHS):
            tree = base / f"p{number}"
            tree.mkdir()
            for each in range(rng.choice([1, 3, 30])):
                (tree / f"f{each}").write_bytes(rng.randbytes(rng.choice([10, 5000, 300_000])))
            used = rng.sample(paths, min(len(paths), 3))
            (tree / "uses").write_text("".join(f"{path}\n" for path in used))
            paths.append(importer.add(tree, f"p{number}", used))
        (base / "top").mkdir()
        (base / "top/uses").write_text("".join(f"{path}\n" for path in paths))
        top = importer.add(base / "top", "top", paths)
        importer.flush()
        done = push(store, [top], DirectoryObjects(base / "cache"), key)
    return base / "cache", top, done.manifests[top], key


@pytest.fixture
def server(shop: Any) -> Iterator[_Server]:
    with _Server(shop[0]) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


def test_what_was_fetched_is_not_fetched_again(
    shop: Any, server: _Server, nix: Any, tmp_path: Path
) -> None:
    _, top, manifest, key = shop
    argv = [sys.executable, "-m", "calve", "pull", str(top), "--store", str(nix.root)]
    argv += ["--from", server.url, "--manifest", manifest, "--trusted", key.public.dump()]
    argv += ["--jobs", str(JOBS)]
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(calve.__file__).parents[1]),
        "XDG_STATE_HOME": str(tmp_path),
    }
    rng = random.Random(7)
    kills = 0
    while True:
        with subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL) as child:
            server.wait(min(server.total + rng.randint(2, 16), PATHS - 3), child)
            if server.total >= PATHS - 3:  # nearly all: let it end
                break
            child.kill()
        kills += 1
    assert child.returncode == 0
    assert kills >= 2
    twice = sum(count - 1 for path, count in server.asked.items() if path.startswith("/nar/"))
    assert twice <= kills * JOBS
    nix.run("nix-store", "--verify", "--check-contents")
    assert len(nix.lines("nix-store", "-qR", str(top))) == PATHS + 1
    assert not list((nix.root / "nix/store").glob(".calve*"))
