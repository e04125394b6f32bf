"""What Terraform and OpenTofu are told: a policy, and to leave alone what a release changes.

The AWS provider puts the group's launch template back before it starts a refresh of its own, so
that a rollback would return to the bad release (terraform-provider-aws, issue 34189).
Source: Terraform language, "Strings and Templates" and "The lifecycle Meta-Argument".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["keep_release", "policy_resource"]


def policy_resource(name: str, description: str, document: dict[str, Any]) -> str:
    """Return an `aws_iam_policy` resource.

    Args:
        name: of the policy.
        description: for people; IAM takes 1,000 characters.
        document: the policy, as JSON's types.
    """
    body = _literal(json.dumps(document, indent=2)).replace("\n", "\n  ")
    return (
        f"resource {_text('aws_iam_policy')} {_text(_label(name))} {{\n"
        f"  name        = {_text(name)}\n"
        f"  description = {_text(description)}\n"
        f"  policy = jsonencode({body})\n"
        "}\n"
    )


def keep_release(
    group: str, template_id: str, version: int, *, tags: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return the lines that a group's resource needs, so that Terraform does not undo a release.

    Args:
        group: the Auto Scaling group's name.
        template_id: of its launch template.
        version: the number that the group has now.
        tags: of the group; Terraform would remove those that it does not know.
    """
    return f"""\
resource "aws_autoscaling_group" {_text(_label(group))} {{
  name = {_text(group)}
  # ... what the group has besides, but no instance_refresh: refreshes are Calve's to start

  launch_template {{
    id      = {_text(template_id)}
    version = {_text(str(version))} # a number: from $Latest and $Default nothing can be rolled back
  }}
{"".join(map(_tag, tags, tags.values()))}
  lifecycle {{
    # A release sets the version, scaling the capacity. With a mixed instances policy the first is
    # mixed_instances_policy[0].launch_template[0].launch_template_specification[0].version.
    ignore_changes = [launch_template[0].version, desired_capacity]
  }}
}}
"""


def _tag(key: str, value: str) -> str:
    return f"""
  tag {{
    key                 = {_text(key)}
    value               = {_text(value)}
    propagate_at_launch = false
  }}
"""


def _label(name: str) -> str:
    """Return a name as a resource's label: letters, digits, `_` and `-`, not a digit first."""
    label = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "group"
    return f"_{label}" if label[0].isdigit() else label


def _text(text: str) -> str:
    return _literal(json.dumps(text, ensure_ascii=False))


def _literal(text: str) -> str:
    """Return JSON as Terraform reads it: `${` and `%{` would begin a template."""
    return text.replace("${", "$${").replace("%{", "%%{")
