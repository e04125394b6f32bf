"""The account: who asks, what they may do, and stacks that are at work.

A dry run asks EC2 for the permission alone: it answers `DryRunOperation` where the request would have been carried out.
Source: AWS STS API reference, GetCallerIdentity; Amazon EC2 API reference, "DryRun"; AWS
CloudFormation API reference, DescribeStacks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs

if TYPE_CHECKING:
    from collections.abc import Callable

    from calve.aws.session import Session

__all__ = ["Account"]

_WOULD_BE_DONE = "DryRunOperation"


class Account:
    """What an account says of its caller; thread-safe.

    A client is made when it is first asked: most callers want one or two of them.
    """

    def __init__(self, session: Session) -> None:
        self._client = functools.cache(session.client)

    @needs("sts:GetCallerIdentity")
    def caller(self) -> str:
        """Return the ARN of whoever the credentials are of. Nobody can be denied this."""
        return str(self._client("sts").get_caller_identity()["Arn"])

    @needs("ec2:RunInstances", "iam:PassRole", "ec2:CreateTags")
    def may_launch(self, template_id: str, version: int) -> None:
        """Try whether a version of a launch template may be launched; nothing is.

        Raises:
            AccessError: the caller may not.
            CalveError: EC2 will not have it for another reason.
        """
        launch = {"LaunchTemplateId": template_id, "Version": str(version)}
        self._try(
            lambda: self._client("ec2").run_instances(
                DryRun=True, MinCount=1, MaxCount=1, LaunchTemplate=launch
            )
        )

    @needs("ec2:CreateLaunchTemplateVersion")
    def may_create_version(self, template_id: str, source: int) -> None:
        """Try whether a launch template may get another version; it does not.

        Raises:
            AccessError: the caller may not.
            CalveError: EC2 will not have it for another reason.
        """
        self._try(
            lambda: self._client("ec2").create_launch_template_version(
                DryRun=True,
                LaunchTemplateId=template_id,
                SourceVersion=str(source),
                VersionDescription="dry run",
                LaunchTemplateData={"UserData": ""},
            )
        )

    def _try(self, call: Callable[[], Any]) -> None:
        from botocore.exceptions import ClientError

        try:
            call()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != _WOULD_BE_DONE:
                raise

    @needs("cloudformation:DescribeStacks")
    def stack_status(self, name: str) -> str:
        """Return a stack's status (`UPDATE_COMPLETE`, `UPDATE_IN_PROGRESS` …).

        Args:
            name: its name, or its id.

        Raises:
            NotFoundError: there is no such stack.
        """
        answer = self._client("cloudformation").describe_stacks(StackName=name)
        return str(answer["Stacks"][0]["StackStatus"])
