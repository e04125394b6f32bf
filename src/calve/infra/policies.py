"""The policies of Calve's roles, collected from the actions that stand on the gateways' methods.

A role is a list of methods (`roles`), each method names its actions (`@needs`), each action has
its resources (`resources`). Actions with the same resources and condition make one statement.
Source: IAM User Guide, "Grammar of the IAM JSON policy language", "IAM and AWS STS quotas".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from calve.errors import CalveError
from calve.infra.resources import OBJECTS, Where, where
from calve.infra.roles import CLIENTS, GATEWAYS, Role

if TYPE_CHECKING:
    from calve.infra.scope import Scope

__all__ = ["MOST_CHARACTERS", "Policy", "actions_of_role", "policy"]

MOST_CHARACTERS: Final = 6144
"""Of a managed policy, without blanks."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A role's policy.

    Attributes:
        role: whose.
        document: the policy, as JSON's types.
        unknown: fields of the scope whose placeholders stand in it.
    """

    role: Role
    document: dict[str, Any]
    unknown: tuple[str, ...]

    @property
    def characters(self) -> int:
        """Return its length as IAM counts it."""
        return _length(self.document)

    def dump(self) -> str:
        """Return the document's text."""
        return json.dumps(self.document, indent=2)


def actions_of_role(role: Role) -> frozenset[str]:
    """Return the actions of a role, without those on objects.

    Raises:
        CalveError: a gateway has no such method.
    """
    found = set(CLIENTS.get(role, ()))
    for gateway, methods in GATEWAYS.items():
        for name, callers in methods.items():
            if role in callers:
                found.update(_actions(gateway, name))
    return frozenset(found)


def _actions(gateway: type, name: str) -> tuple[str, ...]:
    actions: tuple[str, ...] | None = getattr(vars(gateway).get(name), "actions", None)
    if actions is None:
        raise CalveError("the gateway has no such method", place=f"{gateway.__name__}.{name}")
    return actions


def policy(role: Role, scope: Scope) -> Policy:
    """Return a role's policy.

    Args:
        role: whose.
        scope: what it is narrowed to.

    Raises:
        CalveError: it is longer than IAM takes.
    """
    places: dict[str, tuple[Where, set[str]]] = {}
    for action in sorted(actions_of_role(role)):
        for place in where(action, role, scope):
            _add(places, place, action)
    for place, actions in _objects(role, scope):
        for action in actions:
            _add(places, place, action)
    document = {
        "Version": "2012-10-17",
        "Statement": [_statement(place, actions) for place, actions in places.values()],
    }
    if _length(document) > MOST_CHARACTERS:
        raise CalveError(
            f"the policy has {_length(document)} characters, IAM takes {MOST_CHARACTERS}",
            hint="name less: a shorter prefix, group or role",
        )
    return Policy(role, document, scope.unknown(json.dumps(document)))


def _objects(role: Role, scope: Scope) -> list[tuple[Where, tuple[str, ...]]]:
    keys = OBJECTS[role]

    def arns(patterns: tuple[str, ...]) -> tuple[str, ...]:
        fleet = scope.said("fleet")
        return tuple(scope.object_arn(one.replace("{fleet}", fleet)) for one in patterns)

    # Who may not list is told "denied" of objects that are missing.
    found: list[tuple[Where, tuple[str, ...]]] = [
        (Where("Bucket", (scope.bucket_arn,)), ("s3:ListBucket",)),
        (Where("ReadObjects", arns(keys.read)), ("s3:GetObject",)),
    ]
    if keys.write:
        parts = ("s3:AbortMultipartUpload",) if "nar/*" in keys.write else ()
        found.append((Where("WriteObjects", arns(keys.write)), ("s3:PutObject", *parts)))
    if keys.remove:
        found.append((Where("RemoveObjects", arns(keys.remove)), ("s3:DeleteObject",)))
    return found


def _add(places: dict[str, tuple[Where, set[str]]], place: Where, action: str) -> None:
    known, actions = places.setdefault(place.sid, (place, set()))
    if known != place:
        raise CalveError("two statements have the same name", place=place.sid)
    actions.add(action)


def _statement(place: Where, actions: set[str]) -> dict[str, Any]:
    statement: dict[str, Any] = {
        "Sid": place.sid,
        "Effect": "Allow",
        "Action": sorted(actions),
        "Resource": list(place.resources),
    }
    if place.condition is not None:
        statement["Condition"] = {test: dict(keys) for test, keys in place.condition.items()}
    return statement


def _length(document: dict[str, Any]) -> int:
    return len(json.dumps(document, separators=(",", ":"), ensure_ascii=False))
