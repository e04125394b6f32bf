"""Disks uploaded over HTTP: what is asked and how often, whatever the network and EBS do; what is there in the end."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import uploading

import calve
from calve.errors import (
    AccessError,
    CalveError,
    CancelledError,
    ConflictError,
    DamagedError,
    DeadlineError,
    NotFoundError,
)
from calve.image import journal, sending
from calve.image import upload as uploads
from calve.image.journal import Begun, Journal
from calve.image.schedule import Limits, Schedule
from calve.progress import Note, Step
from calve.region.ebs_faults import Fail, Late, Throttle, Twice
from calve.region.faults import Answer, Delay, Lost, Silent
from calve.region.message import Response
from calve.region.signature import Allow
from calve.tasks import Cancel

SEED = int(os.environ.get("CALVE_TEST_SEED", "20261128"))
SEEDS = {index: index for index in range(9)} | {100: None, 101: "x", 2047: None}
COUNT = len(SEEDS)
ONCE = dict.fromkeys(SEEDS, 1)


def refusal(status, code, reason=""):
    document = {"__type": code, "Message": "not now", "Reason": reason}
    return Response(status, {"x-amzn-errortype": code}, json.dumps(document).encode())


def contents(seeds):
    return {index: uploading.content(seed) for index, seed in seeds.items()}


class Breaking:
    """Progress that cancels once so many blocks are done."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.cancel = Cancel()

    def __call__(self, event):
        if isinstance(event, Step) and event.done >= self.blocks << 19:
            self.cancel.cancel()


def interrupted(place, disk, blocks=5):
    """Begin an upload and end it after so many blocks; return the snapshot."""
    breaking = Breaking(blocks)
    with pytest.raises(CancelledError):
        place.run(disk, progress=breaking, cancel=breaking.cancel)
    (made,) = place.ids()
    return made


# The way of a disk


def test_the_first_upload(place):
    disk, events = place.disk(SEEDS), []
    upload = place.upload(disk, progress=events.append)
    done = upload.run()
    assert (done.blocks, done.requests) == (COUNT, COUNT)
    assert place.puts() == ONCE
    assert (place.count("start"), place.count("complete")) == (1, 1)
    assert place.held(done.id) == contents(SEEDS)  # zeros too
    found = place.snapshots.find(done.id)
    assert (found.state, found.gib, found.parent_id) == ("completed", 1, None)
    assert (found.description, found.tags) == ("calve", uploading.TAGS)
    assert not upload.journal.exists()
    steps = [event for event in events if isinstance(event, Step)]
    assert {step.total for step in steps} == {COUNT << 19}
    assert sorted(step.done for step in steps) == [n << 19 for n in range(1, COUNT + 1)]
    assert Note("sealing the snapshot") in events


def test_onto_a_parent_only_what_differs_is_sent(place):
    parent = place.parent(SEEDS)
    changes = {3: "new", 7: None, 500: "more"}
    disk = place.disk(SEEDS | changes)
    done = place.run(disk, parent)
    assert (done.blocks, done.requests) == (3, 3)
    assert place.puts() == dict.fromkeys(changes, 1)
    assert place.held(done.id) == contents(SEEDS | changes)
    assert place.snapshots.find(done.id).parent_id == parent.snapshot


def test_nothing_differs(place):
    parent = place.parent(SEEDS)
    done = place.run(place.disk(SEEDS), parent)
    assert (done.blocks, done.requests, place.puts()) == (0, 0, {})
    assert place.held(done.id) == contents(SEEDS)
    assert done.id != parent.snapshot


def test_what_is_completed_is_not_sent_again(place):
    disk = place.disk(SEEDS)
    first = place.run(disk)
    place.forget()
    again = place.run(disk)
    assert (again.id, again.requests, place.puts()) == (first.id, 0, {})
    assert (place.count("start"), place.count("complete")) == (1, 0)
    assert place.ids() == [first.id]


