"""`calve cache verify|repair|stats|path-info|sign` as a user runs them: processes, against S3 and a directory."""

from __future__ import annotations

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

KEY = SecretKey.generate("test-1")
NEW = SecretKey.generate("new-1")


def add(store, scratch, name, content, references=()):
    """Put a directory with a file into a store; return its path."""
    tree = scratch / name
    tree.mkdir(parents=True)
    (tree / "file").write_bytes(content)
    data = bytearray()
    narwriter.dump(tree, data.extend)
    nar_hash = Hash("sha256", hashlib.sha256(data).digest())
    path = fixed_output(name, nar_hash, references)
    info = PathInfo(path, nar_hash, len(data), tuple(sorted(references)))
    left = [bytes(data)]
    store.stage(info, nar.read(lambda _size: left.pop() if left else b"", limit=len(data)))
    store.commit([info])
    return path


class Shop:
    """A store with a closure of two paths, keys, a fleet file, and how to call calve."""

    def __init__(self, directory: Path, url: str, env):
        self.directory = directory
        self.root = directory / "from"
        with LocalStore(self.root, create=True) as store:
            self.lib = add(store, directory / "scratch", "lib", os.urandom(500_000))
            self.top = add(store, directory / "scratch", "top", b"top", [self.lib])
        for name, key in (("key.sec", KEY), ("new.sec", NEW)):
            (directory / name).write_text(key.dump())
            (directory / name).chmod(0o600)
        (directory / "calve.toml").write_text(
            f'[cache]\nurl = "{url}"\nkey = {{ file = "key.sec" }}\n'
            f'trusted = ["{KEY.public.dump()}"]\n'
        )
        self.env = {**os.environ, "PYTHONPATH": str(Path(calve.__file__).parents[1]), **env}
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
        assert done.stderr.count("error: ") == (1 if code else 0)
        return done

    def cache(self, *args, code=0):
        return self.run("cache", *args, code=code)

    def json(self, *args, code=0):
        return json.loads(self.cache(*args, "--json", code=code).stdout)

    def push(self):
        self.run("push", self.top, "--store", self.root)


@pytest.fixture
def url(server):
    return f"s3://nix?region=test-region&endpoint={server.url}"


@pytest.fixture
def shop(tmp_path, url, admin):
    env = {
        "AWS_ACCESS_KEY_ID": admin.access_key,
        "AWS_SECRET_ACCESS_KEY": admin.secret_key,
    }
    made = Shop(tmp_path, url, env)
    made.push()
    return made


def nar_of(shop, path):
    (row,) = shop.json("path-info", path)["paths"]
    return row["url"]


def test_damage_is_found_and_repaired(shop, s3, service):
    assert "verified" in shop.cache("verify").stderr
    clean = shop.json("verify", "--deep")
    assert clean["errors"] == clean["unreferenced"] == []
    assert (clean["manifests"], clean["narinfos"], clean["nars"]) == (1, 2, 2)
    assert clean["read_bytes"] > 500_000

    key = nar_of(shop, shop.lib)
    good = s3.get_object(Bucket="nix", Key=key)["Body"].read()
    s3.put_object(Bucket="nix", Key=key, Body=good[:-100] + bytes(100))
    s3.delete_object(Bucket="nix", Key=f"{shop.top.digest}.narinfo")
    found = shop.cache("verify", "--deep", code=7)
    assert key in found.stdout
    assert f"{shop.top.digest}.narinfo" in found.stdout
    assert "calve cache repair" in found.stderr
    document = shop.json("verify", "--deep", code=7)
    assert {(one["kind"], one["path"]) for one in document["errors"]} == {
        ("corrupt", str(shop.lib)),
        ("missing", str(shop.top)),
    }

    left = shop.cache("repair", "--deep", code=7)
    assert "--store" in left.stdout
    would = shop.json("repair", "--deep", "--store", shop.root, "--dry-run")
    assert len(would["repaired"]) == 1  # the narinfo is back
    assert s3.get_object(Bucket="nix", Key=key)["Body"].read() != good
    done = shop.cache("repair", "--deep", "--store", shop.root)
    assert "repaired 1 finding" in done.stderr
    assert s3.get_object(Bucket="nix", Key=key)["Body"].read() == good
    assert shop.json("verify", "--deep")["errors"] == []
    assert "nothing to repair" in shop.cache("repair").stderr
    shop.run("pull", shop.top, "--store", shop.directory / "to")


def test_repair_from_another_cache(shop, s3):
    mirror = f"file://{shop.directory}/mirror"
    shop.run("push", shop.top, "--store", shop.root, "--to", mirror, "--level", 9)
    listed = s3.list_objects_v2(Bucket="nix")["Contents"]
    for one in listed:
        if one["Key"].startswith(("nar/", "manifests/")) or one["Key"].endswith(".narinfo"):
            s3.delete_object(Bucket="nix", Key=one["Key"])
    broken = shop.json("verify", code=7)
    assert [one["kind"] for one in broken["errors"]] == ["missing"]  # only the root says so
    shop.json("repair", "--from", mirror, "--store", shop.root, code=7)
    # The mirror has another level, thus another manifest; a push makes everything anew.
    shop.push()
    assert shop.json("verify", "--deep")["errors"] == []
    s3.delete_object(Bucket="nix", Key=nar_of(shop, shop.lib))
    assert shop.json("repair", "--from", mirror)["left"] == []
    assert shop.json("verify", "--deep")["errors"] == []


