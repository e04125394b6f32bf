"""The real agent on machines that are processes, in real time: it finds what is wrong, and its release is taken back."""

import importlib.util
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from calve.fleet import ends
from calve.fleet.verdict import Outcome
from calve.rollout.run import Host

_spec = importlib.util.spec_from_file_location(
    "real_fleet", Path(__file__).parents[3] / "benchmarks/_fleet.py"
)
real = importlib.util.module_from_spec(_spec)
sys.modules["real_fleet"] = real
_spec.loader.exec_module(real)

MACHINES = 3
POLL_S = 0.5


@pytest.fixture
def agents():
    with (
        tempfile.TemporaryDirectory(dir=real.room(), prefix="calve-test-") as name,
        real.Agents(Path(name), MACHINES) as made,
    ):
        yield made


def rollbacks(agents):
    return sum(action == "RollbackInstanceRefresh" for _, action in agents.asked)


def check_taken_back(agents, verdict, old):
    """The agent itself named what is wrong, and the same machines as before are all there is."""
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert verdict.reason.rule == "release-fault"
    first = verdict.reason.failures[0]
    assert (first.code, first.phase) == ("closure-incomplete", "pull")
    assert first.instance in agents.newer()
    assert agents.failure(first.instance)["message"] == first.message
    assert "there is no such object" in first.message
    real.until(lambda: agents.is_settled(old), "the fleet to be old and well again")


@pytest.mark.full
def test_a_lost_path_is_found_by_the_agent_and_its_release_taken_back(agents):
    objects, old = agents.gateways.objects, set(agents.serving())
    assert len(old) == MACHINES
    verdict = agents.operator.deploy(agents.bad(2), agents.gateways, Host(poll_s=POLL_S))
    check_taken_back(agents, verdict, old)
    assert (verdict.by, rollbacks(agents)) == ("cli", 1)
    assert objects.head("fleets/web/lock.json") is None

    assert agents.deploy_and_die(agents.bad(3)) == -signal.SIGKILL
    assert objects.head("fleets/web/lock.json") is not None
    assert ends.read(objects, "web", 3) is None
    verdict = agents.guard(Host(by="guard", poll_s=POLL_S))
    check_taken_back(agents, verdict, old)
    assert (verdict.release, verdict.by, verdict.reason.by) == (3, "guard", "guard")
    assert rollbacks(agents) == 2
