"""What an action may be done to, as narrow as IAM allows: ARNs, tags, and the keys of objects.

To start an instance refresh, a caller must be allowed to run what the launch template says.
Source: Service Authorization Reference; Amazon EC2 Auto Scaling User Guide, "Control Amazon EC2
launch template usage in Auto Scaling groups". Describe actions know no resource.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from calve.errors import CalveError
from calve.fleet.tags import FLEET_TAG
from calve.image.ami import LINE
from calve.infra.roles import Role

if TYPE_CHECKING:
    from calve.infra.scope import Scope

__all__ = ["OBJECTS", "Keys", "Where", "where"]


@dataclass(frozen=True, slots=True)
class Where:
    """What some actions may be done to.

    Attributes:
        sid: names the statement: letters and digits.
        resources: ARNs, or `*`.
        condition: IAM's, as JSON's types; None where there is none.
    """

    sid: str
    resources: tuple[str, ...]
    condition: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """Patterns of the keys that a role may read, write and remove; `{fleet}` is its name."""

    read: tuple[str, ...]
    write: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


_CACHE: Final = ("*.narinfo", "keyring.json", "manifests/*", "nar/*", "nix-cache-info")
_RECORDS: Final = (
    "*.narinfo",
    "boot-reports/*",
    "fleets/{fleet}/*",
    "keyring.json",
    "manifests/*",
    "nix-cache-info",
    "roots/*",
)
_LOCK: Final = "fleets/{fleet}/lock.json"
_ROOTS: Final = "roots/fleet/{fleet}.*"

OBJECTS: Final[Mapping[Role, Keys]] = {
    Role.BUILDER: Keys(
        read=("*",),
        write=(
            "*.narinfo",
            "calve-import/*",
            "manifests/*",
            "nar/*",
            "nix-cache-info",
            "pending/*",
            "roots/push/*",
        ),
        remove=("calve-import/*", "pending/*"),
    ),
    Role.RELEASER: Keys(read=("*",), write=("fleets/{fleet}/*", _ROOTS), remove=(_LOCK, _ROOTS)),
    Role.OBSERVER: Keys(read=_RECORDS),
    Role.MACHINE: Keys(read=_CACHE, write=("boot-reports/${aws:userid}/*",)),
    Role.GUARD: Keys(
        read=_RECORDS, write=("fleets/{fleet}/releases/*/*", _ROOTS), remove=(_ROOTS,)
    ),
}
"""What Calve's own S3 client does for whom."""


def where(action: str, role: Role, scope: Scope) -> tuple[Where, ...]:
    """Return what a role may do an action of a gateway to; nothing where the scope has none of it.

    Raises:
        CalveError: nobody has said yet what the action is done to.
    """
    service, _, name = action.partition(":")
    if name.startswith("Describe"):
        return (Where("Look", ("*",)),)
    found = _OF_ROLE.get((role, action)) or _OF_ACTION.get(action) or _OF_SERVICE.get(service)
    if found is None:
        raise CalveError("no resource is known for the action", place=action)
    return found(scope)


# Auto Scaling


def _group(scope: Scope) -> tuple[Where, ...]:
    if scope.group is not None:
        return (Where("Group", (scope.group_arn,)),)
    tagged = {"StringEquals": {f"autoscaling:ResourceTag/{FLEET_TAG}": scope.said("fleet")}}
    return (Where("Group", (scope.group_arn,), tagged),)


# EC2


def _tagged(scope: Scope) -> dict[str, dict[str, str]]:
    return {"StringEquals": {f"ec2:ResourceTag/{FLEET_TAG}": scope.said("fleet")}}


def _template(scope: Scope) -> tuple[Where, ...]:
    return (Where("Template", (scope.arn("ec2", "launch-template/*"),), _tagged(scope)),)


def _run(scope: Scope) -> tuple[Where, ...]:
    template = scope.arn("ec2", "launch-template/*")
    own = ("instance", "key-pair", "network-interface", "security-group", "subnet", "volume")
    started = (
        f"arn:{scope.partition}:ec2:{scope.said('region')}::image/*",
        f"arn:{scope.partition}:ec2:{scope.said('region')}::snapshot/*",
        *(scope.arn("ec2", f"{kind}/*") for kind in own),
    )
    by_template = {"ArnLike": {"ec2:LaunchTemplate": template}}
    return (
        Where("Template", (template,), _tagged(scope)),
        Where("Run", started, by_template),
    )


def _tag_started(scope: Scope) -> tuple[Where, ...]:
    kinds = ("instance", "network-interface", "volume")
    started = tuple(scope.arn("ec2", f"{kind}/*") for kind in kinds)
    return (Where("TagStarted", started, {"StringEquals": {"ec2:CreateAction": "RunInstances"}}),)


def _instance(scope: Scope) -> tuple[Where, ...]:
    """Instances by the tag that Auto Scaling gives them; those of all groups without a name."""
    tag = "ec2:ResourceTag/aws:autoscaling:groupName"
    one = {"Null": {tag: "false"}} if scope.group is None else {"StringEquals": {tag: scope.group}}
    return (Where("Machines", (scope.arn("ec2", "instance/*"),), one),)


