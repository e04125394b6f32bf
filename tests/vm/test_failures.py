"""The failure table in real machines: each row ends with its code on the console, its report, and its hook abandoned.

A machine is launched by a group of its own, whose launch hook holds it. Rows are played some at a time, and those
alone that were chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest

from calve.aws.autoscaling import AutoScaling, Hook
from calve.aws.ec2 import Ec2
from calve.cache.push import push
from calve.contract import evidence
from calve.contract.health import Health
from calve.contract.userdata import Hook as UserHook
from calve.demo.imports import Importer, temporary
from calve.demo.system import Boot, System, add_toplevel
from calve.errors import NotFoundError
from calve.nix.signing import SecretKey
from calve.process import run, which
from calve.region import qemu
from calve.region.faults import Answer, FaultPlan, Reset, Stall
from calve.region.message import Response

HOOK = "calve-launch"
ABANDONED = "was abandoned: Lifecycle Action Completed with ABANDON Result"
CONSOLE_BYTES = 4096
AT_ONCE = 3
ROW_S = 400
SLOW_DOWN = Response(503, {}, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
DENIED = Response(403, {}, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
CARD = "virtio-net-pci,netdev=net,romfile="
UNHEALTHY = Health(tcp=(1,), within_s=2)
NOBODY = "http://169.254.169.248"  # QEMU forwards no such address


@dataclasses.dataclass(frozen=True)
class Row:
    """How a row is brought about, and who is told.

    Attributes:
        code: of the failure; `phase` is where it strikes, `words` stand in its message.
        arrange: called with the rig and the row's release; returns what user data says otherwise.
        build: makes that release, of a number of its own.
        image: options of `Rig.image`.
        metadata: faults of the metadata service, as (fault, path, times).
        argv: changes QEMU's arguments.
        reported: the machine can write its report.
        abandoned: and end its hook.
        group: begins with "web" where the role may do so.
    """

    name: str
    code: str
    phase: str
    words: str = ""
    arrange: Callable[[Any, Any], dict] = lambda _rig, _path: {}
    build: Callable[[Any, int], Any] = lambda rig, number: rig.release("tiny", number)
    image: Callable[[Any], dict] = lambda _rig: {}
    metadata: tuple = ()
    argv: Callable[[list], list] = lambda argv: argv
    reported: bool = True
    abandoned: bool = True
    group: str = "web"


# Releases


def www(rig, path):
    """Return the path of a release that no other has, and the key of its NAR."""
    with rig.workshop.store() as store:
        info = next(one for one in store.closure([path]) if one.path.name.startswith("www"))
    text = rig.cache.get(f"{info.path.digest}.narinfo", 1 << 16).decode()
    return info.path, next(line.split()[1] for line in text.splitlines() if line.startswith("URL"))


def many_files(rig, _number):
    """Build a system that has more files than its bytes lead one to expect."""
    with rig.workshop.store() as store:
        importer = Importer(store)
        with temporary(store) as work:
            tree = work / "many"
            tree.mkdir()
            for number in range(7000):
                (tree / str(number)).touch()
            many = importer.add(tree, "many")
        system = System(name="many", release=1, links={"many": many})
        path = add_toplevel(importer, system, "#!/bin/sh\n", Boot(rig.workshop.kernel()))
        importer.flush()
        rig.manifests[path] = push(store, [path], rig.cache, rig.workshop.key()).manifests[path]
    return path


def impostor(rig, number):
    """Build a release that is signed by another key of the right name."""
    with rig.workshop.store() as store:
        path = rig.workshop.system(store, "tiny", number)
        key = SecretKey.generate(rig.workshop.key().name)
        rig.manifests[path] = push(store, [path], rig.cache, key).manifests[path]
    return path


def webserver(rig, _number):
    return rig.release("webserver", 1)


def seeded(rig):
    return {"disk": rig.seeded_disk()}


# What is arranged


def stalls(rig, path):
    rig.world.s3.faults.add(Stall(), path=f"*/{www(rig, path)[1]}", times=None)
    return {"deadline_s": 30}


def fails(rig, path):
    rig.world.s3.faults.add(Answer(SLOW_DOWN), path=f"*/{www(rig, path)[1]}", times=None)
    return {}


def passes(rig, path):
    """What may pass, all of it in one boot."""
    nar = f"*/{www(rig, path)[1]}"
    plan = rig.world.s3.faults
    plan.add(Answer(SLOW_DOWN), path=f"*/manifests/{rig.manifests[path]}*", method="GET", times=2)
    plan.add(Answer(SLOW_DOWN), path=nar, times=2)
    plan.add(Reset(20), path=nar, times=2)
    plan.add(Stall(20), path=nar, times=1)
    return {}


def denies(rig, path):
    for name in (f"*/manifests/{rig.manifests[path]}*", f"*/{path.digest}.narinfo"):
        rig.world.s3.faults.add(Answer(DENIED), path=name, times=None)
    return {"deadline_s": 15}


def lacks(rig, path):
    missing, nar = www(rig, path)
    rig.cache.delete(nar)
    rig.cache.delete(f"{missing.digest}.narinfo")
    return {}


def cuts(rig, path):
    _, nar = www(rig, path)
    rig.cache.put(nar, rig.cache.get(nar, 1 << 20)[:-10])
    return {}


def alters(rig, path):
    _, nar = www(rig, path)
    data = bytearray(rig.cache.get(nar, 1 << 20))
    data[len(data) // 2] ^= 1
    rig.cache.put(nar, bytes(data))
    return {}


def no_card(argv):
    at = argv.index(CARD)
    return argv[: at - 1] + argv[at + 1 :]


def no_cable(argv):
    return [one if one != CARD else "virtio-net-pci,romfile=" for one in argv]


ROWS = (
    Row("no-lease", "imds-unreachable", "network", "no lease on", argv=no_cable,
        reported=False, abandoned=False),
    Row("disk-full", "disk-small", "pull", build=many_files,
        image=lambda rig: {"disk": rig.workshop.disk(48 << 20)}),
    Row("stall", "deadline", "pull", "30 s", arrange=stalls),
    Row("unhealthy", "unhealthy", "health", "port 1", build=webserver, image=seeded,
        arrange=lambda *_: {"health": UNHEALTHY}),
)  # fmt: skip
MORE = (
    Row("no-card", "imds-unreachable", "network", "no network card", argv=no_card,
        reported=False, abandoned=False),
    Row("no-disk", "disk-fault", "network", "/dev/vdz",
        image=lambda _: {"command_line": "root=/dev/vdz"}, reported=False, abandoned=False),
    Row("imds-fails", "imds-unreachable", "imds", metadata=((Answer(Response(500)), "*", None),),
        reported=False, abandoned=False),
    Row("imds-off", "imds-denied", "imds", metadata=((Answer(Response(403)), "*", None),),
        reported=False, abandoned=False),
    Row("what-passes", "health-missing", "commit", arrange=passes,
        metadata=((Answer(Response(503)), "*", 2), (Answer(Response(401)), "*/user-data", 1),
                  (Answer(Response(404)), "*/iam/security-credentials/*", 3)),
        argv=lambda argv: [*argv, "-rtc", "base=2020-01-01T00:00:00"]),
    Row("key", "key-unknown", "manifest", "nobody-1", arrange=lambda *_: {"keys": ("nobody-1",)}),
    Row("signature", "signature", "manifest", build=impostor),
    Row("denied", "cache-denied", "manifest", "denied or missing", arrange=denies),
    Row("unreachable", "cache-unreachable", "pull", arrange=fails),
    Row("path-missing", "closure-incomplete", "pull", "nar/", arrange=lacks),
    Row("nar-cut", "nar-damaged", "pull", "-www", arrange=cuts),
    Row("nar-altered", "nar-damaged", "pull", "-www", arrange=alters),
    Row("disk-small", "disk-small", "manifest", "MB of disk",
        image=lambda rig: {"disk": rig.workshop.disk(16 << 20)}),
    Row("memory-small", "memory-small", "manifest", "MB of memory",
        image=lambda _: {"command_line": "mem=140M"}),
    Row("hook-denied", "hook-denied", "health", "CompleteLifecycleAction", build=webserver,
        image=seeded, abandoned=False, group="other"),
    Row("hook-unreachable", "hook-unreachable", "health", build=webserver, image=seeded,
        arrange=lambda rig, _: {"hook": UserHook("web-hook-unreachable", HOOK, NOBODY)},
        abandoned=False),
)  # fmt: skip
PARAMETERS = [
    *(pytest.param(row, id=row.name) for row in ROWS),
    *(pytest.param(row, id=row.name, marks=pytest.mark.full) for row in MORE),
]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a machine ended.

    Attributes:
        status: QEMU's exit status; None where it had to be ended.
        console: all that it said.
        report: in the bucket; None for none.
        activity: of its launch, by its group.
        others: the group's instances, once the activity is over.
        profile: what the disk has of profiles.
        damage: what is wrong with its file system.
    """

    name: str
    status: int | None
    console: bytes
    report: str | None
    activity: Any
    others: list[str]
    profile: str
    damage: str


