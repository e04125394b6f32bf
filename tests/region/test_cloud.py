"""boto3 and Calve's gateways against the region: real HTTP, real HAProxy, machines that are threads."""

import base64
import http.client
import http.server
import threading
import time
from dataclasses import dataclass, field

import pytest

from calve.aws.autoscaling import AutoScaling
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.refreshes import Preferences, Refreshes
from calve.aws.session import Session, actions_of
from calve.errors import (
    AccessError,
    CalveError,
    ConflictError,
    NotFoundError,
    TransientError,
    UsageError,
)
from calve.region.access import Access
from calve.region.balancer import HaProxy
from calve.region.cloud import Cloud
from calve.region.group import Rules
from calve.region.server import Server
from calve.region.signature import Principals, Refusal
from calve.transport.credentials import Credentials

IMAGE = "ami-0123456789abcdef0"
KEYS = Credentials("AKIDEXAMPLE", "secret", "token")


class _Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        machine = self.server.machine
        code, body = 200, machine.launch.user_data
        if self.path == "/healthz":
            code = 200 if machine.booted() else 503
        elif machine.slow_s:
            machine.cut.wait(machine.slow_s)
        if machine.cut.is_set():  # power is off: what was under way is lost
            self.close_connection = True
            return
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class _Site(http.server.ThreadingHTTPServer):
    daemon_threads = False
    machine = None

    def handle_error(self, request, client_address):
        pass


class Machine:
    def __init__(self, launch, boot_s, slow_s):
        self.launch, self.boot_s, self.slow_s = launch, boot_s, slow_s
        self.began = time.monotonic()
        self.cut = threading.Event()
        self.site = _Site(("127.0.0.1", 0), _Page)
        self.site.machine = self
        self.thread = threading.Thread(target=self.site.serve_forever, args=(0.02,))
        self.thread.start()

    def booted(self):
        return self.boot_s is not None and time.monotonic() >= self.began + self.boot_s

    def off(self):
        if not self.cut.is_set():
            self.cut.set()
            self.site.shutdown()
            self.thread.join()
            self.site.server_close()


@dataclass
class FakeMachines:
    """Machines by user data: b"never…" never gets healthy, b"refuse…" cannot be launched."""

    boot_s: float = 0.4
    slow_s: float = 0.0
    made: dict = field(default_factory=dict)
    most_booting: int = 0
    story: list = field(default_factory=list)

    def launch(self, launch):
        if launch.user_data.startswith(b"refuse"):
            raise CalveError("no room on this host")
        boot_s = None if launch.user_data.startswith(b"never") else self.boot_s
        self.made[launch.instance_id] = Machine(launch, boot_s, self.slow_s)
        self.story.append(("launch", launch.user_data))
        booting = [one for one in list(self.made.values()) if self._boots(one)]
        self.most_booting = max(self.most_booting, len(booting))

    @staticmethod
    def _boots(machine):
        return not machine.booted() and not machine.cut.is_set()

    def address(self, instance_id):
        machine = self.made.get(instance_id)
        return None if machine is None else machine.site.server_address

    def running(self, instance_id):
        machine = self.made.get(instance_id)
        return machine is not None and not machine.cut.is_set()

    def console(self, instance_id):
        return b"x" * 70_000 + b"\nlogin: " + self.made[instance_id].launch.user_data

    def terminate(self, instance_id):
        if self.running(instance_id):
            self.story.append(("terminate", self.made[instance_id].launch.user_data))
            self.made[instance_id].off()

    def close(self):
        for machine in self.made.values():
            machine.off()


class Place:
    """A region with its gateways."""

    def __init__(self, machines, balancer, cloud, url):
        self.machines, self.balancer, self.cloud = machines, balancer, cloud
        session = Session("eu-central-1", url, credentials=KEYS)
        self.ec2, self.groups, self.elb = Ec2(session), AutoScaling(session), Elb(session)
        self.refreshes = Refreshes(session)
        self.raw = {
            "ec2": self.ec2._client,
            "autoscaling": self.groups._client,
            "elbv2": self.elb._client,
        }

    def close(self):
        for client in self.raw.values():
            client.close()

    def fleet(self, user_data=b"release 1", size=(0, 2, 2), delay_s=20):
        template = self.ec2.create_template(
            "web", image_id=IMAGE, instance_type="t3.nano", user_data=user_data, description="r1"
        )
        arn = self.elb.create_target_group("web", path="/healthz", delay_s=delay_s).arn
        self.groups.create_group(
            "web", template_id=template.id, version=1, size=size, target_groups=[arn], grace_s=20
        )
        return template, arn

    def healthy(self, arn):
        return [one.id for one in self.elb.health(arn) if one.state == "healthy"]

    def release(self, template, user_data, **preferences):
        version = self.ec2.create_version(
            template.id, source=1, description=user_data.decode(), user_data=user_data
        )
        self.refreshes.start(
            "web",
            template_id=template.id,
            version=version.number,
            preferences=Preferences(**preferences),
        )
        return version