def test_another_disk_is_another_snapshot(place):
    first = place.run(place.disk(SEEDS))
    assert place.run(place.disk(SEEDS | {0: "other"})).id != first.id


def test_no_more_requests_are_in_flight_than_may_be(place):
    flying, most = 0, 0
    put, lock = place.ebs.put, threading.Lock()

    def counted(self, *args):
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        try:
            return put.__func__(self, *args)
        finally:
            with lock:
                flying -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(place.ebs), "put", counted)
        place.run(place.disk(SEEDS), limits=Limits(begin=2, least=1, most=3, hedge_s=1e6))
    assert 1 < most <= 3


# Interrupted


def test_after_a_cancel_it_goes_on_with_the_same_snapshot(place):
    disk = place.disk(SEEDS)
    made = interrupted(place, disk)
    assert place.state(made) == "pending"
    upload = place.upload(disk)
    taken = journal.read(upload.journal)
    assert (taken.plan, taken.region, taken.attempt) == (upload.plan.digest, "test-region", 0)
    assert (taken.snapshot, len(taken.done) >= 5) == (made, True)
    place.forget()
    done = place.run(disk)
    assert (done.id, done.blocks) == (made, COUNT)
    assert place.puts() == dict.fromkeys(set(SEEDS) - taken.done, 1)
    assert place.held(made) == contents(SEEDS)
    assert place.ids() == [made]
    assert not upload.journal.exists()


def test_a_cancel_ends_what_is_under_way(place, monkeypatch):
    monkeypatch.setattr(uploads, "_READ_S", 3600.0)
    place.faults.add(Silent(performed=False), method="PUT", times=None)
    cancel = Cancel()

    def watch():
        with place.lock:
            while sum(place.puts().values()) < 4:
                place.lock.wait(0.05)
        cancel.cancel()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(CancelledError):
        place.run(place.disk(SEEDS), cancel=cancel)
    watcher.join()
    assert sum(place.puts().values()) == 4


def test_without_its_journal_it_is_sent_anew_into_the_same_snapshot(place):
    disk = place.disk(SEEDS)
    made = interrupted(place, disk)
    journal.forget(place.upload(disk).journal)
    place.forget()
    assert place.run(disk).id == made
    assert place.puts() == ONCE


@pytest.mark.parametrize(
    "other", [{"plan": "0" * 64}, {"region": "far-region"}, {"snapshot": "snap-0123456789abcdef0"}]
)
def test_the_journal_of_another_upload_says_nothing(place, other):
    disk = place.disk(SEEDS)
    upload = place.upload(disk)
    mine = {"plan": upload.plan.digest, "region": "test-region", "snapshot": place.run(disk).id}
    place.snapshots.delete(mine["snapshot"])
    place.snapshots._tokens.clear()
    fields = mine | other
    attempt = 0 if "snapshot" in other else 3
    taken = Begun(fields["plan"], fields["region"], attempt, fields["snapshot"], frozenset(SEEDS))
    Journal.open(upload.journal, taken).close()
    place.forget()
    done = place.run(disk)
    assert place.held(done.id) == contents(SEEDS)
    assert place.puts() == ONCE
    assert place.run(disk).id == done.id  # the first token's: it is found without a journal


def test_a_journal_that_says_too_much_ends_in_error_and_the_next_run_is_right(place):
    disk = place.disk(SEEDS)
    made = interrupted(place, disk)
    upload = place.upload(disk)
    taken = journal.read(upload.journal)
    Journal.open(upload.journal, Begun(taken.plan, taken.region, 0, made, frozenset(SEEDS))).close()
    with pytest.raises(
        DamagedError, match=r"ended in error: .* blocks were written, 12 are claimed"
    ):
        place.run(disk)
    assert place.state(made) == "error"
    done = place.run(disk)
    assert done.id != made
    assert place.held(done.id) == contents(SEEDS)


