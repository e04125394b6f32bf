"""What Calve pushes, Nix accepts with signature checks on; what Nix pushes, Calve pulls; both refuse the same."""

from __future__ import annotations

import functools
import http.server
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calve.cache.directory import DirectoryObjects
from calve.cache.objects import open_objects
from calve.cache.pull import Pulled, plan, pull
from calve.cache.push import push
from calve.errors import CalveError, DamagedError, SignatureError
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, PublicKey, SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.transport.http import Client

# Input-addressed, with references between them and to itself: Nix accepts content-addressed paths unsigned.
BUILT = """
let
  path = name: text: derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo '${text}' > $out" ]; };
  lib = path "lib" "lib";
  tool = derivation { name = "tool"; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo ${lib} $out > $out" ]; };
in path "top" "top ${lib} ${tool}"
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Serve the directory `cache` as any web server would; give its URL."""
    (tmp_path / "cache").mkdir(exist_ok=True)
    handler = functools.partial(_Quiet, directory=str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def top(nix: Any) -> StorePath:
    (path,) = nix.lines("nix-build", "--no-out-link", "-E", BUILT)
    return StorePath.parse(path)


@pytest.fixture
def key() -> SecretKey:
    return SecretKey.generate("calve-test-1")


@pytest.fixture
def cache(tmp_path: Path) -> DirectoryObjects:
    return DirectoryObjects(tmp_path / "cache")


@pytest.fixture
def pushed(nix: Any, top: StorePath, key: SecretKey, cache: DirectoryObjects) -> str:
    with LocalStore(nix.root) as store:
        return push(store, [top], cache, key).manifests[top]


def other_nix(nix: Any, tmp_path: Path, name: str) -> Any:
    """Return Nix with another store, and a home of its own: it remembers narinfos there."""
    return type(nix)(tmp_path / f"{name}-root", tmp_path / f"{name}-home")


def take(
    nix: Any, how: str, path: StorePath, trusted: PublicKey, directory: Path, served: str
) -> subprocess.CompletedProcess[bytes]:
    """Have Nix take a path's closure, with signature checks on."""
    store = ["--store", f"local?root={nix.root}"]
    options = [
        "--option",
        "trusted-public-keys",
        trusted.dump(),
        "--option",
        "require-sigs",
        "true",
    ]
    if how == "copy":
        command = ["nix", "copy", *store, *options, "--from", f"file://{directory}", str(path)]
    else:
        substituters = ["--option", "substituters", served]
        command = ["nix-store", *store, *options, *substituters, "--realise", str(path)]
    return subprocess.run(command, capture_output=True, env=nix.env, cwd=nix.home)


def contents(nix: Any, top: StorePath) -> dict[str, bytes]:
    paths = nix.lines("nix-store", "-qR", str(top))
    assert len(paths) == 3
    return {path: nix.real(path).read_bytes() for path in paths}


@pytest.mark.parametrize("how", ["copy", "realise"])
def test_nix_accepts_what_we_push(
    nix: Any, top: StorePath, key: SecretKey, pushed: str, tmp_path: Path, served: str, how: str
) -> None:
    there = other_nix(nix, tmp_path, "there")
    done = take(there, how, top, key.public, tmp_path / "cache", served)
    assert done.returncode == 0, done.stderr.decode()
    assert contents(there, top) == contents(nix, top)
    there.run("nix-store", "--verify", "--check-contents")


@pytest.mark.parametrize("how", ["copy", "realise"])
def test_nix_needs_no_file_hash(
    nix: Any,
    top: StorePath,
    key: SecretKey,
    pushed: str,
    cache: DirectoryObjects,
    tmp_path: Path,
    served: str,
    how: str,
) -> None:
    """A narinfo for a NAR that another push compressed has its size, but not its hash."""
    for name in [one.key for one in cache.list("")]:
        if not name.startswith("nar/"):
            cache.delete(name)
    with LocalStore(nix.root) as store:
        done = push(store, [top], cache, key)
    assert (done.new_paths, done.compressed_bytes) == (3, 0)
    entry = NarInfo.parse(cache.get(f"{top.digest}.narinfo", 65536))
    assert (entry.file_hash, entry.file_size) == (None, cache.head(entry.url))
    there = other_nix(nix, tmp_path, "there")
    taken = take(there, how, top, key.public, tmp_path / "cache", served)
    assert taken.returncode == 0, taken.stderr.decode()
    assert contents(there, top) == contents(nix, top)


def test_nix_adds_to_a_cache_of_ours_and_we_to_one_of_nix(
    nix: Any, top: StorePath, key: SecretKey, pushed: str, cache: DirectoryObjects, tmp_path: Path
) -> None:
    before = {one.key: cache.get(one.key, 1 << 20) for one in cache.list("")}
    nix.run("nix", "copy", "--to", cache.url, str(top))
    assert {one.key: cache.get(one.key, 1 << 20) for one in cache.list("")} == before

    of_nix = DirectoryObjects(tmp_path / "of-nix")
    nix.run("nix", "copy", "--to", f"{of_nix.url}?compression=xz", str(top))
    nars = {one.key for one in of_nix.list("nar/")}
    with LocalStore(nix.root) as store:
        done = push(store, [top], of_nix, key)
    assert done.new_paths == 0
    assert {one.key for one in of_nix.list("nar/")} == nars  # only signatures were added
    there = other_nix(nix, tmp_path, "there")
    taken = take(there, "copy", top, key.public, tmp_path / "of-nix", "")
    assert taken.returncode == 0, taken.stderr.decode()


def ours(
    url: str, top: StorePath, trusted: PublicKey, root: Path, manifest: str | None = None
) -> Pulled:
    with Client() as client, LocalStore(root, create=True) as sink:
        made = plan(
            [open_objects(url, client)], [top], sink, Keyring((trusted,)), manifest=manifest
        )
        return pull(made, sink)


@pytest.mark.parametrize("compression", ["zstd", "xz", "none", "bzip2"])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_we_pull_what_nix_pushes(
    nix: Any, top: StorePath, tmp_path: Path, served: str, compression: str, scheme: str
) -> None:
    secret, public = nix.home / "secret", nix.home / "public"
    nix.run("nix-store", "--generate-binary-cache-key", "nix-1", secret, public, store=False)
    target = f"file://{tmp_path}/cache?compression={compression}&secret-key={secret}"
    nix.run("nix", "copy", "--to", target, str(top))
    url = target if scheme == "file" else served
    done = ours(url, top, PublicKey.parse(public.read_text()), tmp_path / "there-root")
    assert done.paths == 3
    there = other_nix(nix, tmp_path, "there")
    assert contents(there, top) == contents(nix, top)
    there.run("nix-store", "--verify", "--check-contents")
    for path in contents(nix, top):
        for question in ("--references", "--hash", "--size"):
            assert there.lines("nix-store", "-q", question, path) == nix.lines(
                "nix-store", "-q", question, path
            )


@pytest.mark.parametrize("by_manifest", [True, False])
def test_we_pull_what_we_push(
    nix: Any,
    top: StorePath,
    key: SecretKey,
    pushed: str,
    tmp_path: Path,
    served: str,
    by_manifest: bool,
) -> None:
    manifest = pushed if by_manifest else None
    done = ours(served, top, key.public, tmp_path / "there-root", manifest)
    assert (done.paths, done.retries) == (3, 0)
    there = other_nix(nix, tmp_path, "there")
    assert contents(there, top) == contents(nix, top)
    there.run("nix-store", "--verify", "--check-contents")


# Refused by both


def unsigned(entry: NarInfo, _others: dict[str, NarInfo], _key: SecretKey) -> NarInfo:
    return replace(entry, info=replace(entry.info, signatures=()))


def wrong_key(entry: NarInfo, _others: dict[str, NarInfo], key: SecretKey) -> NarInfo:
    bare = replace(entry.info, signatures=())
    return replace(entry, info=bare.signed(SecretKey.generate(key.name)))


def of_another_path(entry: NarInfo, others: dict[str, NarInfo], _key: SecretKey) -> NarInfo:
    other = next(one for one in others.values() if one.info.path != entry.info.path)
    return replace(entry, info=replace(entry.info, signatures=other.info.signatures))


def another_nar(entry: NarInfo, others: dict[str, NarInfo], _key: SecretKey) -> NarInfo:
    other = next(one for one in others.values() if one.info.nar_hash != entry.info.nar_hash)
    return replace(entry, url=other.url)


def the_narinfo_of_another(entry: NarInfo, others: dict[str, NarInfo], _key: SecretKey) -> NarInfo:
    return next(one for one in others.values() if one.info.path != entry.info.path)


@pytest.mark.parametrize(
    ("alter", "error"),
    [
        (unsigned, SignatureError),
        (wrong_key, SignatureError),
        (of_another_path, SignatureError),
        (another_nar, DamagedError),
        (the_narinfo_of_another, DamagedError),
    ],
)
@pytest.mark.parametrize("victim", ["lib", "top"])
def test_both_refuse(
    nix: Any,
    top: StorePath,
    key: SecretKey,
    pushed: str,
    cache: DirectoryObjects,
    tmp_path: Path,
    served: str,
    alter: Any,
    error: type[CalveError],
    victim: str,
) -> None:
    entries = {
        name: NarInfo.parse(cache.get(name, 65536))
        for name in [one.key for one in cache.list("")]
        if name.endswith(".narinfo")
    }
    name, entry = next(pair for pair in entries.items() if pair[1].info.path.name == victim)
    cache.put(name, alter(entry, entries, key).dump())
    for how in ("copy", "realise"):
        there = other_nix(nix, tmp_path, f"there-{how}")
        taken = take(there, how, top, key.public, tmp_path / "cache", served)
        assert taken.returncode != 0, how
        assert str(entry.info.path) not in there.lines("nix-store", "--dump-db")
    for url in (cache.url, served):
        with pytest.raises(error):
            ours(url, top, key.public, tmp_path / "ours-root")
    with LocalStore(tmp_path / "ours-root") as sink:
        assert sink.missing([entry.info.path, top]) == [entry.info.path, top]
    left = [path.name for path in (tmp_path / "ours-root/nix/store").iterdir()]
    assert [one for one in left if one.startswith(".calve")] == []


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_both_refuse_a_damaged_nar(
    nix: Any,
    top: StorePath,
    key: SecretKey,
    pushed: str,
    cache: DirectoryObjects,
    tmp_path: Path,
    served: str,
    damage: str,
) -> None:
    entry = NarInfo.parse(cache.get(f"{top.digest}.narinfo", 65536))
    data = cache.get(entry.url, 1 << 20)
    at = len(data) // 2
    bad = data[:at] if damage == "truncated" else data[:at] + b"\x00\xff" + data[at + 2 :]
    cache.put(entry.url, bad)
    for how in ("copy", "realise"):
        there = other_nix(nix, tmp_path, f"there-{how}")
        taken = take(there, how, top, key.public, tmp_path / "cache", served)
        assert taken.returncode != 0, how
    for manifest in (pushed, None):
        with pytest.raises(DamagedError, match=top.basename):
            ours(served, top, key.public, tmp_path / "ours-root", manifest)
        with LocalStore(tmp_path / "ours-root") as sink:
            assert sink.missing([top]) == [top]
    cache.put(entry.url, data)
    ours(served, top, key.public, tmp_path / "ours-root", pushed)
    assert contents(other_nix(nix, tmp_path, "ours"), top) == contents(nix, top)