def _images(scope: Scope) -> tuple[Where, ...]:
    """All images and snapshots: they are published to several regions."""
    return (Where("Images", _image_arns(scope)),)


def _own_images(scope: Scope) -> tuple[Where, ...]:
    return (Where("OwnImages", _image_arns(scope), {"Null": {f"ec2:ResourceTag/{LINE}": "false"}}),)


def _image_arns(scope: Scope) -> tuple[str, ...]:
    return tuple(f"arn:{scope.partition}:ec2:*::{kind}/*" for kind in ("image", "snapshot"))


def _import(scope: Scope) -> tuple[Where, ...]:
    task = f"arn:{scope.partition}:ec2:*:{scope.said('account')}:import-snapshot-task/*"
    return (Where("Import", (task, _image_arns(scope)[1])),)


def _snapshots(scope: Scope) -> tuple[Where, ...]:
    return (Where("Snapshots", (_image_arns(scope)[1],)),)


# IAM


def _pass(scope: Scope) -> tuple[Where, ...]:
    to_ec2 = {"StringEquals": {"iam:PassedToService": f"ec2.{scope.services}"}}
    return (Where("PassRole", (scope.role_arn,), to_ec2),)


def _profile(scope: Scope) -> tuple[Where, ...]:
    profiles = f"arn:{scope.partition}:iam::{scope.said('account')}:instance-profile/*"
    return (Where("Profiles", (profiles,)),)


def _free(_scope: Scope) -> tuple[Where, ...]:
    """Nothing: nobody can be denied it."""
    return ()


# S3 and the signing key


def _bucket(scope: Scope) -> tuple[Where, ...]:
    return (Where("Bucket", (scope.bucket_arn,)),)


def _parameter(scope: Scope) -> tuple[Where, ...]:
    from calve.fleet.config import Parameter

    if not isinstance(scope.key, Parameter):
        return ()
    name = scope.key.name
    if not name.startswith("arn:"):
        name = _in(scope, scope.key.region, "ssm", f"parameter/{name.split(':')[0].lstrip('/')}")
    return (Where("Key", (name,)),)


def _secret(scope: Scope) -> tuple[Where, ...]:
    from calve.fleet.config import Secret

    if not isinstance(scope.key, Secret):
        return ()
    name = scope.key.id
    if not name.startswith("arn:"):
        # Secrets Manager puts a dash and six characters behind the name.
        name = _in(scope, scope.key.region, "secretsmanager", f"secret:{name}-??????")
    return (Where("Key", (name,)),)


def _decrypt(scope: Scope) -> tuple[Where, ...]:
    from calve.fleet.config import Parameter, Secret

    key = scope.key
    if not isinstance(key, Parameter | Secret):
        return ()
    service = "ssm" if isinstance(key, Parameter) else "secretsmanager"
    via = f"{service}.{key.region or scope.said('region')}.{scope.services}"
    keys = _in(scope, key.region, "kms", "key/*")
    return (Where("Decrypt", (keys,), {"StringEquals": {"kms:ViaService": via}}),)


def _in(scope: Scope, region: str | None, service: str, resource: str) -> str:
    place = f"{region or scope.said('region')}:{scope.said('account')}"
    return f"arn:{scope.partition}:{service}:{place}:{resource}"


_Find = Callable[["Scope"], tuple[Where, ...]]
_OF_ROLE: Final[Mapping[tuple[Role, str], _Find]] = {(Role.BUILDER, "ec2:CreateTags"): _images}
_OF_ACTION: Final[Mapping[str, _Find]] = {
    "ec2:CopyImage": _images,
    "ec2:CreateLaunchTemplateVersion": _template,
    "ec2:CreateTags": _tag_started,
    "ec2:DeleteLaunchTemplateVersions": _template,
    "ec2:DeleteSnapshot": _own_images,
    "ec2:DeregisterImage": _own_images,
    "ec2:EnableImageDeprecation": _own_images,
    "ec2:GetConsoleOutput": _instance,
    "ec2:GetConsoleScreenshot": _instance,
    "ec2:ImportSnapshot": _import,
    "ec2:ModifyImageAttribute": _own_images,
    "ec2:ModifyLaunchTemplate": _template,
    "ec2:ModifySnapshotAttribute": _own_images,
    "ec2:RegisterImage": _images,
    "ec2:RunInstances": _run,
    "ec2:TerminateInstances": _instance,
    "iam:GetInstanceProfile": _profile,
    "iam:PassRole": _pass,
    "kms:Decrypt": _decrypt,
    "s3:ListBucket": _bucket,
    "secretsmanager:GetSecretValue": _secret,
    "ssm:GetParameter": _parameter,
    "sts:GetCallerIdentity": _free,
}
_OF_SERVICE: Final[Mapping[str, _Find]] = {"autoscaling": _group, "ebs": _snapshots}
