"""How boots end, well or not: reports, the last good system, health, what stage 2 is left."""

from __future__ import annotations

import json
import os
import stat

import pytest

from calve.boot import served
from calve.contract import evidence
from calve.contract.health import Health, Http
from calve.region.faults import Answer
from calve.region.message import Response
from calve.region.signature import Allow


def report(cloud, machine, release=1):
    """Read a machine's report, as an observer would."""
    with cloud.objects() as objects:
        key = f"{machine.reports}:i-1/{release:08d}.log"
        return list(evidence.read(objects.get(key, 1 << 20).decode()))


@pytest.fixture
def served_machine(cloud, one, machine):
    """A machine whose stage 2 found release 1 healthy."""
    machine.wants(one)
    assert machine.boot().code == 0
    assert machine.stage_2().code == 0
    return machine


# Reports


def test_a_failure_is_reported_with_the_whole_evidence(cloud, one, machine):
    machine.wants(one, reports=machine.reports, keys=("nobody-1",))
    boot = machine.boot()
    assert boot.fail["code"] == "key-unknown"
    assert [event.kind for event in report(cloud, machine)] == [e.kind for e in boot.events]
    assert report(cloud, machine)[-1].fields["code"] == "key-unknown"


def test_a_machine_writes_in_its_own_place_alone(cloud, one, machine):
    machine.wants(one, reports="boot-reports/AROAOTHER", keys=("nobody-1",))
    boot = machine.boot()
    assert boot.code == 1
    kinds = [event.kind for event in boot.events]
    assert kinds[-2:] == ["fail", "note"]
    assert "the report: " in boot.last.fields["message"]
    assert "AccessDenied" in boot.last.fields["message"]


def test_a_report_that_cannot_be_written_holds_up_nothing(cloud, one, machine):
    machine.wants(one, reports=machine.reports, keys=("nobody-1",))
    cloud.principals.set_policy(
        "machine", [Allow("s3:GetObject", "*"), Allow("s3:ListBucket", "*")]
    )
    boot = machine.boot()
    assert boot.code == 1
    assert [event.kind for event in boot.events][-2:] == ["fail", "note"]


def test_nobody_who_reads_reports_gets_none(cloud, one, machine):
    machine.wants(one, keys=("nobody-1",))
    machine.boot()
    assert not [
        call for call in cloud.service.calls if call.method == "PUT" and "boot-reports" in call.key
    ]


# What stage 2 is left


def test_stage_2_is_left_what_it_needs_and_nobody_else_may_read_it(cloud, one, machine):
    machine.wants(one)
    boot = machine.boot()
    run = machine.directory / "run"
    assert sorted(os.listdir(run)) == ["agent.json", "boot.log", "user-data"]
    assert (run / "user-data").read_bytes() == machine.user_data
    assert (run / "boot.log").read_text() == boot.stdout
    assert json.loads((run / "agent.json").read_text())["root"] == "/"
    assert {stat.S_IMODE((run / name).stat().st_mode) for name in os.listdir(run)} == {0o600}


@pytest.mark.parametrize(
    ("image", "line", "left"), [(True, "1", True), (False, "1", False), (True, "0", False)]
)
def test_a_login_needs_the_image_s_word_and_the_command_line_s(
    machine, one, image, line, left, monkeypatch
):
    machine.rules = {"debug": image}
    machine.line = f"calve.debug={line}"
    machine.wants(one)
    assert machine.boot().code == 0
    assert (machine.directory / "run/debug").exists() == left


# Health


def test_healthy(cloud, one, machine, web):
    machine.wants(one, reports=machine.reports, health=Health(within_s=20))
    assert machine.boot().code == 0
    with web(after=2) as (port, seen):
        done = machine.stage_2(Health(http=(Http("/healthz", port),), tcp=(port,)))
    assert done.code == 0, done.stdout + done.stderr
    assert [event.kind for event in done.events] == ["phase", "healthy"]
    assert done.last.fields == {"system": str(one.system), "as_wanted": True}
    assert seen[:3] == ["/healthz"] * 3
    assert machine.last_good() == str(one.system)
    # The report has the whole boot, the initrd's part first.
    kinds = [event.kind for event in report(cloud, machine)]
    assert (kinds[0], kinds[-1]) == ("start", "healthy")
    assert "ready" in kinds


def test_both_user_data_and_closure_have_a_say(cloud, one, machine, web):
    with web(status=500) as (port, _seen):
        machine.wants(one, health=Health(http=(Http("/theirs", port),), within_s=2))
        assert machine.boot().code == 0
        done = machine.stage_2(Health(http=(Http("/ours", port),)))
    assert done.code == 1
    assert done.last.fields["code"] == "unhealthy"
    assert done.last.fields["message"] == (
        f"GET /theirs on port {port}: 500; GET /ours on port {port}: 500"
    )
    assert machine.last_good() is None


