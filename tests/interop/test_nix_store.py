"""The store's database and registration, shared with Nix."""

from __future__ import annotations

import hashlib
import io
import re
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

from calve.nix import nar, registration
from calve.nix.database import Database
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath, fixed_output

BUILT = """
let dep = derivation { name = "dep"; system = builtins.currentSystem; builder = "/bin/sh";
      args = [ "-c" "echo dep > $out" ]; };
in derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh";
  outputs = [ "out" "dev" ];
  args = [ "-c" "echo hi ${dep} $out $dev > $out; echo dev > $dev" ]; }
"""


def schema(root: Path) -> dict[str, Any]:
    """Describe tables, indexes, triggers and pragmas of a store's database, comments and spaces aside."""
    with closing(sqlite3.connect(root / "nix/var/nix/db/db.sqlite")) as database:
        rows = database.execute("select type, name, tbl_name, sql from sqlite_master").fetchall()
        described = {
            (kind, name, table): re.sub(
                r"\s+", "", re.sub(r"--[^\n]*|if not exists", "", sql or "", flags=re.IGNORECASE)
            ).lower()
            for kind, name, table, sql in rows
        }
        pragmas = {
            name: database.execute(f"pragma {name}").fetchone()
            for name in ("user_version", "journal_mode", "page_size", "encoding", "auto_vacuum")
        }
    return {
        "objects": described,
        "pragmas": pragmas,
        "schema": (root / "nix/var/nix/db/schema").read_bytes(),
    }


def directories(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if (path.is_dir() or path.is_symlink()) and "per-user/" not in str(path)
    }


def info_of(
    path: Path, name: str, references: tuple[StorePath, ...] = ()
) -> tuple[PathInfo, bytes]:
    out = io.BytesIO()
    size = nar.dump(path, out.write)
    digest = Hash("sha256", hashlib.sha256(out.getvalue()).digest())
    where = fixed_output(name, digest, references)
    ca = f"fixed:r:{digest.nix32}"
    return PathInfo(where, digest, size, tuple(sorted(references)), ca=ca), out.getvalue()


def put(store: LocalStore, *paths: tuple[PathInfo, bytes]) -> None:
    for info, data in paths:
        store.stage(info, nar.read(io.BytesIO(data).read, limit=len(data)))
    store.commit([info for info, _ in paths])


