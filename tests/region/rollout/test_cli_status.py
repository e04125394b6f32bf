"""`calve status`, `instances`, `history`, `logs` and `console`, of a fleet in the simulated region."""

import contextlib
import dataclasses
import io
import json

import pytest

from calve.cli import console, fleet_options, instances, logs, main, status
from calve.cli.session import Session
from calve.contract.userdata import UserData
from calve.errors import NotFoundError, UsageError
from calve.fleet import ends, lock
from calve.fleet.config import Cache, Config
from calve.fleet.config import Rollout as Bounds
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.region.scripts import fails, good, silent
from calve.tasks import Cancel

BAD = "lacks \x1b[2Jglibc"


def opened(place):
    config = Config(None, Cache(place.objects.url), {"web": place.fleet})
    return fleet_options.Opened(config, config.cache, place.fleet, place.session, place.gateways)


@pytest.fixture
def calve(place, tmp_path, monkeypatch):
    """Return a function that runs a command line in this process, upon the simulated region."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calve.toml").write_text(
        f'[cache]\nurl = "{place.objects.url}"\n'
        '[fleet.web]\nsystem = "./result"\ndelivery = "initrd"\n'
    )

    @contextlib.contextmanager
    def at_place(session, options):
        fleet_options.fleet_of(fleet_options.config_of(options), options.fleet)
        yield opened(place)

    # boto's clients are the fixture's, which closes them; all else is as it is.
    monkeypatch.setattr(fleet_options, "open_fleet", at_place)

    def run(*argv):
        out, err = io.StringIO(), io.StringIO()
        options = main._parser(argv).parse_args(argv)
        assert main._module(argv[0]).run(options, Session(out, err)) == 0
        run.err = err.getvalue()
        return json.loads(out.getvalue()) if "--json" in argv else out.getvalue()

    return run


def conclude(place, number, outcome=Outcome.RELEASED):
    return ends.write(place.objects, Verdict("web", number, outcome, "", "cli", place.clock.now()))


def failed_release(place, number=2):
    place.scripts[number] = lambda _launch: fails("closure-incomplete", BAD, 15.0)
    verdict = place.rollout(place.release(number)).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    return verdict


def codes(found):
    return [one.code for one in status.warnings(found)]


# status


def test_a_fleet_at_rest_has_no_warnings(place):
    conclude(place, 1)
    found = status.look(opened(place), place.clock)
    assert codes(found) == []
    body = status.document(found)
    assert body["group"] == {
        "name": "web",
        "template": place.template,
        "version": "1",
        "version_number": 1,
        "release": 1,
        "desired": 2,
        "min": 2,
        "max": 4,
        "health_check": "ELB",
        "suspended": [],
    }
    assert body["live"]["release"] == 1
    assert {body[name] for name in ("under_way", "last", "refresh", "lock")} == {None}
    assert body["machines"] == [
        {"release": 1, "version": "1", "state": "InService, healthy", "count": 2}
    ]
    assert body["targets"] == {"healthy": 2}


def test_a_rollout_under_way_shows_its_release_its_refresh_and_who_holds_the_lock(place):
    conclude(place, 1)
    place.scripts[2] = lambda _launch: silent()
    place.rollout(place.release(2)).run(detach=True)
    place.until(lambda: "2" in place.versions())
    with lock.held(place.objects, "web", doing="a deploy", clock=place.clock):
        found = status.look(opened(place), place.clock)
    assert (found.live.number, found.under_way.number) == (1, 2)
    body = status.document(found)
    assert (body["refresh"]["status"], body["refresh"]["release"]) == ("InProgress", 2)
    assert body["lock"]["doing"] == "a deploy"
    assert {one["release"] for one in body["machines"]} == {1, 2}
    # Machines of two versions are what a refresh is for; nobody needs to hold the lock while it goes on.
    assert codes(status.look(opened(place), place.clock)) == codes(found) == []


def test_warnings_of_a_fleet_that_somebody_left_half_way(place):
    place.fleet = dataclasses.replace(place.fleet, rollout=Bounds(50, 100, 0))
    place.scripts[2] = lambda _launch: good(20.0)
    place.rollout(place.release(2)).run(detach=True)
    place.until(lambda: place.versions() == ["1", "2"])
    place.gateways.refreshes.cancel("web")
    place.until(lambda: not status.look(opened(place), place.clock).active)
    assert codes(status.look(opened(place), place.clock)) == ["mixed", "no-last-good", "stalled"]
    conclude(place, 1)
    place.gateways.scaling.set_version("web", place.template, 2)
    with lock.held(place.objects, "web", doing="a deploy", clock=place.clock):
        assert codes(status.look(opened(place), place.clock)) == ["mixed"]
    # Of a release that only lacks its verdict this is no drift.
    assert codes(status.look(opened(place), place.clock)) == ["mixed", "stalled"]
    conclude(place, 2, Outcome.CANCELLED)
    assert codes(status.look(opened(place), place.clock)) == ["mixed", "drift"]


def test_a_group_on_latest_is_warned_of_and_its_version_is_found(place):
    conclude(place, 1)
    place.gateways.scaling._client.update_auto_scaling_group(
        AutoScalingGroupName="web",
        LaunchTemplate={"LaunchTemplateId": place.template, "Version": "$Latest"},
    )
    found = status.look(opened(place), place.clock)
    assert codes(found) == ["unnumbered"]
    group = status.document(found)["group"]
    assert (group["version"], group["version_number"], group["release"]) == ("$Latest", 1, 1)


def test_status_is_printed_for_people(place, calve):
    conclude(place, 1)
    verdict = failed_release(place)
    text = calve("status")
    assert "\x1b" not in text
    for line in (
        "fleet      web, in eu-central-1",
        "group      web: 2 machines wanted, 2 to 4; health checks: ELB",
        f"launches   version 1 of {place.template}, release 1",
        "live       release 1, nixos-system-web-1, for ",
        "last       release 2, rolled back ",
        ": closure-incomplete: lacks \ufffd[2Jglibc",
        "refresh    RollbackSuccessful to release 2, ",
        "machines   2 of release 1",
        "targets    2 healthy",
    ):
        assert line in text
    assert "warning" not in text
    body = calve("status", "web", "--json")
    assert body["refresh"]["id"] == verdict.refresh
    assert (body["last"]["release"], body["last"]["outcome"]) == (2, "rolled-back")


@pytest.mark.parametrize("place", [{"size": (25, 25, 50)}], indirect=True)
def test_of_many_machines_states_are_counted(place, calve):
    text = calve("status")
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert rows[0] == ["MACHINES", "RELEASE", "VERSION", "STATE"]
    assert rows[1] == ["25", "1", "1", "InService,", "healthy"]
    assert "i-" not in text


def test_a_group_that_is_not_there_is_one_clear_message(place):
    place.gateways.scaling.delete_group("web", force=True)
    place.until(lambda: not _groups(place))
    with pytest.raises(NotFoundError, match=r"^web: there is no such Auto Scaling group$") as told:
        status.look(opened(place), place.clock)
    assert "fleet.web.group" in told.value.hint


def _groups(place):
    return place.gateways.scaling._client.describe_auto_scaling_groups()["AutoScalingGroups"]


# instances


def test_every_machine_has_a_row_with_what_it_said(place, calve):
    found = calve("instances", "--json")["instances"]
    assert len(found) == 2
    for one in found:
        assert (one["release"], one["version"], one["lifecycle"]) == (1, "1", "InService")
        assert (one["target"], one["source"], one["said"]) == ("healthy", "report", "healthy")
        assert one["phase"] == "health"
        assert one["evidence"]["e"] == "healthy"
        assert one["launched_at"].startswith("2026-01-01T12:00:")
    text = calve("instances")
    assert text.splitlines()[0].split()[:3] == ["INSTANCE", "RELEASE", "VERSION"]
    assert len(text.splitlines()) == 3


def test_consoles_are_asked_only_when_wanted_and_only_of_who_has_no_report(
    place, calve, monkeypatch
):
    place.scripts[2] = lambda _launch: good(400.0)
    place.rollout(place.release(2)).run(detach=True)
    place.until(lambda: "2" in place.versions())
    Cancel().wait(200.0, place.clock)
    asked = []
    ask = place.gateways.ec2.console

    def listen(name):
        asked.append(name)
        return ask(name)

    monkeypatch.setattr(place.gateways.ec2, "console", listen)
    quiet = calve("instances", "--json")["instances"]
    assert asked == []
    assert {one["said"] for one in quiet if one["release"] == 2} == {None}
    new = {one["instance"] for one in quiet if one["release"] == 2}
    found = calve("instances", "--console", "--json")["instances"]
    assert set(asked) == new
    assert {(one["source"], one["said"]) for one in found if one["release"] == 2} == {
        ("console", "pull")
    }
    assert {one["source"] for one in found if one["release"] == 1} == {"report"}


def test_the_age_of_one_that_is_not_known_is_left_out(place):
    (first, second) = place.gateways.scaling.group("web").instances
    ids = [first.id, "i-0000000000000dead", second.id]
    assert instances.launched(place.gateways.ec2, ids).keys() == {first.id, second.id}
    assert instances.launched(place.gateways.ec2, []) == {}


# history


def test_history_says_how_each_ended_and_marks_the_live_one(place, calve):
    conclude(place, 1)
    failed_release(place)
    place.release(3)
    body = calve("history", "--json")
    assert body["live"] == 1
    newest, bad, _first = body["releases"]
    assert (newest["release"], newest["verdict"], newest["seconds"]) == (3, None, None)
    assert bad["verdict"]["outcome"] == "rolled-back"
    assert bad["verdict"]["reason"]["failures"][0]["code"] == "closure-incomplete"
    assert "lines" not in bad["verdict"]["reason"]["failures"][0]
    (refresh,) = place.gateways.refreshes.newest("web")
    assert refresh.id == bad["verdict"]["refresh"]
    assert bad["seconds"] == (refresh.ended_at - refresh.started_at).total_seconds()
    assert [one["live"] for one in body["releases"]] == [False, False, True]
    rows = calve("history").splitlines()
    assert "under way" in rows[1]
    assert "rolled back" in rows[2]
    assert "closure-incomplete: lacks \ufffd[2Jglibc" in rows[2]
    assert "released, live" in rows[3]
    assert [one["release"] for one in calve("history", "--last", "1", "--json")["releases"]] == [3]


def test_a_deleted_target_group_hides_nothing(place, calve):
    conclude(place, 1)
    place.cloud.elb.groups.clear()
    assert "live       release 1" in calve("status")
    assert [one["target"] for one in calve("instances", "--json")["instances"]] == [None, None]


def test_a_report_that_is_too_long_is_its_machine_s_affair(place, calve):
    name = next(iter(place.cloud.autoscaling.groups["web"].instances))
    data = place.gateways.ec2.version(place.template, 1).user_data
    place.objects.put(UserData.parse(data).report_key(name), b"x" * 70_000)
    found = calve("instances", "--json")["instances"]
    assert len(found) == 2
    assert {one["source"] for one in found if one["instance"] == name} == {None}


def test_history_goes_without_the_group(place, calve):
    Cancel().wait(90, place.clock)
    conclude(place, 1)
    place.gateways.scaling.delete_group("web", force=True)
    place.until(lambda: not place.cloud.autoscaling.groups)
    body = calve("history", "--json")
    assert body["releases"][0]["seconds"] >= 90
    assert "told by their records alone" in calve.err


# logs


def test_logs_give_the_reason_first_then_what_each_machine_said(place, calve):
    conclude(place, 1)
    verdict = failed_release(place)
    first = verdict.reason.failures[0].instance
    text = calve("logs")
    assert text.splitlines()[0].startswith("release 2 of web: rolled back: ")
    assert f"== {first} in phase pull: closure-incomplete: lacks \ufffd[2Jglibc" in text
    assert "[    0.000000] Linux version" in text
    assert "\x1b" not in text
    assert calve("logs", "2") == calve("logs", "web", "2") == text
    body = calve("logs", "--instance", first, "--json")
    assert [(one["instance"], one["whole"]) for one in body["logs"]] == [(first, True)]
    assert (body["release"], body["rule"]) == (2, "release-fault")
    assert calve("logs", "1").startswith("release 1 of web: released")
    assert "no machine's words were kept" in calve.err
    ends.keep_log(place.objects, "web", 1, "i-0000000000000dead", "a\x1b[2Jb\x07\r\n")
    assert calve("logs", "1").endswith("\n\n== i-0000000000000dead\nab\ufffd\n")


def test_the_newest_that_failed_is_shown_even_before_it_has_a_verdict(place):
    assert logs.failed(place.objects, "web") is None
    conclude(place, 1)
    assert logs.failed(place.objects, "web") is None
    place.release(2)
    conclude(place, 2, Outcome.FAILED)
    place.release(3)
    conclude(place, 3, Outcome.CANCELLED)
    assert logs.failed(place.objects, "web") == 2
    place.release(4)
    assert logs.failed(place.objects, "web") == 2
    reason = Reason("timeout", "too long", (), "cli", place.clock.now())
    ends.write_reason(place.objects, "web", 4, reason)
    assert logs.failed(place.objects, "web") == 4


def test_logs_that_are_not_there(place, calve):
    with pytest.raises(NotFoundError, match="no release of web has failed"):
        calve("logs")
    with pytest.raises(NotFoundError, match="no such object"):
        calve("logs", "7")
    with pytest.raises(UsageError, match="not a whole number"):
        calve("logs", "0")
    with pytest.raises(NotFoundError, match="nothing was kept of i-0000000000000dead"):
        calve("logs", "1", "--instance", "i-0000000000000dead")


# console


def test_a_console_is_printed_harmless_or_as_it_is(place, calve):
    place.scripts[2] = lambda _launch: fails("x", BAD, 15.0)
    place.rollout(place.release(2)).run(detach=True)
    place.until(lambda: any("lacks" in place.gateways.ec2.console(one) for one in new(place)))
    one = next(one for one in new(place) if "lacks" in place.gateways.ec2.console(one))
    text = place.gateways.ec2.console(one)
    assert calve("console", one, "--raw") == text
    assert calve("console", "web", one) == console.plain(text)
    assert calve("console", one, "--json") == {"instance": one, "text": text}
    with pytest.raises(UsageError, match="--json goes with neither"):
        calve("console", one, "--json", "--follow")
    with pytest.raises(NotFoundError):
        calve("console", "i-0000000000000dead")


def test_following_prints_everything_once_and_ends_with_the_machine(place):
    conclude(place, 1)
    place.scripts[2] = lambda _launch: fails("closure-incomplete", "lacks glibc", 30.0)
    place.rollout(place.release(2)).run(detach=True)
    place.until(lambda: new(place))
    one = new(place)[0]
    out, err = io.StringIO(), io.StringIO()
    began = place.clock.monotonic()
    console.follow(place.gateways.ec2, one, Session(out, err), place.clock, raw=True)
    assert out.getvalue() == place.gateways.ec2.console(one)
    assert "lacks glibc" in out.getvalue()
    assert err.getvalue() == f"{one} is terminated\n"
    assert place.clock.monotonic() > began + 60
    with pytest.raises(NotFoundError):
        console.follow(
            place.gateways.ec2, "i-0000000000000dead", Session(out, err), place.clock, raw=True
        )


def new(place):
    return [one.id for one in place.gateways.scaling.group("web").instances if one.version == "2"]