@dataclasses.dataclass
class Started:
    """A row that is being played: its group, the machine's name, and when it was launched."""

    row: Row
    group: str
    name: str
    begun_s: float


class Fleets:
    """Starts a machine in a group of its own, and finds out how it ended."""

    def __init__(self, rig, monkeypatch):
        self.rig = rig
        self.statuses = {}  # of machines that ended by themselves: QEMU's exit status
        self.plans = {}
        self._rows = {}
        self._numbers = iter(range(900, 1000))
        session = rig.world.session
        self._groups, self._ec2 = AutoScaling(session), Ec2(session)
        machines = rig.world.machines
        self._terminate, self._metadata = machines.terminate, machines._metadata
        self._process = qemu.Process
        monkeypatch.setattr(machines, "terminate", self._end)
        monkeypatch.setattr(machines, "_metadata", self._faulty)
        monkeypatch.setattr(qemu, "Process", self._rewired)
        monkeypatch.setattr(rig.world.s3, "faults", FaultPlan())

    def close(self):
        for one in (self._groups, self._ec2):
            one._client.close()

    # What the region does otherwise

    def _end(self, name):
        """Let a machine that has failed power off, as EC2 asks it to before it ends it."""
        machines = self.rig.world.machines
        end_s = time.monotonic() + 60
        if b'"e":"fail"' in machines.console(name):
            while machines.running(name) and time.monotonic() < end_s:
                time.sleep(0.05)
        self.statuses.setdefault(name, machines.ended().get(name))
        self._terminate(name)

    def _faulty(self, launch):
        server = self._metadata(launch)
        server.faults = self.plans.get(launch.image_id)
        return server

    def _rewired(self, argv, **options):
        line = next((one for one in argv if isinstance(one, str) and "test.row=" in one), None)
        if line is not None:
            argv = self._rows[line.partition("test.row=")[2]].argv(list(argv))
        return self._process(argv, **options)

    # Machines

    def start(self, row):
        rig, number = self.rig, next(self._numbers)
        path = row.build(rig, number)
        group, image_id = f"{row.group}-{row.name}", f"ami-{number:017x}"
        self._rows[row.name] = row
        self.plans[image_id] = plan = FaultPlan()
        for fault, where, times in row.metadata:
            plan.add(fault, path=where, times=times)
        options = row.image(rig)
        line = f"{options.pop('command_line', '')} test.row={row.name}"
        rig.world.add_image(image_id, row.name, rig.image(command_line=line, **options))
        told = {
            "hook": UserHook(group, HOOK, rig.world.machine_api),
            "reports": rig.world.machine_reports,
        }
        template = self._ec2.create_template(
            group,
            image_id=image_id,
            instance_type="t3.nano",
            user_data=rig.user_data(path, **{**told, **row.arrange(rig, path)}),
            description=row.name,
        )
        self._groups.create_group(
            group, template_id=template.id, version=1, size=(0, 1, 1), hooks=[Hook(HOOK)]
        )
        until(lambda: self._groups.group(group).instances)
        return Started(row, group, self._groups.group(group).instances[0].id, time.monotonic())

    def is_over(self, one):
        late = time.monotonic() > one.begun_s + ROW_S
        return late or one.name in self.statuses or one.name in self.rig.world.machines.ended()

    def end(self, one):
        """Return how it ended; its group goes with all that it has launched since."""
        machines = self.rig.world.machines
        if one.row.abandoned:
            until(lambda: self._activity(one).status == "Cancelled" and self._others(one))
        status = self.statuses.get(one.name, machines.ended().get(one.name))
        activity, others = self._activity(one), self._others(one)
        self._groups.delete_group(one.group, force=True)
        return Ended(
            one.name,
            status,
            machines.console(one.name),
            self._report(one.name),
            activity,
            others,
            *examined(self.rig.disk_of(one.name)),
        )

    def _others(self, one):
        return [each.id for each in self._groups.group(one.group).instances if each.id != one.name]

    def _activity(self, one):
        return next(
            each
            for each in self._groups.activities(one.group)
            if one.name in each.description and "Launching" in each.description
        )

    def _report(self, name):
        key = f"{self.rig.world.machine_reports}:{name}/00000001.log"
        try:
            return self.rig.cache.get(key, 1 << 20).decode()
        except NotFoundError:
            return None