@pytest.mark.parametrize("how", ["deleted", "error"])
def test_a_snapshot_that_is_gone_is_begun_anew(place, how):
    disk = place.disk(SEEDS)
    made = interrupted(place, disk)
    if how == "deleted":
        place.ec2.delete_snapshot(made)
    else:
        place.snapshots.complete(made, 99)
    place.forget()
    with place.patience(upload := place.upload(disk)):
        while how == "error" and place.state(made) != "error":
            upload.clock.wait(threading.Event(), 0.2)
        done = upload.run()
    assert done.id != made
    assert place.puts() == ONCE
    assert place.count("start") == 2
    assert place.held(done.id) == contents(SEEDS)


def test_a_snapshot_that_was_completed_and_deleted_is_begun_anew_at_once(place):
    disk = place.disk(SEEDS)
    first = place.run(disk).id
    place.ec2.delete_snapshot(first)
    place.forget()
    later = uploading.Hurry()
    later.now = lambda: dt.datetime.now(dt.UTC) + dt.timedelta(seconds=121)
    done = place.run(disk, clock=later)
    assert done.id != first
    assert (place.count("start"), place.puts()) == (2, ONCE)
    assert place.held(done.id) == contents(SEEDS)


def test_a_token_that_others_used_is_passed_over(place):
    disk = place.disk(SEEDS)
    other = interrupted(place, disk)
    done = place.run(disk, tags={"calve:line": "db"})
    assert done.id != other
    assert place.held(done.id) == contents(SEEDS)


def test_what_always_ends_in_error_is_given_up(place):
    disk = place.disk(SEEDS)
    upload = place.upload(disk)
    for attempt in range(8):
        started = place.ebs.start(
            1,
            token=upload.plan.token("test-region", attempt),
            description="calve",
            tags=uploading.TAGS,
        )
        place.snapshots.complete(started.id, 9)
    with place.patience(upload):
        while {place.state(one) for one in place.ids()} != {"error"}:
            upload.clock.wait(threading.Event(), 0.2)
        with pytest.raises(ConflictError, match="8 snapshots of this plan ended in error"):
            upload.run()
    assert place.puts() == {}


def test_interrupted_after_it_was_sealed(place):
    disk, cancel = place.disk(SEEDS), Cancel()
    place.snapshots._complete_s = 0.5

    class Ec2:
        def snapshot_state(self, snapshot):
            if place.count("complete"):
                cancel.cancel()
            return place.ec2.snapshot_state(snapshot)

    with pytest.raises(CancelledError):
        place.run(disk, cancel=cancel, ec2=Ec2())
    (made,) = place.ids()
    assert place.state(made) == "pending"
    place.forget()
    done = place.run(disk)
    assert (done.id, done.requests, place.puts()) == (made, 0, {})


