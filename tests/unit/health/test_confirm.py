"""When the time of a judgement is over: what was found last decides, and what was never tried is not blamed."""

import io
import threading

import pytest

from calve.boot.console import Console
from calve.boot.policy import Policy
from calve.contract.health import Health
from calve.errors import CancelledError
from calve.health import confirm
from calve.health.confirm import Confirmation
from calve.health.probe import Probe
from calve.tasks import Cancel


class Late:
    """A probe whose only round lasts longer than there is time; then `failures` is its finding."""

    def __init__(self, failures, cancel):
        self.now, self.found = "", []
        self._failures, self._cancel = failures, cancel

    def failing(self):
        ended = threading.Event()
        self._cancel.on_cancel(ended.set)
        assert ended.wait(10)
        self.found = self._failures
        return self.found


def judged(tmp_path, monkeypatch, failures):
    monkeypatch.setattr(confirm, "Probe", lambda _h, _c, cancel: Late(failures, cancel))
    policy = Policy(keys=(), root=tmp_path, run=tmp_path)
    made = Confirmation(policy, Console(io.StringIO()), None, Health(within_s=1))
    return made._wait()


def test_a_round_in_which_all_held_is_healthy_though_the_time_is_over(tmp_path, monkeypatch):
    assert judged(tmp_path, monkeypatch, []) == []


def test_what_a_last_round_found_is_the_reason(tmp_path, monkeypatch):
    assert judged(tmp_path, monkeypatch, ["port 1: refused"]) == ["port 1: refused"]


def test_what_was_not_tried_is_not_blamed_and_what_was_found_is_kept(monkeypatch):
    cancel = Cancel()

    def slow(port):
        if port == 2:
            cancel.cancel()
        return f"port {port}: refused"

    monkeypatch.setattr("calve.health.probe._tcp", slow)
    probe = Probe(Health(tcp=(1, 2), units=("nginx.service",)), None, cancel)
    with pytest.raises(CancelledError):
        probe.failing()
    assert (probe.found, probe.now) == (["port 1: refused", "port 2: refused"], "")
