"""Machines that are plain processes: the real agent and its stage 2, held by a hook, balanced by HAProxy."""

import base64
import contextlib
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import botocore.config
import pytest

import calve
from calve.boot.policy import Policy
from calve.contract.health import Health, Http
from calve.contract.userdata import Hook, UserData
from calve.errors import CalveError
from calve.infra.policies import policy
from calve.infra.roles import Role
from calve.infra.scope import Scope
from calve.nix import staging
from calve.region.access import Access
from calve.region.balancer import HaProxy
from calve.region.cloud import Cloud
from calve.region.group import Rules
from calve.region.imds import Imds, Instance
from calve.region.machine import Launch
from calve.region.names import ACCOUNT
from calve.region.processes import ProcessMachines, forwarded
from calve.region.server import Server
from calve.region.signature import allowed

REGION = "test-region"
IMAGE = "ami-0123456789abcdef0"
SOURCE = Path(calve.__file__).parent.parent
HEALTH = Health(http=(Http("/healthz"),), tcp=(80,), within_s=30)

_spec = importlib.util.spec_from_file_location(
    "agent_conftest", Path(__file__).parent / "agent/conftest.py"
)
agent = importlib.util.module_from_spec(_spec)
sys.modules["agent_conftest"] = agent
_spec.loader.exec_module(agent)
tmp_path = agent.tmp_path


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


# Programs that stand for the agent


class Shells:
    """Machines whose boot and stage 2 are shell scripts, by what their user data says."""

    def __init__(self, directory):
        self.machines = ProcessMachines(
            directory / "machines",
            lambda _launch: Server(lambda _request: None),
            self._program("boot"),
            self._program("system"),
            serves=lambda data: json.loads(data).get("serves", 200),
        )

    @staticmethod
    def _program(stage):
        def program(place):
            script = json.loads(place.launch.user_data).get(stage, "exit 0")
            return ["/bin/sh", "-c", f"cd {place.folder}; PORT={place.port}; {script}"]

        return program

    def launch(self, name="i-1", **scripts):
        data = json.dumps(scripts).encode()
        self.machines.launch(Launch(name, IMAGE, "t3.nano", data))
        return name

    def said(self, name="i-1"):
        return self.machines.console(name).decode().split("\n")[:-1]

    def status(self, name="i-1"):
        connection = http.client.HTTPConnection(*self.machines.address(name), timeout=5)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/")
                return connection.getresponse().status
            except ConnectionRefusedError:
                return None


@pytest.fixture
def shells(tmp_path):
    before = os.listdir("/proc/self/fd")
    made = Shells(tmp_path)
    yield made
    made.machines.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_machine_answers_once_it_has_handed_over(shells):
    name = shells.launch(
        boot="echo booting; until [ -e go ]; do sleep 0.02; done", system="echo well", serves=503
    )
    assert shells.machines.running(name)
    assert shells.status() is None
    folder = shells.machines._directory / name
    (folder / "go").touch()
    until(lambda: shells.machines.running(name) and shells.said() == ["booting", "well"])
    assert shells.status() == 503
    until(lambda: shells.machines.running(name) and not shells.machines._machines[name].process)
    assert shells.machines.running(name)


@pytest.mark.parametrize(("stage", "said"), [("boot", ["bad"]), ("system", ["bad"])])
def test_a_stage_that_fails_powers_it_off(shells, stage, said):
    name = shells.launch(**{stage: "echo bad; exit 1"})
    until(lambda: not shells.machines.running(name))
    assert shells.said() == said
    assert shells.status() is None
    assert shells.machines.address(name) is not None


def test_a_stage_2_may_have_the_machine_start_again(shells):
    name = shells.launch(boot="echo boot", system="[ -e twice ] && exit 0; touch twice; exit 3")
    until(lambda: shells.machines.running(name) and not shells.machines._machines[name].process)
    assert shells.said() == ["boot", "boot"]
    assert shells.status() == 200


def test_termination_kills_what_does_not_want_to_end(shells):
    name = shells.launch(boot="trap 'echo term' TERM; echo up; sleep 60 & wait")
    until(lambda: shells.said() == ["up"])
    process = shells.machines._machines[name].process
    shells.machines.terminate(name)
    shells.machines.terminate(name)
    assert process.returncode == -signal.SIGKILL
    assert not shells.machines.running(name)
    assert shells.machines.address(name) is None
    assert shells.said() == ["up"]


def test_a_machine_that_is_killed_is_off_and_there(shells):
    name = shells.launch(system="echo up")
    until(lambda: shells.machines.running(name) and shells.status() == 200)
    shells.machines.kill(name)
    shells.machines.kill(name)
    assert not shells.machines.running(name)
    assert shells.status() is None


def test_a_program_that_cannot_start_refuses_the_launch(shells):
    shells.machines._boot = lambda _place: ["/does/not/exist"]
    with pytest.raises(CalveError, match="cannot make a machine: No such file"):
        shells.launch()
    assert not shells.machines.running("i-1")
    shells.machines._boot = lambda _place: ["/bin/true"]
    with pytest.raises(CalveError, match="File exists"):
        shells.launch()