def uploader(place, disk, most):
    """Start a process that uploads a disk."""
    description = place.directory / "disk.json"
    description.write_bytes(disk.dump())
    told = {
        "disk": str(description),
        "path": str(place.path),
        "ebs": place.server.url,
        "ec2": place.ec2_server.url,
        "most": most,
    }
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.path.dirname(os.path.dirname(calve.__file__)),
        "KEY": place.key.access_key,
        "SECRET": place.key.secret_key,
    }
    command = [sys.executable, uploading.__file__, json.dumps(told)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_is_survived(place, number):
    """Kill an upload twice, at a request each, and let a third come to its end."""
    chance, most = random.Random(f"{SEED} {number}"), 4
    seeds = {index: f"{number} {index}" for index in range(60)}
    disk = place.disk(seeds)
    place.faults.add(Delay(0.02), method="PUT", times=None)
    for _ in range(2):
        begun = len(place.asked)
        at = chance.randrange(1, 17)  # so that two do not come to the end
        with uploader(place, disk, most) as child:
            with place.lock:
                while len(place.asked) < begun + at and child.poll() is None:
                    place.lock.wait(0.05)
            os.kill(child.pid, signal.SIGKILL)
            _, err = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, err
        assert place.count("complete") == 0
    with uploader(place, disk, most) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    snapshot, _ = json.loads(out)
    assert place.ids() == [snapshot]
    assert place.held(snapshot) == contents(seeds)
    twice = sum(place.puts().values()) - len(seeds)
    assert twice <= 2 * most, place.puts()
    assert not list(place.directory.glob("*.upload"))


@pytest.mark.parametrize("number", range(2))
def test_killed_at_any_request(place, number):
    kill_is_survived(place, number)


@pytest.mark.full
@pytest.mark.parametrize("number", range(2, 60))
def test_killed_at_60_requests(place, number):
    kill_is_survived(place, number)


# What goes wrong on the way


@pytest.mark.parametrize("performed", [True, False])
@pytest.mark.parametrize("seeds", [SEEDS, {5: "one"}], ids=["many", "one"])
def test_a_block_that_is_never_answered_is_sent_a_second_time(place, monkeypatch, performed, seeds):
    monkeypatch.setattr(uploads, "_READ_S", 3600.0)  # nothing else ends it
    place.faults.add(Silent(performed=performed), method="PUT", path="*/blocks/5")
    done = place.run(place.disk(seeds), limits=uploading.HURRIED)
    assert place.held(done.id) == contents(seeds)
    assert place.puts()[5] == 2
    assert done.requests == sum(place.puts().values())


def test_neither_of_two_requests_is_answered(place, monkeypatch):
    monkeypatch.setattr(uploads, "_READ_S", 1.0)
    place.faults.add(Silent(performed=False), method="PUT", path="*/blocks/5", times=2)
    seeds = {5: "one", 6: "two"}
    done = place.run(place.disk(seeds), limits=uploading.HURRIED)
    assert place.held(done.id) == contents(seeds)
    assert place.puts()[5] >= 3


@pytest.mark.parametrize(
    "fault",
    [
        Answer(refusal(500, "InternalServerException")),
        Answer(refusal(503, "ServiceUnavailable")),
        Answer(refusal(503, "")),
        Answer(refusal(400, "ValidationException", "CONFLICTING_BLOCK_UPDATE")),
        Answer(refusal(400, "ValidationException", "WRITE_REQUEST_TIMEOUT")),
        Answer(refusal(400, "ValidationException", "INVALID_BLOCK")),  # garbled on its way
        Lost(performed=True),
        Lost(performed=False),
    ],
    ids=repr,
)
def test_faults_that_pass(place, fault):
    place.faults.add(fault, method="PUT", path="*/blocks/[357]", times=3)
    disk = place.disk(SEEDS)
    done = place.run(disk)
    assert place.held(done.id) == contents(SEEDS)
    assert sum(place.puts().values()) == COUNT + 3
    assert set(place.puts()) == set(SEEDS)
    assert place.ids() == [done.id]


def test_one_block_fails_many_times(place):
    place.faults.add(
        Answer(refusal(500, "InternalServerException")), method="PUT", path="*/blocks/5", times=6
    )
    done = place.run(place.disk(SEEDS))
    assert place.held(done.id) == contents(SEEDS)
    assert place.puts()[5] >= 7
    assert done.requests == sum(place.puts().values())


def test_a_fault_that_does_not_pass(place):
    place.faults.add(Answer(refusal(503, "SlowDown")), method="PUT", path="*/blocks/5", times=None)
    limits = Limits(begin=4, most=4, hedge_s=1e6, budget_s=5.0)
    with pytest.raises(
        DeadlineError, match=r"block 5 could not be sent within 5 s: .* 503 SlowDown"
    ):
        place.run(place.disk(SEEDS), limits=limits)
    assert place.count("complete") == 0


@pytest.mark.parametrize(
    "fault",
    [
        Throttle("RequestThrottledException", "RESOURCE_LEVEL_THROTTLE"),
        Throttle("RequestThrottledException", "ACCOUNT_THROTTLED"),
        Throttle("RequestThrottledException", "DEPENDENCY_REQUEST_THROTTLED"),
        Throttle("RequestThrottled", ""),
        Throttle("ThrottlingException", ""),
        Throttle("ConcurrentLimitExceededException", ""),
    ],
    ids=lambda fault: f"{fault.code} {fault.reason}",
)
def test_throttling_lowers_what_is_in_flight(place, monkeypatch, fault):
    allowed = []

    class Watched(Schedule):
        def failed(self, *args):
            super().failed(*args)
            allowed.append(self.allowed)

    monkeypatch.setattr(sending, "Schedule", Watched)
    place.service.faults.add(fault, method="PUT", path="*/blocks/[36]", times=2)
    done = place.run(place.disk(SEEDS))
    assert place.held(done.id) == contents(SEEDS)
    assert sum(place.puts().values()) == COUNT + 2
    assert len(allowed) == 2
    assert allowed[0] == 2


@pytest.mark.parametrize("what", ["start", "complete"])
@pytest.mark.parametrize("code", ["RequestThrottledException", "ThrottlingException"])
def test_throttling_of_what_is_asked_once(place, what, code):
    path = "/snapshots" if what == "start" else "*/completion/*"
    place.service.faults.add(Throttle(code, ""), method="POST", path=path, times=2)
    done = place.run(place.disk(SEEDS))
    assert place.puts() == ONCE
    assert place.count(what) == 3
    assert place.ids() == [done.id]


def test_a_snapshot_that_is_not_known_at_first(place):
    place.service.faults.add(Late(1.5), method="POST", path="/snapshots")
    done = place.run(place.disk(SEEDS))
    assert place.held(done.id) == contents(SEEDS)
    assert place.ids() == [done.id]
    assert sum(place.puts().values()) > COUNT
    assert place.count("start") == 1


def test_interrupted_while_the_snapshot_is_not_known_yet(place):
    place.service.faults.add(Late(1.0), method="POST", path="/snapshots")
    disk, cancel = place.disk(SEEDS), Cancel()

    def watch():
        with place.lock:
            while not place.puts():
                place.lock.wait(0.05)
        cancel.cancel()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(CancelledError):
        place.run(disk, cancel=cancel)
    watcher.join()
    assert place.ids() == []
    done = place.run(disk)
    assert place.held(done.id) == contents(SEEDS)
    assert place.ids() == [done.id]  # and no other is left behind
    assert place.count("start") == 2


def test_a_snapshot_that_is_gone_before_anything_was_sent(place):
    place.service.faults.add(Late(3600), method="POST", path="/snapshots")
    disk = place.disk(SEEDS)
    upload = place.upload(disk, limits=Limits(begin=4, most=4, hedge_s=1e6, unknown_s=10))
    with pytest.raises(NotFoundError):
        upload.run()
    taken = journal.read(upload.journal)
    assert (taken.attempt, taken.snapshot, taken.done) == (1, "", frozenset())
    place.forget()
    assert place.held(place.run(disk).id) == contents(SEEDS)
    assert (place.count("start"), place.puts()) == (1, ONCE)


def test_a_snapshot_that_is_never_known(place):
    place.service.faults.add(Late(3600), method="POST", path="/snapshots")
    with pytest.raises(NotFoundError, match="404 ResourceNotFoundException"):
        place.run(place.disk(SEEDS), limits=Limits(begin=4, most=4, hedge_s=1e6, unknown_s=10))
    assert place.count("complete") == 0


@pytest.mark.parametrize("what", ["start", "complete"])
@pytest.mark.parametrize(
    "fault", [Lost(performed=True), Lost(performed=False), Answer(refusal(500, ""))], ids=repr
)
def test_the_answer_of_start_or_complete_is_lost(place, what, fault):
    path = "/snapshots" if what == "start" else "*/completion/*"
    place.faults.add(fault, method="POST", path=path)
    done = place.run(place.disk(SEEDS))
    assert place.count(what) == 2
    assert place.puts() == ONCE
    assert place.ids() == [done.id]
    assert place.state(done.id) == "completed"


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "*"), ("POST", "/snapshots"), ("POST", "*/completion/*")]
)
def test_what_is_delivered_twice(place, method, path):
    place.service.faults.add(Twice(), method=method, path=path, times=None)
    done = place.run(place.disk(SEEDS))
    assert place.held(done.id) == contents(SEEDS)
    assert place.puts() == ONCE
    assert place.ids() == [done.id]


