"""`calve cache gc`, `pin` and `ls` as a user runs them, against the region's S3, whose clock goes as the tests want."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import calve
from calve.nix import nar, narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import fixed_output
from calve.region.objects_store import Condition
from calve.region.server import Server

KEY = SecretKey.generate("test-1")
OTHER = SecretKey.generate("test-2")


def add(store, scratch, name, content, references=()):
    """Put a file into a store; return its path."""
    tree = scratch / name
    tree.parent.mkdir(parents=True, exist_ok=True)
    tree.write_bytes(content)
    data = bytearray()
    narwriter.dump(tree, data.extend)
    nar_hash = Hash("sha256", hashlib.sha256(data).digest())
    path = fixed_output(name, nar_hash, references)
    info = PathInfo(path, nar_hash, len(data), tuple(sorted(references)))
    at = 0

    def source(size):
        nonlocal at
        at += size
        return bytes(data[at - size : at])

    store.stage(info, nar.read(source, limit=len(data)))
    store.commit([info])
    return path


class Shop:
    """A store with two versions of a closure that share a path, a key, and how to call calve."""

    def __init__(self, directory: Path, url: str, admin, clock):
        self.directory, self.url, self.clock = directory, url, clock
        self.root = directory / "from"
        with LocalStore(self.root, create=True) as store:
            scratch = directory / "scratch"
            self.lib = add(store, scratch, "lib-1", os.urandom(300_000))
            self.old = add(store, scratch, "web-1", b"old", [self.lib])
            self.new = add(store, scratch, "web-2", b"new", [self.lib])
        self.key = directory / "key.sec"
        self.key.write_text(KEY.dump())
        self.key.chmod(0o600)
        self.env = {**os.environ, "PYTHONPATH": str(Path(calve.__file__).parents[1])}
        self.env |= {"HOME": str(directory), "XDG_STATE_HOME": str(directory / "state")}
        self.env["AWS_ACCESS_KEY_ID"] = admin.access_key
        self.env["AWS_SECRET_ACCESS_KEY"] = admin.secret_key
        for name in ("NO_COLOR", "FORCE_COLOR", "AWS_PROFILE"):
            self.env.pop(name, None)

    def run(self, *args, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "calve", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=120,
            env=self.env,
            cwd=self.directory,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        return done

    def push(self, path):
        done = self.run("push", path, "--store", self.root, "--to", self.url, "--key", self.key)
        return done.stdout.split()[1]

    def cache(self, what, *more, **kwargs):
        return self.run("cache", what, *more, "--cache", self.url, **kwargs)

    def gc(self, *more):
        return json.loads(self.cache("gc", "--json", *more).stdout)

    def pull(self, path, to, **kwargs):
        trusted = ("--trusted", KEY.public.dump())
        where = ("--store", self.directory / to, "--from", self.url)
        return self.run("pull", path, *where, *trusted, **kwargs)

    def later(self, hours=25):
        self.clock.shift += dt.timedelta(hours=hours)


@pytest.fixture
def shop(tmp_path, server, admin, clock):
    clock.shift = dt.timedelta(hours=-50)  # a rehearsal goes by the client's clock
    return Shop(tmp_path, f"s3://nix?region=test-region&endpoint={server.url}", admin, clock)


@pytest.fixture
def server(service, clock):
    """Serve with answers that bear the service's time: a client whose clock differs goes by these."""
    with Server(service.handle, clock=clock) as server:
        yield server


@pytest.fixture
def s3(service):
    return service.bucket("nix")


def keys_of(s3, prefix=""):
    return [one.key for one in s3.listing(prefix, "", "", 1000)[0]]


def remove(s3, key):
    s3.delete(key, Condition())


def test_an_old_version_is_marked_and_then_removed(shop, service, s3):
    old, new = shop.push(shop.old), shop.push(shop.new)
    shop.later()
    before = keys_of(s3)
    first = shop.cache("gc")
    assert "would mark 1 manifest, 1 narinfo, 1 NAR, " in first.stdout
    assert "--no-dry-run" in first.stderr
    assert keys_of(s3) == before
    service.calls.clear()
    marked = shop.gc("--no-dry-run")
    read = [call.key for call in service.calls if call.operation == "GetObject"]
    assert not [key for key in read if key.endswith(".narinfo")], "manifests say it all"
    assert {kind: one["objects"] for kind, one in marked["marked"].items()} == {
        "manifests": 1,
        "narinfos": 1,
        "nars": 1,
    }
    assert marked["removed"] is None
    assert marked["collection"]["state"] == "marked"
    assert set(before) <= set(keys_of(s3))
    assert "can be removed from" in shop.cache("gc").stdout
    shop.later()
    swept = shop.cache("gc")
    assert "removed 1 manifest, 1 narinfo, 1 NAR, " in swept.stdout
    assert f"{shop.old.digest}.narinfo" not in keys_of(s3)
    assert f"manifests/{old}.json.zst" not in keys_of(s3)
    assert f"manifests/{new}.json.zst" in keys_of(s3)
    shop.pull(shop.new, "new")
    shop.pull(shop.old, "old", code=5)
    assert shop.push(shop.old) == old
    shop.pull(shop.old, "old")


