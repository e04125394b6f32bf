"""Releases that are rehearsed: what is told of them, and where the settings come from."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import replace

import pytest

from calve.aws import session as aws_session
from calve.aws.elb import Check
from calve.cli import main
from calve.cli.session import Session as CommandLine
from calve.demo.rehearse import BAD_MOST, Settings, advise, rehearse
from calve.errors import CancelledError, NotFoundError, UsageError
from calve.fleet.config import Rollout, Strategy
from calve.tasks import Cancel

SETTINGS = Settings(22, 40.0, Rollout(100, 110, 120), warmup_s=0)


@pytest.fixture(scope="module")
def told():
    return {(one.release, one.judge): one for one in rehearse(SETTINGS)}


def test_a_good_release_and_two_bad_ones_are_told(told):
    assert list(told) == [
        ("good", "calve"),
        ("never healthy", "calve"),
        ("never healthy", "aws"),
        ("fails at once", "calve"),
        ("fails at once", "aws"),
    ]
    outcomes = [one.outcome for one in told.values()]
    assert outcomes == ["released", *["rolled-back"] * 4]
    assert {one.machines for one in told.values()} == {22}
    assert {one.least_healthy for one in told.values()} == {22}


def test_a_good_release_is_noticed_by_nobody_and_takes_its_batches_and_its_bake(told):
    good = told["good", "calve"]
    assert (good.noticed_s, good.by, good.launched) == (None, "", 22)
    assert good.done_s >= 11 * 40 + 120  # two at a time
    hasty = replace(SETTINGS, rollout=replace(SETTINGS.rollout, bake_s=0))
    assert good.done_s == next(rehearse(hasty)).done_s + 120


def test_calve_notices_within_the_health_check_and_aws_after_its_hour(told):
    calve, aws = told["never healthy", "calve"], told["never healthy", "aws"]
    assert 180 <= calve.noticed_s < 200
    assert calve.by == "release-fault: unhealthy"
    assert aws.noticed_s == 3600
    assert "3600 seconds" in aws.by
    assert calve.launched == 2 < aws.launched
    assert told["fails at once", "calve"].noticed_s < 30
    assert told["fails at once", "aws"].noticed_s == 3600


def test_machines_beyond_the_group_s_size_are_counted_in_their_time(told):
    # Two of them for as long as it takes.
    aws, calve = told["fails at once", "aws"], told["fails at once", "calve"]
    assert aws.surge_machine_s == pytest.approx(2 * 3600, rel=0.02)
    assert calve.surge_machine_s == pytest.approx(2 * calve.noticed_s, abs=11)


def test_old_machines_that_were_ended_come_back_as_they_were():
    rules = Rollout(90, 110, 120)
    for one in rehearse(replace(SETTINGS, machines=20, rollout=rules)):
        assert one.outcome == ("released" if one.release == "good" else "rolled-back")
        assert one.least_healthy >= 18


def test_the_balancer_s_own_checks_are_rehearsed():
    slow = replace(SETTINGS, machines=4, hook_s=None, check=Check(30, 5, 2))
    hasty = replace(slow, check=Check(5, 2, 2))
    assert [
        one.noticed_s < other.noticed_s
        for one, other in zip(_never(hasty), _never(slow), strict=True)
    ] == [True]


def _never(settings):
    return [
        one for one in rehearse(settings) if (one.release, one.judge) == ("never healthy", "calve")
    ]


def test_it_is_the_same_every_time(told):
    assert list(rehearse(SETTINGS)) == list(told.values())


def test_without_a_hook_the_balancer_s_word_counts():
    told = list(rehearse(replace(SETTINGS, machines=4, hook_s=None)))
    assert told[0].outcome == "released"
    assert told[1].by == "release-fault: wrong-answer"
    assert told[1].noticed_s < 120
    # The grace period keeps the group from replacing them meanwhile.
    assert told[1].launched == 1


def test_a_bad_release_of_a_large_group_meets_only_some_of_it():
    told = rehearse(replace(SETTINGS, machines=1000))
    assert [next(told).machines, next(told).machines] == [1000, BAD_MOST]
    told.close()


def test_a_canary_s_pause_is_a_part_of_it():
    canary = replace(SETTINGS.rollout, strategy=Strategy.CANARY, canary_s=600, bake_s=0)
    without = next(rehearse(replace(SETTINGS, rollout=replace(SETTINGS.rollout, bake_s=0))))
    assert next(rehearse(replace(SETTINGS, rollout=canary))).done_s >= without.done_s + 600


@pytest.mark.parametrize("done", [1, 2])
def test_it_can_be_stopped_between_two_releases(done):
    cancel = Cancel()
    told = rehearse(SETTINGS, cancel)
    for _ in range(done):
        next(told)
    cancel.cancel()
    with pytest.raises(CancelledError):
        next(told)


# Advice


def codes(**changes):
    """Return the advice on settings that are changed; what is no setting's own is the rollout's."""
    own = {name: changes.pop(name) for name in list(changes) if hasattr(Settings, name)}
    rollout = replace(SETTINGS.rollout, **changes)
    return [one.code for one in advise(replace(SETTINGS, **own, rollout=rollout))]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"max_healthy_percent": 100}, ["no-surge", "one-at-a-time"]),
        ({"min_healthy_percent": 90, "max_healthy_percent": 100}, []),
        ({"max_healthy_percent": 101}, ["one-at-a-time"]),
        ({"max_healthy_percent": 101, "machines": 3}, []),
        ({"warmup_s": None}, ["warm-up"]),
        ({"warmup_s": None, "grace_s": 60}, []),
        ({"hook_s": 181}, ["hook-heartbeat"]),
        ({"hook_s": None}, []),
        ({"boot_s": 181.0}, ["within"]),
        ({"bake_s": 119, "alarms": ("5xx",)}, ["bake"]),
        ({"bake_s": 0}, []),
        ({"bake_s": 601}, ["bake"]),
        ({"bake_s": 600, "alarms": ("5xx",)}, []),
    ],
)
def test_what_could_be_set_better_is_said(changes, found):
    assert codes(**changes) == found


def test_twenty_two_machines_that_wait_half_an_hour_each_take_half_a_day():
    one_by_one = replace(
        SETTINGS,
        warmup_s=None,
        grace_s=1964,
        rollout=replace(SETTINGS.rollout, max_healthy_percent=101),
    )
    (found,) = [one for one in advise(one_by_one) if one.code == "warm-up"]
    assert "12.0 h for 22 machines" in found.message


# The command


@pytest.fixture
def calve(tmp_path, monkeypatch):
    monkeypatch.setattr(aws_session, "_boto3_session", functools.cache(aws_session._boto3_session))
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        argv = ("rehearse", *argv)
        out, err = io.StringIO(), io.StringIO()
        options = main._parser(argv).parse_args(argv)
        assert main._module("rehearse").run(options, CommandLine(out, err)) == 0
        return out.getvalue(), err.getvalue()

    return run


FILE = """\
[fleet.web]
system = "./result"
health = { http = "/healthz", within = "1m" }
rollout = { max-healthy = 150, bake = "30s" }
"""


def test_machines_are_rehearsed_without_aws_and_without_a_file(calve):
    out, err = calve("--machines", "2", "--boot", "20s")
    assert "2 machines that boot in 20 s, 100 to 200 % healthy, launch hook of 180 s" in err
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["RELEASE", "JUDGE", "OUTCOME"]
    assert len(lines) == 6
    assert "release-fault: unhealthy" in lines[2]


def test_the_fleet_file_s_rules_count(calve, tmp_path):
    (tmp_path / "calve.toml").write_text(FILE)
    found = json.loads(calve("--machines", "4", "--json")[0])
    assert found["settings"]["rollout"]["max_healthy_percent"] == 150
    assert found["settings"]["within_s"] == 60
    assert [one["judge"] for one in found["releases"]] == ["calve", "calve", "aws", "calve", "aws"]
    assert 60 <= found["releases"][1]["noticed_s"] < 80
    (tmp_path / "calve.toml").write_text(FILE.replace("health =", "# health ="))
    assert json.loads(calve("--machines", "4", "--json")[0])["settings"]["hook_s"] is None


def test_without_a_file_there_is_no_fleet(calve):
    with pytest.raises(NotFoundError, match=r"calve\.toml"):
        calve("web", "--machines", "2")
    with pytest.raises(NotFoundError, match=r"calve\.toml"):
        calve()
    with pytest.raises(UsageError, match="at least"):
        calve("--machines", "2", "--boot", "0s")


def test_the_group_s_own_settings_are_read(calve, place, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.session.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    place.gateways.scaling.set_grace("web", 77)
    (tmp_path / "calve.toml").write_text(f'[cache]\nurl = "{place.objects.url}"\n{FILE}')
    settings = json.loads(calve("web", "--json")[0])["settings"]
    assert (settings["machines"], settings["grace_s"], settings["hook_s"]) == (2, 77, 180)
    assert settings["warmup_s"] is None
    assert Check(**settings["check"]) == Check(5, 2, 2)
    assert place.versions() == ["1", "1"]
    place.gateways.scaling._client.delete_lifecycle_hook(
        AutoScalingGroupName="web", LifecycleHookName="calve-launch"
    )
    assert json.loads(calve("web", "--json")[0])["settings"]["hook_s"] is None
