"""Who does what: the roles that call a gateway's method, and what Calve's HTTP clients do beside.

The builder pushes closures and makes images, the releaser puts releases on a fleet, the observer
looks, the machine boots, the guard judges releases and rolls them back. What an action may be
done to is in `resources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from calve.aws.account import Account
from calve.aws.alarms import Alarms
from calve.aws.autoscaling import AutoScaling
from calve.aws.buckets import Bucket
from calve.aws.ebs import EbsDirect
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.images import Images
from calve.aws.network import Network
from calve.aws.profiles import Profiles
from calve.aws.refreshes import Refreshes
from calve.aws.secrets import ParameterStore, SecretsManager
from calve.aws.types import Types

__all__ = ["ADMINISTRATOR", "CLIENTS", "GATEWAYS", "SHOW", "Role"]


class Role(StrEnum):
    """A role that has a policy."""

    BUILDER = "builder"
    RELEASER = "releaser"
    OBSERVER = "observer"
    MACHINE = "machine"
    GUARD = "guard"

    @property
    def text(self) -> str:
        """Return what it does."""
        return _TEXTS[self]


_TEXTS: Final = {
    Role.BUILDER: "pushes closures, makes images",
    Role.RELEASER: "puts releases on a fleet",
    Role.OBSERVER: "looks, and changes nothing",
    Role.MACHINE: "boots",
    Role.GUARD: "judges releases and rolls them back",
}

Callers = tuple[Role, ...]

SHOW: Final[Callers] = ()
"""Of a method that only the demo and the benchmarks call."""
ADMINISTRATOR: Final[Callers] = ()
"""Of a method for whoever sets the account up, once, with credentials of their own."""
_BUILDER: Final = (Role.BUILDER,)
_LOOKERS: Final = (Role.BUILDER, Role.OBSERVER)
_RELEASER: Final = (Role.RELEASER,)
_READERS: Final = (Role.RELEASER, Role.OBSERVER, Role.GUARD)
_DOCTORS: Final = (Role.RELEASER, Role.OBSERVER)
_JUDGES: Final = (Role.RELEASER, Role.GUARD)

GATEWAYS: Final[Mapping[type, Mapping[str, Callers]]] = {
    Account: {
        "caller": _DOCTORS,
        "may_launch": _RELEASER,
        "may_create_version": _RELEASER,
        "stack_status": _DOCTORS,
    },
    Alarms: {"states": _READERS, "watch_errors": ADMINISTRATOR},
    AutoScaling: {
        "create_group": SHOW,
        "group": _READERS,
        "tagged": _READERS,
        "delete_group": SHOW,
        "put_hook": ADMINISTRATOR,
        "hooks": _READERS,
        "activities": _READERS,
        "set_version": _JUDGES,
        "tag": ADMINISTRATOR,
        "set_grace": ADMINISTRATOR,
        "set_checks": ADMINISTRATOR,
    },
    Bucket: {
        "exists": _BUILDER,
        "create": ADMINISTRATOR,
        "is_owner_enforced": ADMINISTRATOR,
        "enforce_owner": ADMINISTRATOR,
        "is_public_access_blocked": ADMINISTRATOR,
        "block_public_access": ADMINISTRATOR,
        "is_encrypted": ADMINISTRATOR,
        "encrypt": ADMINISTRATOR,
        "aborts_uploads": ADMINISTRATOR,
        "abort_uploads": ADMINISTRATOR,
        "create_in_parts": ADMINISTRATOR,
    },
    EbsDirect: {
        "start": _BUILDER,
        "put": _BUILDER,
        "complete": _BUILDER,
        "blocks": _BUILDER,
        "changed": _BUILDER,
        "get": _BUILDER,
    },
    Ec2: {
        "create_template": SHOW,
        "create_version": _RELEASER,
        "require_tokens": ADMINISTRATOR,
        "tag_template": ADMINISTRATOR,
        "template_of": ADMINISTRATOR,
        "template": SHOW,
        "version": _READERS,
        "find_version": _READERS,
        "instances": _READERS,
        "console": _READERS,
        "terminate": SHOW,
    },
    Elb: {
        "create_target_group": SHOW,
        "target_group": SHOW,
        "target_groups": _DOCTORS,
        "health": _READERS,
    },
    Images: {
        "snapshot_state": _LOOKERS,
        "snapshots": _LOOKERS,
        "delete_snapshot": _BUILDER,
        "tag": _BUILDER,
        "import_disk": _BUILDER,
        "import_task": _LOOKERS,
        "register": _BUILDER,
        "images": _LOOKERS,
        "deregister": _BUILDER,
        "share": _BUILDER,
        "shared_with": _LOOKERS,
        "deprecate": _BUILDER,
        "copy": _BUILDER,
        "used": _LOOKERS,
    },
    Network: {
        "subnets": _DOCTORS,
        "endpoints": _DOCTORS,
    },
    Profiles: {"role": _DOCTORS},
    ParameterStore: {"secure_string": _BUILDER},
    Refreshes: {
        "start": _RELEASER,
        "newest": _READERS,
        "rollback": _JUDGES,
        "cancel": _RELEASER,
    },
    SecretsManager: {"secret_string": _BUILDER},
    Types: {"instance_type": _DOCTORS, "image": _DOCTORS},
}

CLIENTS: Final[Mapping[Role, tuple[str, ...]]] = {
    Role.MACHINE: (
        "autoscaling:CompleteLifecycleAction",
        "autoscaling:RecordLifecycleActionHeartbeat",
    ),
}
"""What no gateway calls: `boot.uplink` lets go of the hook. Objects are in `resources.OBJECTS`."""
