"""`calve deploy` and its like as processes, really killed, upon a region whose time runs ten times as fast."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from calve.demo.imports import Importer, temporary
from calve.demo.virtual import IMAGE
from calve.fleet import ends, lock
from calve.fleet import history as releases
from calve.fleet.verdict import Outcome, Verdict
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.region.scripts import fails, good

NEVER = threading.Event()


class Operator:
    """A project's directory, and its command line in processes of their own."""

    def __init__(self, place, directory):
        self.place, self.directory = place, directory
        key = SecretKey.generate("acme-1")
        (directory / "cache.sec").write_text(key.dump() + "\n")
        (directory / "cache.sec").chmod(0o600)
        (directory / "calve.toml").write_text(
            f'[cache]\nurl = "{place.objects.url}"\nkey = {{ file = "cache.sec" }}\n'
            f'trusted = ["{key.public.dump()}"]\n'
            '[fleet.web]\nsystem = "./result"\nhealth = { http = "/healthz", within = "1m" }\n'
            'rollout = { bake = "0s" }\n'
        )
        self.systems = {}
        with LocalStore(directory / "root", create=True) as store:
            importer = Importer(store)
            for number in (1, 2, 3):
                with temporary(store) as work:
                    (work / "tree").mkdir()
                    (work / "tree" / "init").write_text(f"release {number}\n")
                    self.systems[number] = importer.add(work / "tree", f"nixos-system-web-{number}")
            importer.flush()
        verdict = Verdict("web", 1, Outcome.RELEASED, "", "cli", place.clock.now())
        ends.write(place.objects, verdict)

    def start(self, *argv, system=None, **env):
        root = Path(__file__).resolve().parents[3]
        more = ["--system", str(self.systems[system]), "--store", "root"] if system else []
        return subprocess.Popen(
            [sys.executable, "-m", "calve", *argv, *more],
            cwd=self.directory,
            env={
                **os.environ,
                "PYTHONPATH": str(root / "src"),
                "AWS_ENDPOINT_URL": self.place.session.endpoint,
                "AWS_REGION": "eu-central-1",
                "AWS_ACCESS_KEY_ID": "AK",
                "AWS_SECRET_ACCESS_KEY": "SK",
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, child, done=lambda: False, *, within_s=90):
        """Let the region's time run until the process has ended, or something else is so."""
        end = time.monotonic() + within_s
        while child.poll() is None and not done():
            assert time.monotonic() < end, "it takes too long"
            self.place.clock.wait(NEVER, 0.5)
            time.sleep(0.05)

    def run(self, *argv, system=None, **env):
        child = self.start(*argv, system=system, **env)
        self.until(child)
        out, err = child.communicate()
        assert "Traceback" not in err, err
        return child.returncode, out, err

    def refresh(self):
        found = self.place.gateways.refreshes.newest("web")
        return found[0] if found else None


@pytest.fixture
def operator(place, tmp_path):
    directory = tmp_path / "project"
    directory.mkdir()
    return Operator(place, directory)


def test_deploy_then_rollback_to_the_one_before(operator, tmp_path):
    place = operator.place
    place.scripts |= {number: lambda _launch: good(20.0) for number in (2, 3, 4)}
    github = tmp_path / "github"
    code, out, err = operator.run(
        "deploy", "web", "--yes", "--json", system=2, GITHUB_OUTPUT=str(github)
    )
    assert code == 0, err
    assert json.loads(out)["outcome"] == "released"
    assert place.versions() == ["2", "2"]
    told = [json.loads(line) for line in err.splitlines()]
    kinds = [one["event"] for one in told]
    assert kinds.index("version") < kinds.index("refresh") < kinds.index("verdict")
    assert github.read_text() == "release=2\noutcome=released\n"
    code, out, err = operator.run("deploy", "web", "--yes", system=2)
    assert (code, operator.refresh().version) == (0, "2"), err
    assert "nothing is to be done" in out
    assert operator.run("deploy", "web", "--yes", system=3)[0] == 0
    code, out, err = operator.run("rollback", "web", "--yes", "--json")
    assert code == 0, err
    assert json.loads(out)["release"] == 4
    assert releases.live(place.objects, "web").repeats == 2
    assert place.versions() == ["4", "4"]


def test_an_image_of_the_same_system_is_deployed_and_the_one_before_comes_back(operator):
    place, other = operator.place, "ami-0fedcba9876543210"
    place.cloud.add_image(other, "base-2")
    place.scripts |= {number: lambda _launch: good(20.0) for number in (2, 3, 4)}
    assert operator.run("deploy", "web", "--yes", system=2)[0] == 0
    code, out, err = operator.run("deploy", "web", "--yes", "--json", "--image", other, system=2)
    assert (code, json.loads(out)["release"]) == (0, 3), err
    code, out, err = operator.run("deploy", "web", "--yes", "--image", other, system=2)
    assert (code, operator.refresh().version) == (0, "3"), err
    assert operator.run("rollback", "web", "--yes")[0] == 0
    booted = [place.gateways.ec2.version(place.template, one).image_id for one in (2, 3, 4)]
    assert booted == [IMAGE, other, IMAGE]


def test_what_would_fail_an_hour_later_is_refused_before_anything_changed(operator):
    operator.place.gateways.scaling._client.suspend_processes(
        AutoScalingGroupName="web", ScalingProcesses=["Launch"]
    )
    code, out, err = operator.run("deploy", "web", "--yes", system=2)
    assert (code, out) == (2, ""), err
    assert "Launch" in err
    assert "resume-processes" in err
    assert operator.refresh() is None
    assert not list(operator.place.objects.list("nar/"))


def test_a_bad_release_exits_with_9_and_its_last_words(operator):
    operator.place.scripts[2] = lambda _launch: fails("signature", "no \x1b[2Jsignature", 15.0)
    code, out, err = operator.run("deploy", "web", "--yes", system=2)
    assert code == 9, err
    assert out == "release 2 rolled-back\n"
    assert "signature: no " in err
    assert "\x1b" not in err
    assert "calve explain signature" in err
    assert operator.place.versions() == ["1", "1"]
    assert "what it had changed" not in err, "release 1 has no manifest"


def test_killed_after_the_refresh_began_a_guard_takes_over(operator):
    operator.place.scripts[2] = lambda _launch: fails("signature", "no signature", 40.0)
    child = operator.start("deploy", "web", "--yes", system=2)
    operator.until(child, lambda: operator.refresh() is not None)
    child.kill()
    child.communicate()
    assert ends.read(operator.place.objects, "web", 2) is None
    code, _, err = operator.run("guard", "web", "--once", "--json")
    assert code == 0, err
    verdict = ends.read(operator.place.objects, "web", 2)
    assert (verdict.outcome, verdict.by) == (Outcome.ROLLED_BACK, "guard")
    assert operator.place.versions() == ["1", "1"]


@pytest.mark.full
def test_killed_and_run_again_it_is_the_same_release(operator):
    place = operator.place
    place.scripts[2] = lambda _launch: good(60.0)
    child = operator.start("deploy", "web", "--yes", system=2)
    operator.until(child, lambda: operator.refresh() is not None)
    child.kill()
    child.communicate()
    code, out, err = operator.run("deploy", "web", "--yes", "--json", system=2)
    assert code == 0, err
    assert json.loads(out)["release"] == 2
    assert len(place.gateways.refreshes.newest("web", 10)) == 1
    assert lock.read(place.objects, "web", place.clock.now()) is None


def test_ctrl_c_leaves_the_release_on_its_way_and_says_so(operator):
    place = operator.place
    place.scripts[2] = lambda _launch: good(300.0)
    child = operator.start("deploy", "web", "--yes", system=2)
    operator.until(child, lambda: operator.refresh() is not None)
    second = operator.start("deploy", "web", "--yes", system=3)
    operator.until(second)
    assert second.returncode == 6, second.communicate()
    assert "deploy lock is held by" in second.communicate()[1]
    child.send_signal(signal.SIGINT)
    operator.until(child)
    _, err = child.communicate()
    assert child.returncode == 130
    assert "calve attach web" in err
    assert operator.refresh().active
    assert lock.read(place.objects, "web", place.clock.now()) is None
    code, out, err = operator.run("rollback", "web", "--yes")
    assert code == 0, err
    assert out == "release 2 rolled-back\n"
    assert place.versions() == ["1", "1"]


def test_a_dry_run_of_a_rollback_writes_nothing_and_sees_what_nobody_wrote_down(operator):
    place = operator.place
    place.scripts |= {2: lambda _launch: good(20.0), 3: lambda _launch: good(1500.0)}
    assert operator.run("deploy", "web", "--yes", system=2)[0] == 0
    unwritable = str(operator.directory)
    code, out, err = operator.run(
        "deploy", "web", "--yes", "--detach", system=3, GITHUB_OUTPUT=unwritable
    )
    assert (code, out) == (0, "release 3 started\n"), err
    assert "$GITHUB_OUTPUT cannot be written" in err
    code, out, err = operator.run("cancel", "web", "--dry-run", "--json")
    assert (code, json.loads(out)["would"], json.loads(out)["release"]) == (0, "cancel", 3), err
    code, out, err = operator.run("rollback", "web", "--dry-run", "--json")
    assert (code, json.loads(out)["would"], json.loads(out)["release"]) == (0, "roll-back", 3), err
    place.until(lambda: operator.refresh().status == "Successful")
    before = [(one.key, one.tag) for one in place.objects.list("")]
    code, out, err = operator.run("rollback", "web", "--dry-run", "--json")
    assert (code, json.loads(out)["would"], json.loads(out)["release"]) == (0, "again", 2), err
    assert [(one.key, one.tag) for one in place.objects.list("")] == before
    code, _, err = operator.run("cancel", "web", "--yes")
    assert (code, "no instance refresh of release 3 is active" in err) == (5, True), err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--bake", "3d"), 2, "--bake"),
        (("--bake", "49h"), 2, "--bake must be at most 48h"),
        (("--min-healthy", "50", "--dry-run"), 0, ""),
        (("--min-healthy", "50", "--max-healthy", "200", "--dry-run"), 2, "--max-healthy"),
    ],
)
def test_bounds_of_the_command_line(operator, argv, code, said):
    found, _, err = operator.run("deploy", "web", *argv, system=2)
    assert found == code, err
    assert said in err
    assert operator.refresh() is None


@pytest.mark.full
def test_a_deploy_that_detaches_says_that_nobody_watches(operator):
    operator.place.scripts[2] = lambda _launch: good(20.0)
    code, out, err = operator.run("deploy", "web", "--yes", "--detach", system=2)
    assert (code, out) == (0, "release 2 started\n")
    assert "calve guard web" in err
    code, out, err = operator.run("attach", "web")
    assert (code, out) == (0, "release 2 released\n"), err


def test_a_dry_run_changes_nothing(operator):
    code, out, err = operator.run("deploy", "web", "--dry-run", "--json", system=2)
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["release"], plan["live"], plan["surge"]["machines"]) == (2, 1, 2)
    assert operator.refresh() is None
    assert len(list(operator.place.objects.list("fleets/web/releases/"))) == 2


def test_nobody_there_to_be_asked_is_refused(operator):
    code, _, err = operator.run("deploy", "web", system=2)
    assert code == 2
    assert "--yes" in err