def examined(disk):
    """Return what a disk has of profiles, and what is wrong with its file system."""
    debugfs, e2fsck = (which(name, package="e2fsprogs") for name in ("debugfs", "e2fsck"))
    shown = run([debugfs, "-R", "ls -p /nix/var/nix/profiles", disk])
    checked = run([e2fsck, "-f", "-n", disk], check=False)
    return shown.stdout.decode(), checked.stdout.decode() if checked.returncode else ""


def until(condition, within_s=30):
    """Wait for it; whoever looks finds out whether it came about."""
    end_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.1)


def play(fleets, rows):
    """Play rows, some at a time; return how each ended, by name."""
    waiting, running, ended = list(rows), [], {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append(fleets.start(waiting.pop(0)))
        for one in [one for one in running if fleets.is_over(one)]:
            running.remove(one)
            ended[one.row.name] = fleets.end(one)
        time.sleep(0.1)
    return ended


@pytest.fixture(scope="module")
def fleets(rig):
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as owner:
        made = Fleets(rig, monkeypatch)
        owner.callback(made.close)
        yield made


@pytest.fixture(scope="module")
def ended(request, fleets):
    """Play the rows that were chosen."""
    items = [one for one in request.session.items if getattr(one, "function", None) is test_a_row]
    return play(fleets, [one.callspec.params["row"] for one in items])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", PARAMETERS)
def test_a_row(row, ended):
    end = ended[row.name]
    text = end.console.decode("utf-8", "replace")
    events = list(evidence.read(text))
    kinds = [event.kind for event in events]
    assert kinds.count("fail") == 1, text[-3000:]
    fail = events[kinds.index("fail")].fields
    assert (fail["code"], fail["phase"]) == (row.code, row.phase), text[-3000:]
    assert row.words in fail["message"]
    # It is the last word but for what could not be told, and where EC2 shows it.
    assert set(kinds[kinds.index("fail") + 1 :]) <= {"note"}
    assert b'"e":"fail"' in end.console[-CONSOLE_BYTES:]
    assert end.status == 0, "it did not power off by itself"
    assert end.damage == ""
    if row.phase != "health":
        assert "system" not in end.profile
    reported = [] if end.report is None else [e.kind for e in evidence.read(end.report)]
    assert (reported[-1:] == ["fail"]) == row.reported
    if row.abandoned:
        assert end.activity.status == "Cancelled"
        assert ABANDONED in end.activity.message
        assert len(end.others) == 1
        assert "note" not in kinds
    else:
        assert end.activity.status not in {"Cancelled", "Successful"}
        assert end.others == []


@pytest.mark.full
def test_each_fault_that_may_pass_was_met(ended, fleets, rig):
    for plan in (rig.world.s3.faults, *fleets.plans.values()):
        assert [rule for rule in plan._rules if rule.times] == []