def test_schema_is_that_of_nix(nix: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    nix.run("nix-store", "--add", tmp_path / "file")
    with LocalStore(tmp_path / "ours", create=True):
        pass
    assert schema(tmp_path / "ours") == schema(nix.root)
    assert directories(tmp_path / "ours") >= directories(nix.root)


def test_nix_finds_no_fault_in_a_store_of_ours(nix: Any, trees: list[Path], tmp_path: Path) -> None:
    key = SecretKey.generate("k-1")
    with LocalStore(nix.root, create=True) as store:
        first = [info_of(path, path.name) for path in trees[:25]]
        leaves = tuple(info.path for info, _ in first[:4])
        second = [info_of(path, path.name, leaves) for path in trees[25:30]]
        batch = [(info.signed(key), data) for info, data in [*second, *first]]
        assert set(store.missing(info.path for info, _ in batch)) == {
            info.path for info, _ in batch
        }
        put(store, *batch)
        assert store.missing(info.path for info, _ in batch) == []
    nix.run("nix-store", "--verify", "--check-contents")
    for info, _ in batch:
        answer = nix.lines("nix-store", "-q", "--references", str(info.path))
        assert sorted(answer) == [str(path) for path in info.references]
        assert nix.lines("nix-store", "-q", "--hash", str(info.path)) == [info.nar_hash.nix32]
        assert nix.lines("nix-store", "-q", "--size", str(info.path)) == [str(info.nar_size)]
    nix.run(
        "nix",
        "store",
        "verify",
        "--trusted-public-keys",
        key.public.dump(),
        "--all",
        "--sigs-needed",
        "1",
    )
    # Nix goes on with it.
    (added,) = nix.lines("nix-store", "--add", trees[40])
    with LocalStore(nix.root) as store:
        assert store.contains(StorePath.parse(added))
        assert len(store.closure([second[0][0].path])) == 5
    garbage = nix.lines("nix-store", "--gc", "--print-dead")
    assert set(garbage) >= {str(info.path) for info, _ in batch}
    nix.run("nix-store", "--gc")
    with LocalStore(nix.root) as store:
        assert not store.contains(StorePath.parse(added))


def test_we_read_what_nix_wrote(nix: Any) -> None:
    built = nix.lines("nix-build", "--no-out-link", "-E", BUILT)
    (drv,) = nix.lines("nix-instantiate", "-E", BUILT)
    closure = nix.lines("nix-store", "-qR", "--include-outputs", drv)
    dumped = registration.parse(nix.run("nix-store", "--dump-db"))
    by_path = {str(info.path): info for info in dumped}
    assert set(by_path) == set(closure)
    with LocalStore(nix.root) as store:
        for text in closure:
            info = store.path_info(StorePath.parse(text))
            references = nix.lines("nix-store", "-q", "--references", text)
            assert list(map(str, info.references)) == sorted(references)
            deriver = nix.lines("nix-store", "-q", "--deriver", text)
            assert deriver == ["unknown-deriver" if info.deriver is None else str(info.deriver)]
            assert (info.nar_hash, info.nar_size) == (
                by_path[text].nar_hash,
                by_path[text].nar_size,
            )
            assert (info.references, info.deriver) == (
                by_path[text].references,
                by_path[text].deriver,
            )
        ours = [str(info.path) for info in store.closure([StorePath.parse(built[0])])]
    assert sorted(ours) == sorted(nix.lines("nix-store", "-qR", built[0]))
    assert ours[-1] == built[0]


def test_derivations_keep_their_outputs(nix: Any, tmp_path: Path) -> None:
    """A .drv that we register answers Nix's question for its outputs, as the one that Nix registered did."""
    built = nix.lines("nix-build", "--no-out-link", "-E", BUILT)
    (drv,) = nix.lines("nix-instantiate", "-E", BUILT)
    with LocalStore(nix.root) as theirs, LocalStore(tmp_path / "ours", create=True) as ours:
        infos = theirs.closure(
            StorePath.parse(text)
            for text in nix.lines("nix-store", "-qR", "--include-outputs", drv)
        )
        for info in infos:
            out = io.BytesIO()
            nar.dump(theirs.real(info.path), out.write)
            data = out.getvalue()
            ours.stage(info, nar.read(io.BytesIO(data).read, limit=len(data)))
        ours.commit(infos)
    rows = []
    for root in (nix.root, tmp_path / "ours"):
        with closing(sqlite3.connect(root / "nix/var/nix/db/db.sqlite")) as database:
            query = (
                "select ValidPaths.path, DerivationOutputs.id, DerivationOutputs.path"
                " from DerivationOutputs join ValidPaths on drv = ValidPaths.id order by 1, 2"
            )
            rows.append(database.execute(query).fetchall())
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3
    nix.root = tmp_path / "ours"
    nix.run("nix-store", "--verify", "--check-contents")
    outputs = nix.lines("nix-store", "-q", "--outputs", drv)
    assert built[0] in outputs
    assert set(outputs) == {path for owner, _, path in rows[0] if owner == drv}


def test_nix_loads_our_registration(nix: Any, trees: list[Path], tmp_path: Path) -> None:
    """As stage 2 does with what the agent left: the files are there, the database learns of them."""
    leaf, leaf_data = info_of(trees[1], "leaf")
    top, top_data = info_of(trees[2], "top", (leaf.path,))
    other = tmp_path / "elsewhere"
    with LocalStore(other, create=True) as store:
        put(store, (leaf, leaf_data), (top, top_data))
    (nix.root / "nix").mkdir(parents=True)
    (other / "nix/store").rename(nix.root / "nix/store")
    nix.run("nix-store", "--load-db", stdin=b"".join(registration.dump([top, leaf])))
    nix.run("nix-store", "--verify", "--check-contents")
    assert nix.lines("nix-store", "-q", "--references", str(top.path)) == [str(leaf.path)]
    dumped = nix.run("nix-store", "--dump-db")
    ordered = sorted([leaf, top], key=lambda info: info.path)
    assert sorted(registration.parse(dumped), key=lambda info: info.path) == [
        PathInfo(info.path, info.nar_hash, info.nar_size, info.references) for info in ordered
    ]
    assert b"".join(registration.dump(registration.parse(dumped))) == dumped


def test_garbage_is_not_collected_below_a_pull(nix: Any, trees: list[Path]) -> None:
    """Nix's collector waits for the lock that a store holds which was asked what is missing."""
    info, data = info_of(trees[3], "t")
    with LocalStore(nix.root, create=True) as store:
        store.missing([info.path])
        put(store, (info, data))
        collector = subprocess.Popen(
            ["nix-store", "--gc"],
            env={**nix.env, "NIX_REMOTE": f"local?root={nix.root}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with collector:
            assert collector.stderr is not None
            assert b"waiting" in collector.stderr.readline()
            assert store.contains(info.path)
            assert store.real(info.path).exists() or store.real(info.path).is_symlink()
            store.close()
    assert collector.returncode == 0
    with Database(nix.root / "nix/var/nix") as database:
        assert database.valid([info.path]) == set()