def test_stats_and_path_info(shop, s3, service):
    before = service.counts
    document = shop.json("stats")
    counts = service.counts - before
    assert sum(counts.values()) == 1 + 1 + 1  # the listing, the root, its manifest
    (root,) = document["roots"]
    assert root["toplevel"] == str(shop.top)
    assert root["paths"] == 2
    assert root["own_bytes"] == root["stored_bytes"] == document["kinds"]["nar"]["bytes"]
    assert document["unreferenced"] == {"objects": 0, "bytes": 0}
    listed = s3.list_objects_v2(Bucket="nix")["Contents"]
    assert document["total"] == {
        "objects": len(listed),
        "bytes": sum(one["Size"] for one in listed),
    }
    told = shop.cache("stats")
    assert "top" in told.stdout
    assert "a month" in told.stderr

    info = shop.json("path-info", shop.top, "--closure")
    assert [row["path"] for row in info["paths"]] == [str(shop.top), str(shop.lib)]
    assert info["stored_bytes"] == root["stored_bytes"]
    assert info["nar_bytes"] == root["nar_bytes"]
    assert info["paths"][0]["references"] == [str(shop.lib)]
    assert "test-1" in shop.cache("path-info", shop.lib).stdout
    other = "/nix/store/" + "0" * 32 + "-other"
    assert "does not have" in shop.cache("path-info", other, code=5).stderr


def test_a_key_is_added_and_the_old_one_let_go(shop, s3):
    would = shop.cache("sign", "--key", "new.sec", "--dry-run")
    assert "would sign 2 narinfos and 1 manifest with new-1" in would.stdout
    new_only = ("--trusted", NEW.public.dump())
    assert len(shop.json("verify", *new_only, code=7)["errors"]) > 2
    assert shop.json("sign", "--key", "new.sec")["refused"] == []
    assert shop.json("sign", "--key", "new.sec")["known"] == 3
    # The manifest's own list of signatures is older: a machine that trusts only the new key walks narinfos.
    kinds = {one["kind"] for one in shop.json("verify", *new_only, code=7)["errors"]}
    assert kinds == {"unsigned"}
    assert shop.json("verify", shop.top, *new_only)["errors"] == []
    shop.run("pull", shop.top, "--store", shop.directory / "to", *new_only)
    s3.put_object(Bucket="nix", Key=f"{shop.lib.digest}.narinfo", Body=b"damaged")
    (shop.directory / "third.sec").write_text(SecretKey.generate("third-1").dump())
    (shop.directory / "third.sec").chmod(0o600)
    refused = shop.json("sign", "--key", "third.sec", code=7)
    assert (refused["narinfos"], refused["manifests"]) == (1, 1)
    assert [(one["kind"], one["path"]) for one in refused["refused"]] == [
        ("corrupt", str(shop.lib))
    ]


def test_a_directory(shop, tmp_path):
    url = f"file://{tmp_path}/cache"
    shop.run("push", shop.top, "--store", shop.root, "--to", url)
    where = ("--cache", url)
    assert shop.json("verify", "--deep", *where)["errors"] == []
    narinfo = tmp_path / "cache" / f"{shop.lib.digest}.narinfo"
    narinfo.write_text("x")
    assert "corrupt" in shop.cache("verify", *where, code=7).stdout
    shop.cache("repair", *where)
    assert shop.json("verify", "--deep", *where)["errors"] == []
    assert shop.json("stats", *where)["roots"][0]["paths"] == 2
    assert shop.json("sign", "--key", "new.sec", *where)["narinfos"] == 2
    assert (
        "there is no such directory"
        in shop.cache("verify", "--cache", f"file://{tmp_path}/none", code=5).stderr
    )


def test_wrong_usage(shop, tmp_path):
    assert "no root" in shop.cache("verify", "nothing", code=5).stderr
    assert "web server" in shop.cache("stats", "--cache", "http://127.0.0.1:1", code=2).stderr
    (tmp_path / "calve.toml").unlink()
    assert "no cache is named" in shop.cache("stats", code=2).stderr
    url = f"file://{tmp_path}/cache"
    assert "no key is trusted" in shop.cache("verify", "--cache", url, code=2).stderr
    trusted = ("--trusted", KEY.public.dump())
    assert "no signing key" in shop.cache("sign", "--cache", url, *trusted, code=2).stderr
    gone = shop.cache("repair", "--cache", url, *trusted, "--store", tmp_path / "no", code=5)
    assert "no Nix store" in gone.stderr