def test_a_stage_2_that_cannot_start_powers_it_off_and_is_told(shells):
    name = shells.launch()
    shells.machines._system = lambda _place: ["/does/not/exist"]
    until(lambda: not shells.machines.running(name))
    assert "the region:" in shells.said()[-1]


def test_health_is_asked_for_at_the_machine_s_own_port():
    data = {
        "calve": {"health": {"http": [{"path": "/"}, {"path": "/a", "port": 81}], "tcp": [80, 22]}}
    }
    moved = json.loads(forwarded(json.dumps(data).encode(), 4000))["calve"]["health"]
    assert moved["http"] == [{"path": "/", "port": 4000}, {"path": "/a", "port": 81}]
    assert moved["tcp"] == [4000, 22]
    for foreign in (
        b"",
        b"#!/bin/sh",
        b"[]",
        b'{"calve": 1}',
        b'{"calve": {"health": {"tcp": 1}}}',
    ):
        assert forwarded(foreign, 4000) == foreign


OWNER = """
import sys
from pathlib import Path
from calve.region.machine import Launch
from calve.region.names import ACCOUNT
from calve.region.processes import ProcessMachines
from calve.region.server import Server
machines = ProcessMachines(
    Path(sys.argv[1]), lambda _: Server(lambda _: None), lambda _: ["/bin/sh", "-c", "echo $$; sleep 60 & sleep 60"], lambda _: []
)
for number in range(3):
    machines.launch(Launch(f"i-{number}", "ami", "t3.nano", b""))
print("up", flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_takes_its_machines_along(tmp_path):
    logs = [tmp_path / f"i-{number}/console.log" for number in range(3)]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    ) as owner:
        assert owner.stdout.readline() == b"up\n"
        until(lambda: all(log.read_text() for log in logs))
        owner.kill()
    until(lambda: not any(Path(f"/proc/{int(log.read_text())}").exists() for log in logs))


# The agent itself


class Fleet:
    """A group of agents, whose releases are pushed to the region's S3."""

    def __init__(self, cache, directory, admin, owner):
        self.cache, self._admin = cache, admin
        self.machines = ProcessMachines(
            directory / "machines",
            self._metadata,
            self._boot,
            self._system,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE)},
        )
        owner.callback(self.machines.close)
        self.balancer = owner.enter_context(HaProxy(check_interval_s=0.2, directory=directory))
        access = Access(cache.principals, region=REGION)
        self.cloud = owner.enter_context(
            Cloud(
                self.machines,
                self.balancer,
                region=REGION,
                authenticate=access.check,
                poll_s=0.05,
                rules=Rules(launch_parallelism=2),
            )
        )
        self.cloud.add_image(IMAGE, "base")
        self.api = owner.enter_context(Server(self.cloud.handle))
        self.ec2, self.groups, self.elb = (
            self._client(owner, name) for name in ("ec2", "autoscaling", "elbv2")
        )
        scope = Scope(account=ACCOUNT, region=REGION, bucket=agent.BUCKET, group="web")
        cache.principals.set_policy("machine", allowed(policy(Role.MACHINE, scope).document))

    def _client(self, owner, service):
        client = boto3.client(
            service,
            endpoint_url=self.api.url,
            region_name=REGION,
            aws_access_key_id=self._admin.access_key,
            aws_secret_access_key=self._admin.secret_key,
            config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=20),
        )
        owner.callback(client.close)
        return client

    def _metadata(self, launch):
        expires = self.cache.clock.now() + agent.dt.timedelta(hours=6)
        session = self.cache.principals.add_session("machine", launch.instance_id, expires)
        instance = Instance(
            launch.instance_id,
            REGION,
            f"{REGION}a",
            "10.0.2.15",
            role="machine",
            user_data=lambda: launch.user_data,
            credentials=lambda: session,
        )
        return Server(Imds(instance).handle)

    def _boot(self, place):
        (place.folder / "root").mkdir(exist_ok=True)
        policy = Policy(
            keys=(self.cache.key.public.dump(),),
            root=place.folder / "root",
            imds=place.metadata,
            hold_s=0.0,
            run=place.folder / "run",
        )
        (place.folder / "policy.json").write_bytes(policy.dump())
        (place.folder / "cmdline").write_text("console=ttyS0 root=/dev/vda\n")
        stage = [place.folder / "policy.json", place.folder / "cmdline"]
        return [sys.executable, "-B", "-m", "calve.boot.main", *stage]

    @staticmethod
    def _system(place):
        (place.folder / "health.json").write_bytes(Health().dump_file())
        stage = [place.folder / name for name in ("run", "health.json", "root")]
        return [sys.executable, "-B", "-m", "calve.health.main", *stage]

    def data(self, release, **changes):
        role = self.cache.principals.role_id("machine")
        made = {
            "system": str(release.system),
            "caches": (self.cache.cache,),
            "manifest": release.manifest,
            "keys": ("test-1",),
            "fleet": "web",
            "release": release.number,
            "deadline_s": 60,
            "health": HEALTH,
            "hook": Hook("web", "calve", self.api.url),
            "reports": f"boot-reports/{role}",
            **changes,
        }
        data = base64.b64encode(UserData(**made).dump()).decode()
        return {"ImageId": IMAGE, "InstanceType": "t3.nano", "UserData": data}

    def start(self, release, size):
        made = self.ec2.create_launch_template(
            LaunchTemplateName="web", LaunchTemplateData=self.data(release)
        )
        self.template = made["LaunchTemplate"]["LaunchTemplateId"]
        group = self.elb.create_target_group(
            Name="web",
            Protocol="HTTP",
            Port=80,
            VpcId="vpc-1",
            HealthCheckIntervalSeconds=5,
            HealthyThresholdCount=2,
        )
        self.arn = group["TargetGroups"][0]["TargetGroupArn"]
        self.groups.create_auto_scaling_group(
            AutoScalingGroupName="web",
            LaunchTemplate={"LaunchTemplateId": self.template, "Version": "1"},
            MinSize=0,
            MaxSize=2 * size,
            DesiredCapacity=size,
            AvailabilityZones=[f"{REGION}a"],
            TargetGroupARNs=[self.arn],
            HealthCheckType="ELB",
            HealthCheckGracePeriod=30,
            LifecycleHookSpecificationList=[
                {
                    "LifecycleHookName": "calve",
                    "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING",
                    "HeartbeatTimeout": 180,
                }
            ],
        )

    def release(self, release, **changes):
        made = self.ec2.create_launch_template_version(
            LaunchTemplateId=self.template, LaunchTemplateData=self.data(release, **changes)
        )
        version = str(made["LaunchTemplateVersion"]["VersionNumber"])
        self.groups.start_instance_refresh(
            AutoScalingGroupName="web",
            DesiredConfiguration={
                "LaunchTemplate": {"LaunchTemplateId": self.template, "Version": version}
            },
            Preferences={
                "MinHealthyPercentage": 100,
                "MaxHealthyPercentage": 150,
                "InstanceWarmup": 0,
            },
        )

    def refresh(self):
        answer = self.groups.describe_instance_refreshes(AutoScalingGroupName="web")
        return answer["InstanceRefreshes"][0]

    def healthy(self):
        rows = self.elb.describe_target_health(TargetGroupArn=self.arn)["TargetHealthDescriptions"]
        return [one["Target"]["Id"] for one in rows if one["TargetHealth"]["State"] == "healthy"]

    def profile(self, instance_id):
        root = self.machines._directory / instance_id / "root/nix/var/nix/profiles"
        return os.readlink(root / os.readlink(root / "system"))

    def events(self, instance_id):
        console = self.machines.console(instance_id).decode()
        return list(agent.evidence.read(console))


