"""The commands that show a fleet as a user runs them: processes, which find the region by their environment."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import calve
from calve.fleet import ends
from calve.fleet.verdict import Outcome, Verdict

FLEET = '[fleet.web]\nsystem = "./result"\ndelivery = "initrd"\n'


class Calve:
    """Runs command lines; those that are to be interrupted stay `started`."""

    def __init__(self, place, directory):
        self.directory = directory
        self.file = directory / "calve.toml"
        self.file.write_text(f'[cache]\nurl = "{place.objects.url}"\n{FLEET}')
        self.env = {
            **os.environ,
            "PYTHONPATH": str(Path(calve.__file__).parents[1]),
            "AWS_ENDPOINT_URL": place.session.endpoint,
            "AWS_ACCESS_KEY_ID": "AK",
            "AWS_SECRET_ACCESS_KEY": "SK",
            "AWS_REGION": "eu-central-1",
        }

    def start(self, *argv):
        return subprocess.Popen(
            [sys.executable, "-m", "calve", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
            cwd=self.directory,
        )

    def __call__(self, *argv, code=0):
        with self.start(*argv) as child:
            out, err = child.communicate(timeout=120)
        assert child.returncode == code, err
        assert "Traceback" not in err
        return err if code else json.loads(out) if "--json" in argv else out


@pytest.fixture
def run(place, tmp_path):
    return Calve(place, tmp_path)


def test_all_of_them_answer(place, run):
    verdict = Verdict("web", 1, Outcome.RELEASED, "", "cli", place.clock.now())
    ends.write(place.objects, verdict)
    assert "live       release 1, nixos-system-web-1" in run("status")
    assert run("status", "web", "--json")["warnings"] == []
    found = run("instances", "--console", "--json")["instances"]
    assert [one["said"] for one in found] == ["healthy", "healthy"]
    assert [one["live"] for one in run("history", "--json")["releases"]] == [True]
    assert "Linux version" in run("console", found[0]["instance"])
    assert run("logs", "1", "--json")["logs"] == []


def test_what_is_missing_is_one_message(place, run, server, admin):
    place.gateways.scaling.delete_group("web", force=True)
    place.until(lambda: not _groups(place))
    for command in ("status", "instances"):
        told = run(command, code=5).splitlines()
        assert told[0] == "error: web: there is no such Auto Scaling group"
        assert [line.partition(":")[0] for line in told] == ["error", "hint"]
    run("history")
    assert "no fleet is called wbe" in run("status", "wbe", code=5)
    run.env |= {"AWS_ACCESS_KEY_ID": admin.access_key, "AWS_SECRET_ACCESS_KEY": admin.secret_key}
    url = f"s3://none?region=test-region&endpoint={server.url}"
    run.file.write_text(f'[cache]\nurl = "{url}"\n{FLEET}')
    for command in ("status", "history", "logs"):
        assert "there is no bucket none" in run(command, code=5)
    run.file.write_text(FLEET)
    assert "a fleet needs [cache]" in run("status", code=2)
    run.file.unlink()
    for command in ("instances", "logs"):
        assert "there is no calve.toml here" in run(command, code=5)


def test_a_console_is_followed_until_ctrl_c(place, run):
    one = place.gateways.scaling.group("web").instances[0].id
    with run.start("console", one, "--follow") as child:
        assert "Linux version" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "interrupted\n"


def _groups(place):
    return place.gateways.scaling._client.describe_auto_scaling_groups()["AutoScalingGroups"]