@pytest.fixture
def place(request):
    options = dict(getattr(request, "param", {}))
    machines = FakeMachines(slow_s=options.pop("slow_s", 0.0))
    threads = threading.active_count()
    options.setdefault("poll_s", 0.05)
    try:
        with (
            HaProxy(check_interval_s=0.1) as balancer,
            Cloud(machines, balancer, **options) as cloud,
            Server(cloud.handle) as server,
        ):
            cloud.add_image(IMAGE, "base")
            one = Place(machines, balancer, cloud, server.url)
            try:
                yield one
            finally:
                one.close()
    finally:
        machines.close()
    assert threading.active_count() == threads


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


class Load:
    """Clients, one on a kept connection, one on fresh ones; nothing is retried."""

    def __init__(self, address, threads=4, path="/"):
        self.address, self.path = address, path
        self.answers = []
        self.failed = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number % 2 == 0,)) for number in range(threads)
        ]

    def _run(self, keeps):
        client = http.client.HTTPConnection(*self.address, timeout=5)
        while not self._stop.wait(0.02):
            try:
                client.request("GET", self.path)
                answer = client.getresponse()
                body = answer.read()
                (self.answers if answer.status == 200 else self.failed).append(body)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                client.close()
            if not keeps:
                client.close()
        client.close()

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def finished(place):
    (found,) = place.refreshes.newest("web")
    return not found.active


# The fleet of two


@pytest.mark.parametrize("place", [{"slow_s": 0.3}], indirect=True)
def test_a_release_of_two_fails_no_request(place):
    template, arn = place.fleet()
    until(lambda: len(place.healthy(arn)) == 2)
    old = set(place.healthy(arn))
    with Load(place.balancer.address) as load:
        until(lambda: len(load.answers) > 10)
        version = place.release(template, b"release 2")
        healthy = []
        until(lambda: healthy.append(len(place.healthy(arn))) or finished(place))
        until(lambda: load.answers[-8:] == [b"release 2"] * 8)
    assert load.failed == []
    assert min(healthy) >= 2
    assert set(load.answers) == {b"release 1", b"release 2"}
    (refresh,) = place.refreshes.newest("web")
    assert (refresh.status, refresh.percent, refresh.remaining) == ("Successful", 100, 0)
    group = place.groups.group("web")
    assert group.version == str(version.number) == "2"
    assert [(one.version, one.lifecycle) for one in group.instances] == [("2", "InService")] * 2
    assert {one.state for one in place.ec2.instances(old)} == {"terminated"}
    assert set(place.healthy(arn)) == {one.id for one in group.instances}
    assert place.machines.most_booting == 2  # the first two at once, then one at a time
    replaced = place.machines.story[2:]
    assert replaced[0] == ("launch", b"release 2")
    assert [what for what, _ in replaced].count("terminate") == 2
    texts = [one.cause for one in place.groups.activities("web")]
    assert sum("in response to an instance refresh" in text for text in texts) == 4


@pytest.mark.parametrize("place", [{"slow_s": 0.5, "draining": False}], indirect=True)
def test_without_draining_requests_fail(place):
    template, arn = place.fleet()
    until(lambda: len(place.healthy(arn)) == 2)
    with Load(place.balancer.address) as load:
        until(lambda: len(load.answers) > 4)
        # No request may be under way at a machine's end, if that is luck: several releases have none.
        for number in range(2, 7):
            place.release(template, b"release %d" % number)
            until(lambda: finished(place))
            if load.failed:
                break
    assert load.failed


def test_a_release_that_never_answers_is_cancelled_and_costs_nothing(place):
    template, arn = place.fleet()
    until(lambda: len(place.healthy(arn)) == 2)
    with Load(place.balancer.address) as load:
        place.release(template, b"never")
        until(lambda: len(place.machines.made) == 3)
        with pytest.raises(ConflictError, match="InstanceRefreshInProgress"):
            place.release(template, b"release 3")
        states = {one.state for one in place.elb.health(arn)}
        assert states <= {"healthy", "initial", "unhealthy"}
        place.refreshes.cancel("web")
        until(lambda: finished(place))
        until(lambda: len(place.groups.group("web").instances) == 2)
    assert load.failed == []
    assert place.refreshes.newest("web")[0].status == "Cancelled"
    assert place.groups.group("web").version == "1"
    assert {one.version for one in place.groups.group("web").instances} == {"1"}
    with pytest.raises(NotFoundError, match="ActiveInstanceRefreshNotFound"):
        place.refreshes.cancel("web")