def test_complete_ends_in_error_and_the_next_run_begins_anew(place):
    place.service.faults.add(Fail("disks on fire"), method="POST", path="*/completion/*")
    disk = place.disk(SEEDS)
    with pytest.raises(DamagedError, match="the snapshot ended in error: disks on fire") as caught:
        place.run(disk)
    (failed,) = place.ids()
    assert caught.value.place == failed
    place.forget()
    done = place.run(disk)
    assert done.id != failed
    assert place.puts() == ONCE


def test_the_lost_answer_of_a_complete_that_ended_in_error(place):
    place.snapshots._complete_s = 0.0
    place.service.faults.add(Fail("disks on fire"), method="POST", path="*/completion/*")
    place.faults.add(Lost(performed=True), method="POST", path="*/completion/*")
    with pytest.raises(DamagedError, match="the snapshot ended in error: disks on fire"):
        place.run(place.disk(SEEDS))


def test_a_complete_that_is_refused_says_why(place):
    place.faults.add(
        Answer(refusal(400, "ValidationException", "INVALID_PARAMETER_VALUE")),
        method="POST",
        path="*/completion/*",
        times=None,
    )
    with pytest.raises(CalveError, match=r"400 ValidationException: not now \(INVALID_PARAMETER"):
        place.run(place.disk(SEEDS))


