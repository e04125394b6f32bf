"""`calve push` and `calve pull` as a user runs them: processes, against the region's S3 and a directory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import calve
from calve.nix import nar, narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import fixed_output
from calve.region.faults import Delay, Stall

KEY = SecretKey.generate("test-1")
OTHER = SecretKey.generate("test-1")


def add(store, scratch, name, content, references=()):
    """Put a directory with two files into a store; return its path."""
    tree = scratch / name
    tree.mkdir(parents=True)
    (tree / "file").write_bytes(content)
    (tree / "link").symlink_to("file")
    data = bytearray()
    narwriter.dump(tree, data.extend)
    nar_hash = Hash("sha256", hashlib.sha256(data).digest())
    path = fixed_output(name, nar_hash, references)
    info = PathInfo(path, nar_hash, len(data), tuple(sorted(references)))
    view = memoryview(data)
    at = 0

    def source(size):
        nonlocal at
        at += size
        return bytes(view[at - size : at])

    store.stage(info, nar.read(source, limit=len(data)))
    store.commit([info])
    return path


class Shop:
    """A store with a closure of two paths, a key, and how to call calve."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.root = directory / "from"
        with LocalStore(self.root, create=True) as store:
            self.lib = add(store, directory / "scratch", "lib", os.urandom(2_000_000))
            self.top = add(store, directory / "scratch", "top", b"top", [self.lib])
        self.key = directory / "key.sec"
        self.key.write_text(KEY.dump())
        self.key.chmod(0o600)
        # A relative PYTHONPATH would be lost with the working directory.
        self.env = {**os.environ, "PYTHONPATH": str(Path(calve.__file__).parents[1])}
        for name in ("NO_COLOR", "FORCE_COLOR", "AWS_PROFILE"):
            self.env.pop(name, None)

    def sign_in(self, key):
        self.env["AWS_ACCESS_KEY_ID"] = key.access_key
        self.env["AWS_SECRET_ACCESS_KEY"] = key.secret_key

    def argv(self, *args):
        return [sys.executable, "-m", "calve", *map(str, args)]

    def run(self, *args, code=0):
        done = subprocess.run(
            self.argv(*args),
            capture_output=True,
            text=True,
            timeout=120,
            env=self.env,
            cwd=self.directory,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        if code:
            assert not done.stdout
            assert done.stderr.count("error: ") == 1
        return done

    def push(self, url, *more, **kwargs):
        args = ("push", self.top, "--store", self.root, "--to", url, "--key", self.key)
        return self.run(*args, *more, **kwargs)

    def pull(self, url, to, *more, key=KEY, **kwargs):
        trusted = ("--trusted", key.public.dump())
        return self.run("pull", self.top, "--store", to, "--from", url, *trusted, *more, **kwargs)


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


@pytest.fixture
def bucket(server, admin, shop):
    shop.sign_in(admin)
    return f"s3://nix?region=test-region&endpoint={server.url}"


def paths_of(root):
    connection = sqlite3.connect(root / "nix/var/nix/db/db.sqlite")
    try:
        return {row[0] for row in connection.execute("select path from ValidPaths")}
    finally:
        connection.close()


def files_below(directory):
    return sorted(str(path) for path in directory.rglob("*"))


@pytest.mark.parametrize("where", ["s3", "directory"])
def test_a_closure_goes_into_a_cache_and_out_of_it(where, shop, bucket, tmp_path):
    url = bucket if where == "s3" else f"file://{tmp_path}/cache"
    pushed = shop.push(url)
    path, digest = pushed.stdout.split()
    assert path == str(shop.top)
    assert "pushed 2 of 2 paths" in pushed.stderr
    pulled = shop.pull(url, tmp_path / "to", "--manifest", digest)
    assert pulled.stdout.strip() == f"{tmp_path}/to{shop.top}"
    assert "fetched 2 of 2 paths" in pulled.stderr
    assert paths_of(tmp_path / "to") == {str(shop.top), str(shop.lib)}
    name = f"nix/store/{shop.lib.basename}/file"
    assert (tmp_path / "to" / name).read_bytes() == (shop.root / name).read_bytes()


def test_json_is_one_document_and_progress_is_json_lines(shop, bucket, tmp_path):
    pushed = shop.push(bucket, "--json")
    document = json.loads(pushed.stdout)
    assert document["dry_run"] is False
    (one,) = document["caches"]
    digest = one["roots"][0].pop("manifest")
    assert one.pop("compressed_bytes") > 2_000_000
    assert one.pop("nar_bytes") > 2_000_000
    assert one == {
        "cache": "s3://nix",
        "roots": [{"path": str(shop.top)}],
        "paths": 2,
        "new_paths": 2,
        "skipped_paths": 0,
    }
    events = [json.loads(line) for line in pushed.stderr.splitlines()]
    assert events[-1]["event"] == "step"
    assert events[-1]["done"] == events[-1]["total"] > 2_000_000

    document = json.loads(shop.pull(bucket, tmp_path / "to", "--json").stdout)
    assert document["dry_run"] is False
    assert document["manifest"] is None
    assert {row["path"] for row in document["fetched"]} == {str(shop.top), str(shop.lib)}
    assert document["fetched_bytes"] == sum(row["file_bytes"] for row in document["fetched"])
    again = json.loads(shop.pull(bucket, tmp_path / "to", "--json", "--manifest", digest).stdout)
    assert again["fetched"] == []
    assert again["present_paths"] == 2
    assert again["manifest"] == digest


def test_two_caches_other_compressions_and_check(shop, bucket, service, tmp_path):
    other = f"file://{tmp_path}/cache"
    pushed = shop.push(bucket, "--to", other, "--compression", "none")
    assert pushed.stdout.split()[0] == str(shop.top)
    assert len(pushed.stdout.split()) == 2  # the same manifest in both
    assert pushed.stderr.count("pushed 2 of 2 paths") == 2
    nars = sorted((tmp_path / "cache/nar").iterdir())
    assert {nar.suffix for nar in nars} == {".nar"}
    nars[0].unlink()
    assert "pushed 0 of 2" in shop.push(other).stderr
    assert "pushed 1 of 2" in shop.push(other, "--check", "--compression", "xz").stderr
    shop.pull(other, tmp_path / "to")
    for wrong in (
        ("--compression", "none", "--level", "3"),
        ("--compression", "xz", "--level", "9"),
    ):
        assert "error:" in shop.push(other, *wrong, code=2).stderr


def test_what_another_key_signed_is_left_to_its_cache(shop, bucket, tmp_path):
    shop.push(bucket)
    first = tmp_path / "first"
    shop.pull(bucket, first)
    second = f"file://{tmp_path}/second"
    public = shop.run("keys", "show", shop.key).stdout.strip()
    argv = ("push", shop.top, "--store", first, "--to", second, "--key", shop.key)
    told = shop.run(*argv, "--skip-signed-by", public).stderr
    assert "pushed 0 of 2 paths" in told
    assert "2 left to other caches" in told
    digest = json.loads(shop.run(*argv, "--skip-signed-by", public, "--json").stdout)
    manifest = digest["caches"][0]["roots"][0]["manifest"]
    shop.pull(second, tmp_path / "to", "--manifest", manifest, "--from", bucket)
    assert paths_of(tmp_path / "to") == {str(shop.top), str(shop.lib)}


def test_a_dry_run_writes_nothing(shop, bucket, service, tmp_path):
    counts = service.counts
    assert "would push 2 of 2 paths" in shop.push(bucket, "--dry-run").stdout
    assert "would push 2 of 2 paths" in shop.push(f"file://{tmp_path}/cache", "--dry-run").stdout
    assert not (tmp_path / "cache").exists()
    document = json.loads(shop.push(bucket, "--dry-run", "--json").stdout)
    assert document["dry_run"] is True
    assert document["caches"][0]["roots"] == [{"path": str(shop.top), "manifest": None}]
    assert set(service.counts - counts) == {"GetObject"}

    shop.push(bucket)
    told = shop.pull(bucket, tmp_path / "to", "--dry-run").stdout
    assert "would fetch 2 of 2 paths" in told
    assert not (tmp_path / "to").exists()
    with LocalStore(tmp_path / "to", create=True):
        pass
    before = files_below(tmp_path / "to")
    shop.pull(bucket, tmp_path / "to", "--dry-run")
    assert files_below(tmp_path / "to") == before


def test_links_lead_to_store_paths_and_the_fleet_file_says_the_rest(shop, tmp_path):
    (tmp_path / "calve.toml").write_text(
        f"""
        [cache]
        url = "file://{tmp_path}/cache"
        key = {{ file = "key.sec" }}
        trusted = ["{KEY.public.dump()}"]
        """
    )
    (tmp_path / "system-1-link").symlink_to(str(shop.top))
    (tmp_path / "result").symlink_to("system-1-link")
    pushed = shop.run("push", "./result", "--store", shop.root)
    assert pushed.stdout.split()[0] == str(shop.top)
    shop.run("pull", shop.top, "--store", tmp_path / "to")
    assert str(shop.top) in paths_of(tmp_path / "to")
    real = shop.root / "nix/store" / shop.top.basename / "file"
    assert "would push 0 of 2" in shop.run("push", real, "--store", shop.root, "--dry-run").stdout


def test_wrong_usage_is_2(shop, bucket, tmp_path):
    for path in ("./nothing", tmp_path, "/nix/store", "/nix/store/short-x"):
        args = ("push", path, "--store", shop.root, "--to", bucket, "--key", shop.key)
        assert "store path" in shop.run(*args, code=2).stderr
    assert "web server" in shop.push("https://127.0.0.1:1", code=2).stderr
    assert "no cache to push to" in shop.run("push", shop.top, code=2).stderr
    assert "no key is trusted" in shop.run("pull", shop.top, "--from", bucket, code=2).stderr
    wrong = shop.pull(bucket, tmp_path / "to", "--manifest", "abc", code=2)
    assert "not the digest of a manifest" in wrong.stderr
    shop.key.chmod(0o640)
    refused = shop.push(bucket, code=2)
    assert f"chmod 600 {shop.key}" in refused.stderr
    assert not (tmp_path / "to").exists()


def test_refused_credentials_are_4(shop, bucket, admin, tmp_path):
    shop.push(bucket)
    shop.env["AWS_SECRET_ACCESS_KEY"] = "wrong"
    assert "SignatureDoesNotMatch" in shop.push(bucket, "--level", 1, code=4).stderr
    assert "SignatureDoesNotMatch" in shop.pull(bucket, tmp_path / "to", code=4).stderr
    del shop.env["AWS_SECRET_ACCESS_KEY"]
    del shop.env["AWS_ACCESS_KEY_ID"]
    assert "hint: " in shop.pull(bucket, tmp_path / "to", code=4).stderr
    assert not list((tmp_path / "to/nix/store").glob("*-*"))


def test_what_is_not_there_is_5(shop, bucket, tmp_path):
    missing = bucket.replace("s3://nix", "s3://nicks")
    assert "there is no bucket nicks" in shop.push(missing, code=5).stderr
    assert "there is no bucket nicks" in shop.pull(missing, tmp_path / "to", code=5).stderr
    assert "no cache has" in shop.pull(bucket, tmp_path / "to", code=5).stderr
    gone = shop.run(
        "push", shop.top, "--store", tmp_path / "none", "--to", bucket, "--key", shop.key, code=5
    )
    assert "no Nix store" in gone.stderr
    shop.key.unlink()
    assert "calve keys generate" in shop.push(bucket, code=5).stderr


def test_a_key_that_did_not_sign_is_7(shop, bucket, tmp_path):
    digest = shop.push(bucket).stdout.split()[1]
    for more in ((), ("--manifest", digest)):
        wrong = shop.pull(bucket, tmp_path / "to", *more, key=OTHER, code=7)
        assert "signature of test-1 is wrong" in wrong.stderr
    assert paths_of(tmp_path / "to") == set()


def test_an_altered_nar_is_7(shop, tmp_path):
    shop.push(f"file://{tmp_path}/cache")
    largest = max((tmp_path / "cache/nar").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[1_000_000] ^= 0xFF
    largest.write_bytes(data)
    shop.pull(f"file://{tmp_path}/cache", tmp_path / "to", code=7)
    assert paths_of(tmp_path / "to") == set()
    assert not list((tmp_path / "to/nix/store").glob("*-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_of_a_pull(number, shop, bucket, server, faults, tmp_path):
    shop.push(bucket)
    stalled = threading.Event()

    def stall(request):
        if request.method == "GET" and "/nar/" in request.path:
            stalled.set()
            return Stall(after_bytes=200_000)
        return None

    server.faults = stall
    child = subprocess.Popen(
        shop.argv(
            "pull", shop.top, "--store", tmp_path / "to", "--from", bucket,
            "--trusted", KEY.public.dump(),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=shop.env,
    )  # fmt: skip
    with child:
        assert stalled.wait(60)
        child.send_signal(number)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    server.faults = None
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert paths_of(tmp_path / "to") == set()
    # What was verified is left to the next run, out of sight.
    left = {path.name for path in (tmp_path / "to/nix/store").iterdir()}
    assert all(name.startswith(".") for name in left)
    shop.pull(bucket, tmp_path / "to")
    assert not list((tmp_path / "to/nix/store").glob(".calve*"))
    assert paths_of(tmp_path / "to") == {str(shop.top), str(shop.lib)}


def test_ctrl_c_in_the_middle_of_a_push(shop, bucket, server, service, tmp_path):
    seen = threading.Event()

    def stall(request):
        if request.method == "PUT" and "/nar/" in request.path:
            seen.set()
            return Delay(600)
        return None

    server.faults = stall
    child = subprocess.Popen(
        shop.argv("push", shop.top, "--store", shop.root, "--to", bucket, "--key", shop.key),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=shop.env,
    )
    with child:
        assert seen.wait(60)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    server.faults = None
    assert (child.returncode, out, err.splitlines()[-1]) == (130, "", "interrupted")
    shop.pull(bucket, tmp_path / "to", code=5)
    shop.push(bucket)
    shop.pull(bucket, tmp_path / "to")
