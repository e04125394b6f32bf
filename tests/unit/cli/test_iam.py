"""`calve iam`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import calve as package
from calve.cli import iam as module
from calve.infra.policies import policy
from calve.infra.roles import Role
from calve.infra.scope import Scope

FILE = """\
[cache]
url = "s3://acme-nix/p?region=eu-west-1"
[fleet.web]
system = "."
group = "acme-web"
"""
ARN = "arn:aws:iam::123456789012:role/acme-machine"


@pytest.fixture
def calve(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "calve", "iam", *args],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code:
            assert not done.stdout
        return done

    return run


def test_the_roles_are_those_that_have_a_policy():
    assert tuple(module._ROLES) == tuple(role.value for role in Role)


@pytest.mark.parametrize("role", Role)
def test_a_policy_is_printed_and_nothing_else(role, calve):
    done = calve("show", role.value)
    assert json.loads(done.stdout) == policy(role, Scope()).document
    assert "BUCKET stands for what is not known: give the cache's URL" in done.stderr


def test_the_fleet_file_and_the_arguments_narrow_it(calve):
    Path("calve.toml").write_text(FILE)
    done = calve("show", "releaser", "--role-arn", ARN)
    assert done.stderr == ""
    scope = Scope("123456789012", "eu-west-1", "acme-nix", "p/", "web", "acme-web", ARN)
    assert json.loads(done.stdout) == policy(Role.RELEASER, scope).document
    done = calve(
        "show", "machine", "--fleet", "web", "--group", "other", "--account", "210987654321"
    )
    assert "arn:aws:autoscaling:eu-west-1:210987654321:autoScalingGroup:*:" in done.stdout
    assert "autoScalingGroupName/other" in done.stdout
    assert done.stderr == ""


def test_of_several_fleets_one_is_named(calve, tmp_path):
    Path("f.toml").write_text(f'{FILE}[fleet.db]\nsystem = "."\n')
    assert (
        "autoScalingGroupName/db"
        in calve("show", "guard", "--config", "f.toml", "--fleet", "db").stdout
    )
    assert "FLEET stands for" in calve("show", "guard", "--config", "f.toml").stderr
    assert (
        "there are: web, db"
        in calve("show", "guard", "--config", "f.toml", "--fleet", "x", code=5).stderr
    )


def test_a_fleet_without_a_file_is_told_by_its_tag(calve):
    found = json.loads(calve("show", "guard", "--fleet", "web").stdout)
    (group,) = [one for one in found["Statement"] if one["Sid"] == "Group"]
    assert group["Condition"] == {"StringEquals": {"autoscaling:ResourceTag/calve:fleet": "web"}}


def test_json_says_what_it_is(calve):
    done = calve("show", "machine", "--json", "--fleet", "web", "--account", "123456789012")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert (found["role"], found["name"]) == ("machine", "calve-web-machine")
    assert found["placeholders"] == ["BUCKET", "REGION"]
    assert found["characters"] == len(json.dumps(found["policy"], separators=(",", ":")))


def test_terraform(calve):
    done = calve("show", "machine", "--terraform", "--fleet", "web")
    assert done.stdout.startswith('resource "aws_iam_policy" "calve-web-machine" {\n')
    assert "boot-reports/$${aws:userid}/*" in done.stdout


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        ((), "WHAT", 2),
        (("show",), "ROLE", 2),
        (("show", "king"), "invalid choice: 'king'", 2),
        (("show", "guard", "--account", "1"), "12 digits", 2),
        (("show", "guard", "--group", "w*"), "match others", 2),
        (("show", "releaser", "--role-arn", "acme"), "role's ARN", 2),
        (("show", "guard", "--json", "--terraform"), "not allowed with", 2),
        (("show", "guard", "--config", "none.toml"), "no such file", 5),
    ],
)
def test_what_is_wrong_is_told(args, words, code, calve):
    assert words in calve(*args, code=code).stderr
