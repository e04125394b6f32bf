"""`calve diff` and `calve plan` as a user runs them: processes, against S3, a local store, and a `nix` that is played."""

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
from calve.cache.objects import open_objects
from calve.fleet import ends, release
from calve.fleet.verdict import Outcome, Verdict
from calve.nix import nar, narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import fixed_output
from calve.transport.credentials import Environment
from calve.transport.http import Client

KEY = SecretKey.generate("test-1")
NOW = dt.datetime(2026, 3, 1, 12, 0, tzinfo=dt.UTC)


class Shop:
    """A store in which systems are made, a bucket, a fleet file, and how to call calve."""

    def __init__(self, directory: Path, url: str, env):
        self.directory = directory
        self.url = url
        self.root = directory / "store"
        self._scratch = directory / "scratch"
        self.store = LocalStore(self.root, create=True)
        self.manifests = {}
        (directory / "key.sec").write_text(KEY.dump())
        (directory / "key.sec").chmod(0o600)
        self.env = {**os.environ, "PYTHONPATH": str(Path(calve.__file__).parents[1]), **env}
        for name in ("NO_COLOR", "FORCE_COLOR", "AWS_PROFILE"):
            self.env.pop(name, None)
        self.configure("./result")

    def configure(self, system, fleets=("web",), delivery="initrd"):
        tables = "".join(
            f'[fleet.{name}]\nsystem = "{system}"\ndelivery = "{delivery}"\n'
            'rollout = { min-healthy = 100, max-healthy = 200, bake = "2m" }\n'
            for name in fleets
        )
        (self.directory / "calve.toml").write_text(
            f'[cache]\nurl = "{self.url}"\nkey = {{ file = "key.sec" }}\n'
            f'trusted = ["{KEY.public.dump()}"]\n{tables}'
        )

    def add(self, name, size, references=(), links=None):
        """Put a directory with `size` bytes that do not compress into the store; return its path."""
        tree = self._scratch / f"{len(list(self._scratch.glob('*')))}"
        tree.mkdir(parents=True)
        (tree / "file").write_bytes(os.urandom(size))
        for link, target in (links or {}).items():
            (tree / link).symlink_to(f"{target}/file")
        data = bytearray()
        narwriter.dump(tree, data.extend)
        nar_hash = Hash("sha256", hashlib.sha256(data).digest())
        path = fixed_output(name, nar_hash, references)
        info = PathInfo(path, nar_hash, len(data), tuple(sorted(references)))
        left = [bytes(data)]
        self.store.stage(info, nar.read(lambda _size: left.pop() if left else b"", limit=len(data)))
        self.store.commit([info])
        return path

    def systems(self):
        """Make two systems: another kernel, a newer nginx, another unit; glibc stays."""
        glibc = self.add("glibc-2.40", 300_000)
        made = []
        for number, kernel, nginx, size in ((1, "6.12.57", "1.26", 50), (2, "6.12.58", "1.27", 70)):
            linux = self.add(f"linux-{kernel}", 200_000)
            initrd = self.add(f"initrd-linux-{kernel}", 10_000)
            server = self.add(f"nginx-{nginx}", size * 1000, [glibc])
            unit = self.add("unit-nginx.service", 100, [server])
            links = {"kernel": linux, "initrd": initrd}
            references = [linux, initrd, unit]
            made.append(self.add(f"nixos-system-web-{number}", 10, references, links))
        return made

    def release(self, path, objects, fleet="web", outcome=Outcome.RELEASED):
        digest = self.run("push", path, "--store", self.root).stdout.split()[1]
        self.manifests[path] = digest
        made = release.create(
            objects, fleet, release.Content(str(path), digest, ("test-1",)), now=NOW
        )
        if outcome is not None:
            ends.write(objects, Verdict(fleet, made.number, outcome, "", "cli", NOW))

    def point(self, path):
        link = self.directory / "result"
        link.unlink(missing_ok=True)
        link.symlink_to(str(path))

    def run(self, *args, code=0, env=()):
        done = subprocess.run(
            [sys.executable, "-m", "calve", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**self.env, **dict(env)},
            cwd=self.directory,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        assert done.stderr.count("error: ") == (1 if code not in {0, 3} else 0)
        return done

    def json(self, *args, code=0):
        return json.loads(self.run(*args, "--json", code=code).stdout)


@pytest.fixture
def shop(tmp_path, server, admin):
    env = {
        "AWS_ACCESS_KEY_ID": admin.access_key,
        "AWS_SECRET_ACCESS_KEY": admin.secret_key,
    }
    made = Shop(tmp_path, f"s3://nix?region=test-region&endpoint={server.url}", env)
    yield made
    made.store.close()


@pytest.fixture
def objects(shop, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, shop.env[name])
    with Client() as client:
        yield open_objects(shop.url, client, Environment())


@pytest.fixture
def two(shop, objects):
    """Make releases 1 and 2 of web; return their systems."""
    systems = shop.systems()
    for path in systems:
        shop.release(path, objects)
    return systems


# calve diff


def test_two_releases_by_number(shop, two):
    done = shop.run("diff", "1", "2", "--exit-code", code=3)
    lines = done.stdout.splitlines()
    assert lines[0] == f"before   web release 1  {two[0]}"
    assert lines[2:5] == [
        "kernel   6.12.57 -> 6.12.58",
        "initrd   6.12.57 -> 6.12.58",
        "units    changed: nginx.service",
    ]
    rows = [line.split() for line in lines if line.startswith(("upgraded", "changed", "rebuilt "))]
    assert rows[0] == ["upgraded", "nginx", "1.26", "1.27", "+20.0", "kB"]
    assert {row[1] for row in rows} == {"nginx", "linux", "initrd-linux", "nixos-system-web"}
    assert "glibc" not in done.stdout
    assert lines[-2].startswith("new      5 paths, 0.3 MB; 5 paths gone")


def test_releases_manifests_roots_and_paths_name_the_same_closure(shop, two):
    expected = shop.json("diff", "1", "2")
    first, second = two
    for before, after in [
        (shop.manifests[first], shop.manifests[second]),
        ("1", "push/nixos-system-web"),
        ("1", second),
    ]:
        assert shop.json("diff", before, after) == expected
    local = shop.json("diff", first, second, "--store", shop.root)
    assert local == expected
    assert shop.run("diff", "2", second, "--exit-code").stdout.endswith("nothing differs\n")


def test_paths_of_a_local_store_need_no_cache(shop, tmp_path):
    first, second = shop.systems()
    (tmp_path / "calve.toml").unlink()
    shop.point(second)
    found = shop.json("diff", first, "./result", "--store", shop.root, "--exit-code", code=3)
    assert (found["before"], found["after"]) == (str(first), str(second))
    assert found["kernel"]["after_version"] == "6.12.58"
    shop.run("diff", first, "./result", code=2)


def test_a_number_needs_one_fleet(shop, two):
    shop.configure("./result", ["web", "db"])
    assert "web, db" in shop.run("diff", "1", "2", code=2).stderr
    assert shop.json("diff", "--fleet", "web", "1", "2")["new_paths"] == 5
    shop.run("diff", "--fleet", "db", "1", "2", code=5)


@pytest.mark.parametrize("name", ["3", "f" * 64, "nothing", f"/nix/store/{'0' * 32}-x"])
def test_what_is_not_there_is_exit_5(shop, two, name):
    assert not shop.run("diff", "1", name, code=5).stdout


# calve plan


def test_the_first_release(shop, objects):
    first, _ = shop.systems()
    shop.point(first)
    text = shop.run("plan", "web", "--store", shop.root).stdout
    assert "release  1, no other is live, by initrd" in text
    assert "--machines N" in text
    found = shop.json("plan", "web", "--store", shop.root, "--exit-code", code=3)
    assert (found["release"], found["live"], found["difference"]) == (1, None, None)
    assert found["fetch"] == {
        "paths": 6,
        "nar_bytes": found["fetch"]["nar_bytes"],
        "file_bytes": found["fetch"]["nar_bytes"],
        "exact": False,
    }


def test_the_next_release_before_it_is_pushed(shop, objects):
    first, second = shop.systems()
    shop.release(first, objects)
    shop.point(second)
    args = ("plan", "web", "--store", shop.root, "--machines", 6, "--boot", "40s")
    text = shop.run(*args).stdout
    assert "kernel   6.12.57 -> 6.12.58" in text
    assert "release  2, after release 1, by initrd" in text
    assert "machines 6 replaced, 6 at once in one batch; at least 6 healthy, at most 12" in text
    assert "time     about 2 min 40 s, 120 s of it baking" in text
    found = shop.json(*args)
    assert (found["release"], found["live"], found["changes"]) == (2, 1, True)
    assert found["fetch"]["paths"] == 6
    assert found["fetch_seeded"]["paths"] == found["difference"]["new_paths"] == 5
    assert found["predicted_s"] == 160
    assert release.listed(objects, "web").latest == 1


def test_what_is_pushed_has_exact_sizes_and_needs_no_store(shop, two):
    found = shop.json("plan", "web", two[1])
    assert (found["changes"], found["release"], found["live"]) == (False, 3, 2)
    assert shop.run("plan", "web", two[1], "--exit-code").stdout.endswith("nothing is to be done\n")
    back = shop.json("plan", "web", two[0], "--store", shop.root, "--exit-code", code=3)
    assert back["difference"]["kernel"]["after_version"] == "6.12.57"
    assert found["fetch"]["exact"]
    assert found["fetch"]["file_bytes"] > 500_000


def test_the_live_release_is_the_last_one_that_went_well(shop, objects):
    first, second = shop.systems()
    shop.release(first, objects)
    shop.release(second, objects, outcome=Outcome.ROLLED_BACK)
    found = shop.json("plan", "web", second)
    assert (found["release"], found["live"], found["changes"]) == (3, 1, True)


def test_a_release_without_a_verdict_is_gone_on_with(shop, objects):
    first, second = shop.systems()
    shop.release(first, objects)
    shop.release(second, objects, outcome=None)
    found = shop.json("plan", "web", second)
    assert (found["release"], found["resumes"], found["live"]) == (2, True, 1)
    assert (
        "2, which is under way already, after release 1" in shop.run("plan", "web", second).stdout
    )
    other = shop.json("plan", "web", first, "--store", shop.root)
    assert (other["release"], other["resumes"], other["changes"]) == (3, False, False)


def test_a_lost_manifest_is_said_and_stops_no_plan(shop, objects, two):
    objects.delete(f"manifests/{shop.manifests[two[1]]}.json.zst")
    text = shop.run("plan", "web", two[0], "--store", shop.root).stdout
    assert "release  3, after release 2, whose manifest the cache has lost" in text
    shop.run("plan", "web", two[1], "--store", shop.root, "--exit-code")


def test_nothing_is_written(shop, objects, two):
    before = sorted((one.key, one.tag) for one in objects.list(""))
    shop.run("plan", "web", two[0], "--store", shop.root)
    assert sorted((one.key, one.tag) for one in objects.list("")) == before


def test_unknown_fleets_and_no_fleet_file(shop, two):
    assert "there are: web" in shop.run("plan", "wbe", two[0], code=5).stderr
    (shop.directory / "calve.toml").unlink()
    shop.run("plan", "web", two[0], code=5)


def test_an_attribute_is_built_and_what_nix_says_is_told(shop, two):
    shop.configure(".#nixosConfigurations.web")
    bin_ = shop.directory / "bin"
    bin_.mkdir()
    (bin_ / "nix").write_text(
        "#!/bin/sh\n"
        f'echo "$PWD $*" >{bin_}/said\n'
        "echo \"building '/nix/store/x.drv'...\" >&2; echo 'warning: dirty' >&2\n"
        f'echo \'[{{"drvPath": "x", "outputs": {{"out": "{two[1]}"}}}}]\'\n'
    )
    (bin_ / "nix").chmod(0o755)
    done = shop.run("plan", "web", env={"PATH": f"{bin_}:{os.environ['PATH']}"})
    assert "release  2 has this system" in done.stdout
    assert "nix: warning: dirty" in done.stderr
    directory, *argv = (bin_ / "said").read_text().split()
    assert directory == str(shop.directory)
    assert argv[-1] == ".#nixosConfigurations.web.config.system.build.toplevel"
    assert "--no-link" in argv
