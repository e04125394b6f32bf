"""A machine that has served: two boots of one disk."""

from __future__ import annotations

import pytest

from calve.region.faults import Answer, FaultPlan
from calve.region.message import Response

SLOW_DOWN = Response(503, {}, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_machine_that_has_served_goes_on_where_s3_is_down(rig, monkeypatch):
    one, two = rig.release("webserver", 1), rig.release("webserver", 2)
    with rig.boot(rig.user_data(one), disk=rig.seeded_disk()) as first:
        assert first.told("healthy")["as_wanted"] is True
    plan = FaultPlan().add(Answer(SLOW_DOWN), times=None)
    monkeypatch.setattr(rig.world.s3, "faults", plan)
    with rig.boot(rig.user_data(two, deadline_s=20), disk=first.disk) as boot:
        healthy = boot.told("healthy")
        status, page = boot.get()
    assert plan.injected > 0
    degraded = boot.event("degraded")
    assert degraded["code"] in {"cache-unreachable", "deadline"}
    assert degraded["system"] == str(one)
    assert healthy == {"system": str(one), "as_wanted": False}
    assert (status, "calve demo release 1" in page) == (200, True)
    assert "fail" not in [event.kind for event in boot.events]