def test_each_kind_of_check_says_what_is_wrong(cloud, one, machine, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    systemctl = tools / "systemctl"
    systemctl.write_text(
        '#!/bin/sh\n[ "$1 $2" = "is-active --" ] && [ "$3" = good.service ] && { echo active; exit 0; }\necho failed\nexit 3\n'
    )
    systemctl.chmod(0o755)
    machine.wants(one, health=Health(within_s=2))
    assert machine.boot().code == 0
    done = machine.stage_2(
        Health(tcp=(1,), units=("good.service", "bad.service"), command="echo no >&2; exit 4"),
        program=tools,
    )
    message = done.last.fields["message"]
    assert "port 1: " in message
    assert "bad.service: failed" in message
    assert "good.service" not in message
    assert "command: sh failed with 4: no" in message


def test_a_command_that_hangs_is_cut_off_when_the_time_is_over(cloud, one, machine):
    machine.wants(one, health=Health(within_s=2))
    assert machine.boot().code == 0
    done = machine.stage_2(Health(command="sleep 600"))
    assert (done.code, done.last.fields["code"]) == (1, "unhealthy")
    assert done.last.fields["message"] == "command: no answer in time"


def test_a_disk_that_cannot_be_written_ends_no_machine_that_serves(one, machine):
    machine.wants(one)
    assert machine.boot().code == 0
    (machine.root / "nix/var/calve/.health.json.new").mkdir()
    done = machine.stage_2()
    assert (done.code, done.last.kind, done.stderr) == (0, "healthy", "")
    assert "not remembered as good" in done.events[-2].fields["message"]


def test_a_disk_that_cannot_be_written_ends_a_machine_that_is_not_healthy(served_machine, cloud):
    machine, two = served_machine, cloud.release(2)
    machine.wants(two, health=Health(tcp=(1,), within_s=1))
    assert machine.boot().code == 0
    (machine.root / "nix/var/calve/.health.json.new").mkdir()
    done = machine.stage_2()
    assert (done.code, done.last.fields["code"], done.stderr) == (1, "unhealthy", "")


@pytest.mark.full
def test_a_machine_that_was_started_without_us_is_judged_by_its_closure_alone(machine):
    assert machine.stage_2().code == 0
    assert machine.last_good() is None
    done = machine.stage_2(Health(tcp=(1,), within_s=1))
    assert (done.code, done.last.fields["code"]) == (1, "unhealthy")


def test_a_damaged_health_file_is_one_line(machine, one):
    machine.wants(one)
    assert machine.boot().code == 0
    machine.directory.joinpath("run/user-data").write_bytes(b"{")
    done = machine.stage_2()
    assert (done.code, done.last.fields["code"], done.stderr) == (1, "internal", "")


# The last good system


def test_a_machine_that_has_served_goes_on_where_the_failure_may_pass(
    cloud, served_machine, one, impatient
):
    machine, two = served_machine, cloud.release(2)
    machine.wants(two, deadline_s=3, reports=machine.reports)
    cloud.faults.add(Answer(Response(503)), times=None)
    boot = machine.boot()
    assert boot.code == 0, boot.stdout
    degraded = boot.event("degraded").fields
    assert degraded["system"] == str(one.system)
    assert degraded["code"] in {"deadline", "cache-unreachable"}
    assert boot.ready["system"] == str(one.system)
    assert "release" not in boot.ready  # of another one
    assert machine.profile() == str(one.system)
    # It is known to be good; what user data asks for was not confirmed.
    done = machine.stage_2(hasty=impatient)
    assert done.last.fields.get("as_wanted", done.events[-2].fields.get("as_wanted")) is False
    assert machine.last_good() == str(one.system)


def test_without_a_network_too(served_machine, one):
    machine = served_machine
    (machine.directory / "run/no-network").write_text("no lease on eth0\n")
    boot = machine.boot()
    assert boot.code == 0
    assert boot.event("degraded").fields["message"] == "no lease on eth0"
    assert machine.profile() == str(one.system)


def test_a_new_machine_without_a_network_ends(machine, one):
    machine.wants(one)
    (machine.directory / "run").mkdir()
    (machine.directory / "run/no-network").write_text("no lease on eth0\n")
    boot = machine.boot()
    assert (boot.fail["code"], boot.fail["phase"]) == ("imds-unreachable", "network")
    assert boot.fail["message"] == "no lease on eth0"


@pytest.mark.parametrize(
    "wrong",
    [{"system": f"/nix/store/{'a' * 32}-gone", "manifest": "0" * 64}, {"keys": ("nobody-1",)}],
)
def test_what_cannot_pass_ends_a_machine_that_has_served_too(cloud, served_machine, wrong):
    two = cloud.release(2)
    served_machine.wants(two, **wrong)
    assert served_machine.boot().fail["code"] in {"closure-incomplete", "key-unknown"}


def test_what_was_unhealthy_here_is_not_started_again(cloud, served_machine, one):
    machine, two = served_machine, cloud.release(2)
    machine.others = (one,)
    machine.wants(two, health=Health(tcp=(1,), within_s=1))
    assert machine.boot().code == 0
    done = machine.stage_2()
    assert (done.code, done.last.fields["code"]) == (3, "unhealthy")  # start again
    assert served.read(machine.root).bad == two.system
    boot = machine.boot()
    assert boot.event("degraded").fields["code"] == "unhealthy"
    assert boot.ready["system"] == machine.profile() == str(one.system)
    # Whatever else user data may say later is tried.
    three = cloud.release(3)
    machine.wants(three)
    assert machine.boot().ready["system"] == str(three.system)
    assert machine.stage_2().code == 0
    assert served.read(machine.root) == served.Served(good=three.system)


def test_a_new_machine_that_is_unhealthy_ends(one, machine):
    machine.wants(one, health=Health(tcp=(1,), within_s=1))
    assert machine.boot().code == 0
    assert machine.stage_2().code == 1
    assert served.read(machine.root) == served.Served()


def test_rescue_starts_the_image_s_system_where_user_data_is_not_ours(cloud, one, machine):
    machine.wants(one)
    assert machine.boot().code == 0
    machine.rules = {"rescue": True}
    machine.user_data = b"#!/bin/sh\n"
    boot = machine.boot()
    assert boot.code == 0
    assert boot.event("degraded").fields["code"] == "userdata-foreign"
    assert boot.ready["system"] == str(one.system)
    done = machine.stage_2()
    assert (done.code, machine.last_good()) == (0, None)