def test_what_powers_off_or_is_terminated_is_replaced(place):
    _template, arn = place.fleet()
    until(lambda: len(place.healthy(arn)) == 2)
    first, second = place.healthy(arn)
    place.machines.made[first].off()
    until(lambda: place.ec2.instances([first])[0].state == "terminated")
    place.ec2.terminate([second])
    until(lambda: len(set(place.healthy(arn)) - {first, second}) == 2)
    assert len(place.machines.made) == 4
    rows = place.raw["elbv2"].describe_target_health(TargetGroupArn=arn, Targets=[{"Id": first}])
    assert rows["TargetHealthDescriptions"][0]["TargetHealth"]["Reason"] == "Target.NotRegistered"


@pytest.mark.parametrize("place", [{"rules": Rules(retry_s=0.1)}], indirect=True)
def test_a_host_without_room_is_told_in_the_activities(place):
    place.fleet(b"refuse", size=(0, 1, 1))
    until(lambda: len(place.groups.activities("web")) >= 2)
    failed = [one for one in place.groups.activities("web") if one.status == "Failed"]
    assert failed[0].message == "no room on this host. Launching EC2 instance failed."
    assert place.machines.made == {}


def test_deleting_a_group(place):
    _template, arn = place.fleet()
    until(lambda: len(place.healthy(arn)) == 2)
    with pytest.raises(ConflictError, match="ResourceInUse"):
        place.groups.delete_group("web")
    place.groups.delete_group("web", force=True)

    def gone():
        try:
            place.groups.group("web")
        except NotFoundError:
            return True
        return False

    until(gone)
    assert place.elb.health(arn) == ()
    assert not any(place.machines.running(one) for one in place.machines.made)


def test_capacity_can_be_set_within_the_bounds(place):
    place.fleet(size=(1, 1, 3))
    raw = place.raw["autoscaling"]
    raw.set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=3)
    until(lambda: len(place.groups.group("web").instances) == 3)
    with pytest.raises(raw.exceptions.ClientError, match="above max value 3"):
        raw.set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=99)
    raw.update_auto_scaling_group(AutoScalingGroupName="web", MaxSize=1)
    until(lambda: len(place.groups.group("web").instances) == 1)
    assert place.groups.group("web").desired == 1
    found = raw.describe_auto_scaling_instances()["AutoScalingInstances"]
    assert [(one["AutoScalingGroupName"], one["HealthStatus"]) for one in found] == [
        ("web", "HEALTHY")
    ]


# Launch templates, instances, images


def test_versions_merge_shallowly_from_their_source(place):
    raw = place.raw["ec2"]
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "a", "Value": "1"}]}]
    made = raw.create_launch_template(
        LaunchTemplateName="web",
        LaunchTemplateData={
            "ImageId": IMAGE,
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
            "TagSpecifications": tags,
            "UserData": base64.b64encode(b"one").decode(),
        },
    )["LaunchTemplate"]
    template_id = made["LaunchTemplateId"]
    raw.create_launch_template_version(
        LaunchTemplateId=template_id,
        SourceVersion="1",
        LaunchTemplateData={"MetadataOptions": {"HttpTokens": "optional"}},
    )
    data = raw.describe_launch_template_versions(
        LaunchTemplateName="web", Versions=["$Latest", "$Default"]
    )["LaunchTemplateVersions"]
    assert [one["VersionNumber"] for one in data] == [2, 1]
    second = data[0]["LaunchTemplateData"]
    assert second["MetadataOptions"] == {"HttpTokens": "optional"}
    assert second["TagSpecifications"] == tags
    assert second["UserData"] == base64.b64encode(b"one").decode()
    raw.create_launch_template_version(
        LaunchTemplateId=template_id, LaunchTemplateData={"ImageId": IMAGE}
    )
    third = place.ec2.version(template_id, "$Latest")
    assert (third.number, third.user_data) == (3, b"")


