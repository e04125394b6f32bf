"""A group that serves already becomes a fleet, in the region; its machines stay as they are."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import replace

import pytest

import calve.aws.session
from calve.aws.autoscaling import Hook
from calve.aws.session import Session
from calve.cli import adopt as module
from calve.cli import main
from calve.cli.session import Session as CommandLine
from calve.contract.userdata import UserData
from calve.demo.virtual import IMAGE
from calve.errors import CancelledError, ConflictError, NotFoundError, UsageError
from calve.fleet.tags import ALARMS_TAG, FLEET_TAG, HOOK, HOOK_TAG, REPORTS_TAG
from calve.image.ami import CONTRACT
from calve.infra.adopt import Wanted, changes
from calve.region.scripts import good
from calve.rollout.observe import Gateways

GROUP = "shop"
FOREIGN = b"#!/bin/sh\nexec serve\n"
OPTIONS = {
    "HttpTokens": "optional",
    "HttpPutResponseHopLimit": 2,
    "HttpEndpoint": "enabled",
    "InstanceMetadataTags": "enabled",
}


def theirs():
    """A machine that serves, and has not heard of hooks or reports."""
    return replace(good(10.0), result=None, beat_s=None, reports=())


class Shop:
    """A group of two on $Latest, with user data of its own; and `calve adopt` about it."""

    def __init__(self, place, directory):
        self.place, self.directory = place, directory
        scripts = place.machines._script_of
        place.machines._script_of = lambda launch: (
            theirs() if launch.user_data == FOREIGN else scripts(launch)
        )
        place.cloud.profiles.add("acme", "acme-machine")
        self.scaling, self.ec2 = place.gateways.scaling, place.gateways.ec2
        answer = self.ec2._client.create_launch_template(
            LaunchTemplateName=GROUP,
            LaunchTemplateData={
                "ImageId": IMAGE,
                "InstanceType": "t3.nano",
                "UserData": "IyEvYmluL3NoCmV4ZWMgc2VydmUK",
                "IamInstanceProfile": {"Name": "acme"},
                "MetadataOptions": OPTIONS,
            },
        )
        self.template = answer["LaunchTemplate"]["LaunchTemplateId"]
        (arn,) = self.scaling.group("web").target_groups
        self.scaling._client.create_auto_scaling_group(
            AutoScalingGroupName=GROUP,
            LaunchTemplate={"LaunchTemplateId": self.template, "Version": "$Latest"},
            MinSize=2,
            DesiredCapacity=2,
            MaxSize=4,
            TargetGroupARNs=[arn],
            HealthCheckType="EC2",
            HealthCheckGracePeriod=30,
            Tags=[{"Key": "team", "Value": "shop", "PropagateAtLaunch": True}],
        )
        place.until(lambda: place.serving() == 4)
        (directory / "calve.toml").write_text(
            f'[cache]\nurl = "{place.objects.url}"\n'
            '[fleet.shop]\nsystem = "./result"\nhealth = { http = "/healthz", within = "1m" }\n'
        )
        session = Session(
            "eu-central-1", place.session.endpoint, credentials=place.session.credentials
        )
        self.sources = module.Sources.of(Gateways.of(session, place.objects), session)
        self.wanted = Wanted("shop", 60, Hook(HOOK))

    @property
    def group(self):
        return self.scaling.group(GROUP)

    @property
    def live(self):
        return self.ec2.version(self.template, self.group.version)

    def facts(self):
        return module.gather(self.sources, GROUP, self.wanted)

    def adopt(self, *argv):
        argv = ("adopt", *argv)
        out, err = io.StringIO(), io.StringIO()
        options = main._parser(argv).parse_args(argv)
        assert main._module("adopt").run(options, CommandLine(out, err)) == 0
        return out.getvalue(), err.getvalue()

    def document(self, *argv):
        return json.loads(self.adopt(*argv, "--json")[0])


@pytest.fixture
def shop(place, tmp_path, monkeypatch):
    monkeypatch.setattr(
        calve.aws.session,
        "_boto3_session",
        functools.cache(calve.aws.session._boto3_session),  # boto reads its models once
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", place.session.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return Shop(place, directory)


def codes(document):
    return [one["code"] for one in document["changes"]]


def test_a_group_becomes_a_fleet_and_then_there_is_nothing_to_do(shop):
    before = shop.group
    found = shop.document("--yes")
    assert codes(found) == [
        "group-tag",
        "template-tag",
        "reports-tag",
        "version",
        "imdsv2",
        "grace",
        "health-check",
        "alarm",
        "hook-tag",
    ]
    group, live = shop.group, shop.live
    role_id = shop.place.cloud.profiles.role_id("acme-machine")
    assert group.tags == {
        "team": "shop",
        FLEET_TAG: "shop",
        REPORTS_TAG: f"boot-reports/{role_id}",
        ALARMS_TAG: "calve-shop-errors",
        HOOK_TAG: HOOK,
    }
    assert list(shop.place.cloud.alarms.states) == ["calve-shop-errors"]
    assert shop.ec2.template_of(shop.template).tags == {FLEET_TAG: "shop"}
    assert (group.version, group.health_check, group.grace_s) == ("2", "ELB", 60)
    assert (live.metadata_tokens, live.profile, live.user_data) == ("required", "acme", FOREIGN)
    assert found["version"] == 2
    assert 'version = "2"' in found["advice"]
    assert found["machine_role"] == "arn:aws:iam::123456789012:role/acme-machine"
    # No running machine was touched.
    assert [(one.id, one.version) for one in group.instances] == [
        (one.id, one.version) for one in before.instances
    ]
    again = shop.document("--yes")
    assert again["changes"] == []
    assert shop.group == group
    assert shop.ec2.template_of(shop.template).latest_version == 2
    assert "nothing is to be done" in shop.adopt("--yes")[0]


def test_the_other_metadata_options_stay(shop):
    shop.adopt("--yes")
    answer = shop.ec2._client.describe_launch_template_versions(
        LaunchTemplateId=shop.template, Versions=["2"]
    )
    data = answer["LaunchTemplateVersions"][0]["LaunchTemplateData"]
    assert data["MetadataOptions"] == {**OPTIONS, "HttpTokens": "required"}
    assert (data["ImageId"], data["InstanceType"]) == (IMAGE, "t3.nano")


def test_a_dry_run_changes_nothing(shop):
    before = shop.group
    out, err = shop.adopt("--dry-run")
    assert out.splitlines()[0] == (
        "group-tag: the group gets the tag calve:fleet, which says whose it is (nothing -> shop)"
    )
    assert "nothing was" in err
    assert "calve image publish" in err
    assert "calve iam show machine --account 123456789012" in err
    assert shop.document("--dry-run")["dry_run"] is True
    assert shop.group == before
    assert shop.ec2.template_of(shop.template).latest_version == 1


def test_without_anybody_to_ask_nothing_is_changed(shop):
    with pytest.raises(UsageError, match="nobody is there"):
        shop.adopt()
    assert shop.group.version == "$Latest"


@pytest.mark.parametrize("made", range(1, 9))
def test_killed_after_any_change_it_goes_on_with_the_others(shop, made):
    all_of_them = changes(shop.facts())
    for one in all_of_them[:made]:
        module.act(shop.sources, shop.facts(), one)
    left = codes(shop.document("--yes"))
    assert left == [one.code for one in all_of_them[made:]]
    assert shop.document("--yes")["changes"] == []
    assert (shop.group.version, shop.place.serving()) == ("2", 4)


def test_killed_between_a_version_and_its_use_it_makes_no_second_one(shop):
    shop.scaling.set_version(GROUP, shop.template, 1)
    shop.ec2.require_tokens(shop.template, 1, "calve adopt: IMDSv2 for 1")
    assert "imdsv2" in codes(shop.document("--yes"))
    assert shop.group.version == "2"
    assert shop.ec2.template_of(shop.template).latest_version == 2


def test_done_twice_a_change_is_as_done_once(shop):
    for one in changes(shop.facts()):
        facts = shop.facts()
        module.act(shop.sources, facts, one)
        module.act(shop.sources, facts, one)
    assert changes(shop.facts()) == ()
    assert shop.ec2.template_of(shop.template).latest_version == 2


def test_the_hook_is_left_out_until_machines_let_go_of_it(shop):
    found = shop.document("--yes")
    assert "hook" in [one["code"] for one in found["warnings"]]
    assert shop.scaling.hooks(GROUP) == ()
    assert codes(shop.document("--yes", "--hook")) == ["hook"]
    assert [one.name for one in shop.scaling.hooks(GROUP)] == [HOOK]
    # So it would have been: the group grows, and never gets its machine.
    shop.scaling._client.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=3)
    place = shop.place
    place.until(
        lambda: "Cancelled" in {one.status for one in shop.scaling.activities(GROUP)},
        within_s=300,
    )
    assert place.serving() == 4


def test_a_base_image_without_a_release_gets_its_hook_at_once(shop):
    shop.ec2._client.create_tags(Resources=[IMAGE], Tags=[{"Key": CONTRACT, "Value": "1"}])
    found = shop.document("--yes")
    assert codes(found)[-1] == "hook"
    assert "image" not in [one["code"] for one in found["warnings"]]
    assert codes(shop.document("--yes", "--no-hook")) == []


def test_a_machine_that_fails_its_check_is_not_lost(shop):
    machine = shop.group.instances[0].id
    one = shop.place.machines._machines[machine]
    shop.place.machines._serve(one, 500)
    shop.place.until(lambda: shop.place.serving() == 3)
    found = shop.document("--yes")
    assert "health-check" not in codes(found)
    assert machine in next(
        one["message"] for one in found["warnings"] if one["code"] == "health-check"
    )
    assert shop.group.health_check == "EC2"


def test_another_group_than_the_file_s_is_told(shop):
    (shop.directory / "calve.toml").write_text(
        f'[cache]\nurl = "{shop.place.objects.url}"\n[fleet.api]\nsystem = "./result"\n'
    )
    found = shop.document("--group", GROUP, "--yes")
    assert (found["fleet"], found["group"]) == ("api", GROUP)
    assert "fleet-file" in [one["code"] for one in found["warnings"]]
    (shop.directory / "calve.toml").write_text(
        f'[cache]\nurl = "{shop.place.objects.url}"\n[fleet.shop]\nsystem = "./result"\n'
    )
    with pytest.raises(UsageError, match="belongs to the fleet api"):
        shop.adopt("--yes")


def test_a_group_gets_the_tag_by_which_it_is_found_later(shop):
    (shop.directory / "calve.toml").write_text(
        f'[cache]\nurl = "{shop.place.objects.url}"\n[fleet.shop]\nsystem = "./result"\n'
        'group = "tag:calve:fleet=shop"\n'
    )
    with pytest.raises(NotFoundError):
        shop.adopt("--yes")
    found = shop.document("--group", GROUP, "--yes")
    assert "fleet-file" not in [one["code"] for one in found["warnings"]]
    assert shop.document("--yes")["group"] == GROUP


def test_who_wants_a_document_is_shown_what_is_asked(shop, monkeypatch):
    monkeypatch.setattr(CommandLine, "asked", lambda *_: False)
    options = main._parser(("adopt", "--json")).parse_args(("adopt", "--json"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(CancelledError, match="nothing was changed"):
        main._module("adopt").run(options, CommandLine(out, err))
    assert "version: " in err.getvalue()
    assert out.getvalue() == ""


def test_a_group_in_a_refresh_is_left_alone(shop):
    place = shop.place
    place.scripts[2] = lambda _launch: good(200.0)
    place.rollout(place.release(2)).run(detach=True)
    with pytest.raises(ConflictError, match="instance refresh"):
        module.gather(shop.sources, "web", shop.wanted)


def test_a_release_follows_upon_it(shop):
    shop.adopt("--yes")
    data = UserData(f"/nix/store/{'c' * 32}-w", ("x",), "0" * 64, ("acme-1",), "shop", 1)
    made = shop.ec2.create_version(
        shop.template, source=2, description="calve shop release 1", user_data=data.dump()
    )
    assert (made.metadata_tokens, made.profile, made.number) == ("required", "acme", 3)


def test_without_a_role_reports_are_not_told_where_to_go(shop):
    profiles = shop.sources.profiles
    assert profiles.role("acme").name == "acme-machine"
    shop.place.cloud.profiles.add("acme")
    for name in ("nobody-s", "acme"):
        with pytest.raises(NotFoundError):
            profiles.role(name)
    found = shop.document("--yes")
    assert "reports-tag" not in codes(found)
    assert "role" in [one["code"] for one in found["warnings"]]
    assert found["machine_role"] is None
