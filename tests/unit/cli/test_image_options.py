"""What the commands of `calve image` share: regions, endpoints, durations, usage."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from calve.aws.ebs import configured_endpoint
from calve.aws.session import default_region
from calve.cli import common
from calve.cli import image_options as shared
from calve.errors import UsageError


@pytest.fixture(autouse=True)
def _no_aws_of_the_host(monkeypatch, tmp_path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_the_region_of_the_environment_or_the_profile(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="no region is named") as caught:
        default_region()
    assert "--region" in caught.value.hint
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n")
    assert default_region() == "eu-west-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-2")
    assert default_region() == "eu-west-2"
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    assert default_region() == "eu-west-3"


def test_regions_are_each_meant_once(monkeypatch):
    def regions(*names):
        return shared.regions(argparse.Namespace(regions=list(names)))

    assert regions("eu-central-1", "us-east-1", "eu-central-1") == ["eu-central-1", "us-east-1"]
    monkeypatch.setenv("AWS_REGION", "us-gov-west-1")
    assert regions() == ["us-gov-west-1"]
    for bad in ("", "eu", "eu-central-1/", "../x", "EU-central-1", "eu central-1"):
        with pytest.raises(UsageError, match="no region of AWS"):
            shared.region(argparse.Namespace(region=bad or " "))
    with pytest.raises(UsageError, match="more than there are"):
        regions(*(f"eu-central-{number}" for number in range(41)))


def test_the_endpoint_is_that_of_boto_s_variables():
    assert configured_endpoint({}) is None
    assert configured_endpoint({"AWS_ENDPOINT_URL": "http://a"}) == "http://a"
    both = {"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_EBS": "http://b"}
    assert configured_endpoint(both) == "http://b"


def test_durations():
    found = [common.duration(text) for text in ("0s", "90m", "24h", "7d")]
    assert found == [0, 5400, 86_400, 604_800]
    for text in ("", "7", "d", "-1d", "1w", "1.5h", "1h30m"):
        with pytest.raises(argparse.ArgumentTypeError):
            common.duration(text)


@pytest.mark.parametrize(
    "args",
    [
        ("build",),
        ("build", "/nix/store/x"),
        ("upload",),
        ("upload", "x", "--via", "mail"),
        ("publish", "x", "--share", "me"),
        ("publish", "x", "--deprecate-after", "soon"),
        ("share", "ami-1"),
        ("copy", "ami-1"),
        ("prune", "--older-than", "yesterday"),
        ("debug",),
    ],
)
def test_wrong_usage_is_2(args):
    done = subprocess.run(
        [sys.executable, "-m", "calve", "image", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"usage: calve image {args[0]}" in done.stderr
    assert not done.stdout