def test_a_client_token_gives_the_same_version_again(place):
    template = place.ec2.create_template(
        "web", image_id=IMAGE, instance_type="t3.nano", user_data=b"1", token="t0"
    )
    again = place.ec2.create_template(
        "web", image_id=IMAGE, instance_type="t3.nano", user_data=b"1", token="t0"
    )
    assert template == again
    made = [
        place.ec2.create_version(template.id, source=1, description="r2", user_data=b"2", token="t")
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert (made[0].number, made[0].user_data, made[0].image_id) == (2, b"2", IMAGE)
    with pytest.raises(ConflictError, match="IdempotentParameterMismatch"):
        place.ec2.create_version(template.id, source=1, description="r3", user_data=b"2", token="t")
    assert place.ec2.find_version(template.id, "r2") == made[0]
    assert place.ec2.find_version(template.id, "r9") is None
    assert place.ec2.template("web").latest_version == 2


def test_limits_of_launch_templates(place):
    template = place.ec2.create_template(
        "web", image_id=IMAGE, instance_type="t3.nano", user_data=b"x" * 16384
    )
    with pytest.raises(UsageError, match="16384 at most"):
        place.ec2.create_version(template.id, source=1, description="", user_data=b"x" * 16385)
    create = place.raw["ec2"].create_launch_template_version
    error = place.raw["ec2"].exceptions.ClientError
    for data, description, code in [
        ({"UserData": base64.b64encode(b"x" * 16385).decode()}, "d", "InvalidParameterValue"),
        ({"UserData": "no base64!"}, "d", "InvalidUserData.Malformed"),
        ({"ImageId": IMAGE}, "d" * 256, "InvalidParameterValue"),
    ]:
        with pytest.raises(error) as caught:
            create(
                LaunchTemplateId=template.id,
                LaunchTemplateData=data,
                VersionDescription=description,
            )
        assert caught.value.response["Error"]["Code"] == code
    assert place.ec2.template("web").latest_version == 1


def test_consoles_and_images(place):
    _template, arn = place.fleet(size=(0, 1, 1))
    until(lambda: len(place.healthy(arn)) == 1)
    (instance_id,) = place.healthy(arn)
    console = place.ec2.console(instance_id)
    assert len(console) == 65536
    assert console.endswith("login: release 1")
    instance = place.ec2.instances([instance_id])[0]
    assert (instance.state, instance.image_id) == ("running", IMAGE)
    images = place.raw["ec2"].describe_images(Owners=["self"])["Images"]
    assert [(one["ImageId"], one["Name"]) for one in images] == [(IMAGE, "base")]
    tags = place.raw["ec2"].describe_instances(
        Filters=[{"Name": "tag:aws:autoscaling:groupName", "Values": ["web"]}]
    )["Reservations"][0]["Instances"][0]["Tags"]
    assert {"Key": "aws:ec2launchtemplate:version", "Value": "1"} in tags


# Errors


def test_errors_are_aws_s_and_map_to_ours(place):
    ec2, groups, elb = place.ec2, place.groups, place.elb
    template = ec2.create_template("web", image_id=IMAGE, instance_type="t3.nano", user_data=b"")
    absent = "lt-00000000000000000"
    for call, error, text in [
        (lambda: ec2.version(absent, 1), NotFoundError, "InvalidLaunchTemplateId.NotFound"),
        (lambda: ec2.version(template.id, 7), NotFoundError, "VersionNotFound"),
        (lambda: ec2.template("other"), NotFoundError, "InvalidLaunchTemplateName.NotFound"),
        (lambda: ec2.instances(["i-00000000"]), NotFoundError, "InvalidInstanceID.NotFound"),
        (lambda: ec2.console("hello"), CalveError, "InvalidInstanceID.Malformed"),
        (lambda: groups.group("web"), NotFoundError, "no such Auto Scaling group"),
        (lambda: place.refreshes.cancel("web"), NotFoundError, "ValidationError"),
        (lambda: elb.target_group("web"), NotFoundError, "TargetGroupNotFound"),
        (lambda: elb.health("arn:no"), NotFoundError, "TargetGroupNotFound"),
        (
            lambda: groups.create_group("web", template_id=absent, version=1, size=(0, 0, 1)),
            NotFoundError,
            "You must use a valid fully-formed launch template",
        ),
        (
            lambda: groups.create_group("web", template_id=template.id, version=1, size=(0, 2, 1)),
            CalveError,
            "Desired capacity:2 must be between",
        ),
        (
            lambda: ec2.create_template(
                "web", image_id=IMAGE, instance_type="t3.nano", user_data=b"other"
            ),
            ConflictError,
            "AlreadyExists",
        ),
    ]:
        with pytest.raises(error, match=text) as caught:
            call()
        assert type(caught.value) is error


def test_preferences_are_checked(place):
    template, _arn = place.fleet()
    place.ec2.create_version(template.id, source=1, description="", user_data=b"2")
    raw = place.raw["autoscaling"]
    for preferences, text in [
        ({"MinHealthyPercentage": 50, "MaxHealthyPercentage": 200}, "cannot be greater than 100"),
        ({"MaxHealthyPercentage": 200}, "MinHealthyPercentage must be specified"),
        ({"AutoRollback": True}, "requires a DesiredConfiguration"),
    ]:
        with pytest.raises(raw.exceptions.ClientError, match=text):
            raw.start_instance_refresh(AutoScalingGroupName="web", Preferences=preferences)


def test_unknown_actions_and_unsigned_requests(place):
    raw = place.raw["autoscaling"]
    with pytest.raises(raw.exceptions.ClientError) as caught:
        raw.describe_policies()
    assert caught.value.response["Error"]["Code"] == "InvalidAction"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    host, port = place.raw["ec2"].meta.endpoint_url.removeprefix("http://").split(":")
    client = http.client.HTTPConnection(host, int(port), timeout=5)
    for body, status, text in [
        ("Action=DescribeInstances&Version=2016-11-15", 403, b"MissingAuthenticationToken"),
        ("Action=X&Version=1999-01-01", 400, b"InvalidAction"),
        ("Action=X&Action.a=1", 400, b"MalformedQueryString"),
        ("Action=X&Action=Y", 400, b"MalformedQueryString"),
        ("a..b=1", 400, b"MalformedQueryString"),
        (b"\xff=1", 400, b"MalformedQueryString"),
        (b"x" * (1 << 20) + b"x", 413, b"RequestEntityTooLarge"),
    ]:
        client.request("POST", "/", body)
        answer = client.getresponse()
        assert text in answer.read()
        assert answer.status == status
    client.request("GET", "/")
    answer = client.getresponse()
    assert (answer.status, answer.read() == b"") == (405, False)
    client.close()
    other = Session("us-east-1", place.raw["ec2"].meta.endpoint_url, credentials=KEYS)
    gateway = Ec2(other)
    with pytest.raises(AccessError, match="scoped to eu-central-1/ec2") as denied:
        gateway.template("web")
    assert denied.value.hint == "the caller needs ec2:DescribeLaunchTemplates"
    gateway._client.close()


def _principals(key):
    principals = Principals()
    key.append(principals.add_user("operator"))
    return Access(principals, region="eu-central-1").check


_KEY = []


@pytest.mark.parametrize("place", [{"authenticate": _principals(_KEY)}], indirect=True)
def test_signatures_can_be_verified(place):
    with pytest.raises(AccessError):
        place.ec2.template("web")
    (key,) = _KEY
    keys = Credentials(key.access_key, key.secret_key)
    gateway = Ec2(Session("eu-central-1", place.raw["ec2"].meta.endpoint_url, credentials=keys))
    with pytest.raises(NotFoundError):
        gateway.template("web")
    gateway._client.close()


def _throttle(request, call):
    raise Refusal(503, "Throttling", "Rate exceeded")


@pytest.mark.parametrize("place", [{"authenticate": _throttle}], indirect=True)
def test_what_may_pass_is_transient(place, monkeypatch):
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _seconds: None)
    with pytest.raises(TransientError, match="Throttling"):
        place.ec2.template("web")


def test_a_balancer_that_dies_is_reported_by_the_cloud():
    machines = FakeMachines()
    threads = threading.active_count()
    with (
        pytest.raises(CalveError, match="haproxy has ended with"),
        HaProxy() as balancer,
        Cloud(machines, balancer, poll_s=0.05) as cloud,
        Server(cloud.handle) as server,
    ):
        cloud.add_image(IMAGE, "base")
        place = Place(machines, balancer, cloud, server.url)
        place.fleet()
        balancer.close()
        until(lambda: cloud._threads.cancel.cancelled)
        with pytest.raises(TransientError, match="driver has failed: haproxy has ended with"):
            place.groups.group("web")
        place.close()
    assert not any(machines.running(one) for one in machines.made)
    assert threading.active_count() == threads


def test_every_gateway_method_names_its_actions():
    for gateway, prefix in ((Ec2, "ec2:"), (AutoScaling, "autoscaling:")):
        methods = [
            getattr(gateway, name)
            for name, value in vars(gateway).items()
            if callable(value) and not name.startswith("_")
        ]
        assert all(method.actions for method in methods)
        assert any(action.startswith(prefix) for action in actions_of(gateway))
