"""What is printed for Terraform and OpenTofu."""

from __future__ import annotations

import json
import re

import pytest

from calve.infra.policies import policy
from calve.infra.roles import Role
from calve.infra.scope import Scope
from calve.infra.terraform import keep_release, policy_resource


@pytest.mark.parametrize("role", Role)
def test_a_policy_is_one_resource_with_the_same_document(role):
    document = policy(role, Scope(fleet="web")).document
    text = policy_resource("calve-web", "what it is for", document)
    assert text.startswith('resource "aws_iam_policy" "calve-web" {\n')
    assert text.endswith("}\n")
    body = re.search(r"jsonencode\((.*)\)\n\}\n$", text, re.DOTALL)[1]
    assert json.loads(body.replace("$${", "${")) == document


def test_nothing_begins_a_template():
    document = policy(Role.MACHINE, Scope()).document
    text = policy_resource("calve", "100 %{ of ${ it", document)
    assert "$${aws:userid}" in text
    assert re.findall(r"(?<![$])\$\{|(?<!%)%\{", text) == []


def test_a_name_becomes_a_label():
    assert '"aws_iam_policy" "_9_a-b"' in policy_resource("9 a-b", "", {})


def test_a_group_keeps_its_release():
    text = keep_release("acme web", "lt-0123456789abcdef0", 7)
    assert '"aws_autoscaling_group" "acme_web"' in text
    assert 'name = "acme web"' in text
    assert 'id      = "lt-0123456789abcdef0"' in text
    assert 'version = "7"' in text
    assert "ignore_changes = [launch_template[0].version, desired_capacity]" in text
    assert "instance_refresh {" not in text
    assert "tag {" not in text
    assert text.count("{") == text.count("}")


def test_a_group_keeps_its_tags():
    tags = {"calve:fleet": "shop", "calve:reports": "boot-reports/AROA"}
    text = keep_release("web", "lt-0", 1, tags=tags)
    found = re.findall(r'tag \{\n +key += "(.*)"\n +value += "(.*)"\n', text)
    assert dict(found) == tags
    assert text.count("{") == text.count("}")