@pytest.fixture
def fleet(service, principals, admin, clock, faults, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "sync", lambda _fd: None)
    cache = agent.Cloud(service, principals, admin, clock, faults, tmp_path / "cloud")
    with contextlib.ExitStack() as owner:
        owner.enter_context(cache.server)
        owner.enter_context(cache.store)
        yield Fleet(cache, tmp_path, admin, owner)


def test_a_release_of_real_agents_rolls_over_a_group(fleet):
    one = fleet.cache.release(1, health_units=("calve-health.service",))
    two = fleet.cache.release(2, health_units=("calve-health.service",))
    fleet.start(one, 2)
    until(lambda: len(fleet.healthy()) == 2)
    old = fleet.healthy()
    assert {fleet.profile(name) for name in old} == {str(one.system)}
    fleet.release(two)
    until(lambda: "EndTime" in fleet.refresh())
    assert fleet.refresh()["Status"] == "Successful"
    new = fleet.healthy()
    assert len(new) == 2
    assert not set(new) & set(old)
    for name in new:
        assert fleet.profile(name) == str(two.system)
        assert fleet.events(name)[-1].kind == "healthy"
        assert fleet.machines.running(name)
    assert not any(fleet.machines.running(name) for name in old)


def test_agents_that_fail_abandon_and_power_off(fleet):
    one = fleet.cache.release(1, health_units=("calve-health.service",))
    fleet.start(one, 1)
    until(lambda: len(fleet.healthy()) == 1)
    served = fleet.healthy()
    fleet.release(one, keys=("nobody-1",))

    def abandoned():
        found = fleet.groups.describe_scaling_activities(AutoScalingGroupName="web")["Activities"]
        return [one for one in found if "ABANDON" in one.get("StatusMessage", "")]

    until(abandoned)
    failed = abandoned()[-1]["Description"].split(": ")[1].split(".")[0]
    assert fleet.events(failed)[-1].fields["code"] == "key-unknown"
    until(lambda: not fleet.machines.running(failed))
    assert fleet.healthy() == served