def test_what_was_marked_may_come_back(shop, s3):
    old = shop.push(shop.old)
    shop.push(shop.new)
    shop.later()
    shop.gc("--no-dry-run")
    assert shop.push(shop.old)
    shop.later()
    shop.gc()
    shop.pull(shop.old, "old")
    found = json.loads(shop.cache("ls", "--json").stdout)["roots"]
    assert [(one["owner"], one["name"], one["toplevel"]) for one in found] == [
        ("push", "web", str(shop.old))
    ]
    assert found[0]["manifest"] != old or f"manifests/{old}.json.zst" in keys_of(s3)


def test_a_cache_without_garbage(shop):
    shop.push(shop.new)
    shop.later()
    done = shop.gc("--no-dry-run")
    assert done["marked"]["nars"] == {"objects": 0, "bytes": 0}
    assert done["collection"]["state"] == "done"
    assert done["due"] is None


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("--grace", "59m"), 2, "too short"),
        (("--grace", "1"), 2, "duration"),
        (("--grace", "-1h"), 2, ""),
    ],
)
def test_wrong_arguments(shop, args, code, text):
    shop.push(shop.new)
    assert text in shop.cache("gc", *args, code=code).stderr


def test_where_no_cache_is_nothing_is_made(shop, s3, tmp_path):
    assert "no binary cache" in shop.cache("gc", "--no-dry-run", code=5).stderr
    assert not keys_of(s3)
    place = tmp_path / "nowhere"
    shop.run("cache", "gc", "--no-dry-run", "--cache", f"file://{place}", code=5)
    assert not place.exists()


def test_a_root_that_keeps_nothing_stops_it(shop, s3):
    shop.push(shop.old)
    digest = shop.push(shop.new)
    remove(s3, f"manifests/{digest}.json.zst")
    shop.later()
    before = keys_of(s3)
    done = shop.cache("gc", "--no-dry-run", code=7)
    assert "roots/push/web.json" in done.stderr
    assert "hint: " in done.stderr
    assert set(before) <= set(keys_of(s3))


def test_a_directory_is_collected_too(shop, tmp_path):
    shop.url = f"file://{tmp_path}/cache"
    shop.push(shop.old)
    shop.push(shop.new)
    for file in (tmp_path / "cache").rglob("*"):
        os.utime(file, (1e9, 1e9))
    done = shop.gc("--no-dry-run")
    assert done["marked"]["nars"]["objects"] == 1
    assert done["collection"]["state"] == "marked"
    assert shop.gc()["removed"] is None


# Pins and the list


def test_a_pin_keeps_until_it_is_removed(shop, s3):
    old = shop.push(shop.old)
    shop.push(shop.new)
    told = shop.cache("pin", "last", old, "--dry-run").stdout
    assert told == f"would keep the manifest {old} as last\n"
    assert not keys_of(s3, "roots/pin/")
    assert shop.cache("pin", "last", old).stdout == f"last {old}\n"
    assert "would no longer keep" in shop.cache("pin", "last", "--remove", "--dry-run").stdout
    shop.later()
    assert shop.gc("--no-dry-run")["marked"]["manifests"]["objects"] == 0
    table = shop.cache("ls").stdout.splitlines()
    assert table[0].split()[:4] == ["OWNER", "NAME", "CREATED", "TOPLEVEL"]
    assert [line.split()[:2] for line in table[1:]] == [["pin", "last"], ["push", "web"]]
    assert shop.old.basename in table[1]
    shop.cache("pin", "last", "--remove")
    assert shop.gc()["marked"]["manifests"]["objects"] == 1
    assert shop.cache("pin", "last", "--remove", code=5)
    assert not keys_of(s3, "roots/pin/")


def test_a_path_is_pinned_by_the_manifest_that_a_root_keeps(shop, s3):
    digest = shop.push(shop.new)
    before = keys_of(s3, "manifests/")
    assert shop.cache("pin", "it", shop.new).stdout == f"it {digest}\n"
    assert keys_of(s3, "manifests/") == before


def test_a_path_without_a_manifest_is_pinned_by_its_narinfos(shop, s3):
    shop.push(shop.new)
    assert "--trusted" in shop.cache("pin", "it", shop.lib, code=2).stderr
    shop.cache("pin", "it", shop.lib, "--trusted", OTHER.public.dump(), code=7)
    assert not keys_of(s3, "roots/pin/")
    done = shop.cache("pin", "it", shop.lib, "--trusted", KEY.public.dump(), "--json")
    made = json.loads(done.stdout)["manifest"]
    assert f"manifests/{made}.json.zst" in keys_of(s3)
    remove(s3, "roots/push/web.json")
    shop.later()
    shop.gc("--no-dry-run")
    shop.later()
    shop.gc()
    shop.pull(shop.lib, "lib")
    shop.pull(shop.new, "new", code=5)


def test_what_is_not_there_is_not_pinned(shop, s3):
    old = shop.push(shop.old)
    shop.push(shop.new)
    shop.cache("pin", "it", "0" * 64, code=5)
    shop.cache("pin", "a/b", old, code=2)
    shop.cache("pin", "it", code=2)
    shop.cache("pin", "it", old, "--remove", code=2)
    remove(s3, f"{shop.old.digest}.narinfo")
    done = shop.cache("pin", "it", old, code=5)
    assert "1 of the 5 objects" in done.stderr
    assert not keys_of(s3, "roots/pin/")


def test_the_list_tells_of_damage(shop, s3):
    digest = shop.push(shop.new)
    remove(s3, f"manifests/{digest}.json.zst")
    (found,) = json.loads(shop.cache("ls", "--json").stdout)["roots"]
    assert found["toplevel"] is None
    assert found["problem"]
