"""`calve init`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import calve as package
from calve.fleet.config import load

BUCKET = ("--bucket", "acme-nix", "--region", "eu-central-1")
FILES = {".gitignore", "cache.sec", "calve.toml", ".github/workflows/calve.yml"}


@pytest.fixture
def calve(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*args, command="init", code=0):
        done = subprocess.run(
            [sys.executable, "-m", "calve", command, *args],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code:
            assert not done.stdout
        return done

    return run


def files():
    return {str(one) for one in Path().rglob("*") if one.is_file()}


def test_it_writes_the_files_and_never_shows_the_secret(calve):
    done = calve(*BUCKET)
    assert files() == FILES
    assert set(done.stdout.splitlines()) == {f"{name}: written" for name in FILES}
    secret = Path("cache.sec").read_text().strip().partition(":")[2]
    assert secret not in done.stdout + done.stderr
    assert load().cache.trusted[0] in done.stderr
    assert "CALVE_SIGNING_KEY" in done.stderr
    assert "CALVE_ROLE_ARN" in done.stderr


def test_what_it_writes_other_commands_take(calve):
    calve(*BUCKET)
    shown = calve("show", command="keys").stdout.strip()
    assert load().cache.trusted == (shown,)
    policy = calve("show", "machine", "--account", "123456789012", command="iam")
    assert policy.stderr == ""
    assert "arn:aws:s3:::acme-nix/nar/*" in policy.stdout


def test_every_argument_ends_in_the_files(calve):
    names = ("--fleet", "shop", "--system", "./s.nix", "--group", "acme-shop")
    calve("there", *BUCKET, *names)
    fleet = load(Path("there/calve.toml")).fleets["shop"]
    assert (fleet.system, fleet.group) == ("./s.nix", "acme-shop")
    text = Path("there/.github/workflows/calve.yml").read_text()
    assert "calve deploy shop --yes --json" in text


def test_the_fleet_s_name_stands_for_what_is_not_named(calve):
    calve(*BUCKET, "--fleet", "shop")
    fleet = load().fleets["shop"]
    assert (fleet.system, fleet.group) == (".#nixosConfigurations.shop", "shop")


def test_a_second_run_says_what_exists(calve):
    calve(*BUCKET)
    before = {name: Path(name).read_bytes() for name in FILES}
    assert calve(*BUCKET).stdout.splitlines() == [
        "calve.toml: exists",
        ".github/workflows/calve.yml: exists",
    ]
    assert {name: Path(name).read_bytes() for name in FILES} == before
    assert "unrecognized arguments: --force" in calve(*BUCKET, "--force", code=2).stderr


def test_a_dry_run_writes_nothing(calve):
    done = calve(*BUCKET, "--dry-run", "--json")
    assert json.loads(done.stdout) == {
        "directory": ".",
        "dry_run": True,
        "files": [
            {"path": name, "state": "would_write"}
            for name in (".gitignore", "cache.sec", "calve.toml", ".github/workflows/calve.yml")
        ],
        "public": None,
    }
    assert files() == set()


def test_json_has_the_public_key(calve):
    found = json.loads(calve(*BUCKET, "--json").stdout)
    assert found["public"] == load().cache.trusted[0]
    assert {one["state"] for one in found["files"]} == {"written"}


def test_the_region_of_the_environment_will_do(calve, monkeypatch):
    assert "no region" in calve("--bucket", "acme-nix", code=2).stderr
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    calve("--bucket", "acme-nix")
    assert load().cache.url == "s3://acme-nix?region=eu-west-3"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "no bucket is named"),
        (("--bucket", "A", "--region", "eu-west-1"), "not a bucket's name"),
        ((*BUCKET, "--fleet", "Web"), "not a fleet's name"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(args, words, calve):
    assert words in calve(*args, code=2).stderr
    assert files() == set()