@pytest.mark.parametrize(
    ("action", "asked"),
    [
        ("ebs:StartSnapshot", (1, 0, 0)),
        ("ebs:PutSnapshotBlock", (1, 4, 0)),
        ("ebs:CompleteSnapshot", (1, COUNT, 1)),
    ],
)
def test_what_is_denied_ends_at_once(place, action, asked):
    others = {"ebs:StartSnapshot", "ebs:PutSnapshotBlock", "ebs:CompleteSnapshot"} - {action}
    place.principals.set_policy("admin", [Allow(one, "*") for one in others])
    with pytest.raises(AccessError, match=f"not authorized to perform: {action}"):
        place.run(place.disk(SEEDS))
    starts, puts, completes = asked
    assert (place.count("start"), place.count("complete")) == (starts, completes)
    assert sum(place.puts().values()) <= puts


@pytest.mark.parametrize("how", ["changed", "cut", "grown into a hole"])
def test_a_disk_that_was_changed_after_it_was_planned(place, how):
    disk = place.disk(SEEDS)
    block = 5 if how == "changed" else 2047
    with place.path.open("r+b") as file:
        if how == "cut":
            file.truncate((2047 << 19) + 4096)
        else:
            file.seek(block << 19)
            file.write(b"!")
    with pytest.raises(DamagedError, match=f"block {block} is not what was planned") as caught:
        place.run(disk)
    assert caught.value.place == str(place.path)
    assert place.count("complete") == 0
    (made,) = place.ids()
    assert place.state(made) == "pending"


def test_a_disk_that_is_not_there(place):
    disk = place.disk(SEEDS)
    place.path.unlink()
    with pytest.raises(CalveError, match=r"cannot be read: No such file") as caught:
        place.run(disk)
    assert caught.value.place == str(place.path)
    assert place.puts() == {}


def test_a_disk_that_cannot_be_read(place, monkeypatch):
    def fail(*_args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sending.os, "pread", fail)
    with pytest.raises(CalveError, match=r"cannot be read: Input/output error"):
        place.run(place.disk(SEEDS))
    assert place.count("complete") == 0


def test_a_snapshot_that_never_completes(place, monkeypatch):
    place.snapshots._complete_s = 3600.0
    monkeypatch.setattr(uploading.Hurry, "TIMES", 500)
    with pytest.raises(DeadlineError, match="the snapshot is not completed after 600 s"):
        place.run(place.disk(SEEDS))
