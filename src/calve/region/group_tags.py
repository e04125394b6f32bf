"""Auto Scaling's tags: read, shown, filtered by, and the actions on them.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), CreateOrUpdateTags, DeleteTags, DescribeTags, Tag, Filter;
User Guide, "Tag Auto Scaling groups and instances" (50 a group, no key that begins with `aws:`). Running instances keep
the tags that they were launched with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from calve.region.group import Group, find, invalid
from calve.region.query import page
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from calve.region.query import Action, Params

__all__ = ["TagActions", "group_filter", "tag_rows", "tagged"]

KIND = "auto-scaling-group"
MOST_TAGS = 50
KEY_CHARACTERS, VALUE_CHARACTERS = 128, 256


class _Tag(NamedTuple):
    group: str | None
    key: str
    value: str | None
    propagates: bool


class TagActions:
    """The actions.

    Args:
        groups: The region's groups by name; changed in place.
    """

    def __init__(self, groups: dict[str, Group]) -> None:
        self._groups = groups
        self.actions: Mapping[str, Action] = {
            "CreateOrUpdateTags": self._put,
            "DeleteTags": self._delete,
            "DescribeTags": self._describe,
        }

    def _put(self, params: Params, _now: float) -> Mapping[str, Any]:
        tags = _read(params)
        params.done()
        changed = {name: find(self._groups, name) for name in _names(tags)}
        for tag in tags:
            name = str(tag.group)
            changed[name] = _with(changed[name], tag)
        self._groups.update(changed)
        return {}

    def _delete(self, params: Params, _now: float) -> Mapping[str, Any]:
        tags = _read(params)
        params.done()
        changed = {name: find(self._groups, name) for name in _names(tags)}
        for tag in tags:
            group = changed[str(tag.group)]
            there = {**group.tags, **group.own_tags}
            if tag.value is None or there.get(tag.key) == tag.value:
                changed[group.name] = _without(group, tag.key)
        self._groups.update(changed)
        return {}

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        wanted = _wanted(params, {KIND, "key", "value", "propagate-at-launch"})
        rows = [row for group in self._groups.values() for row in tag_rows(group)]
        found = [row for row in rows if all(_facts(row)[name] in ok for name, ok in wanted)]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"Tags": shown, "NextToken": token}


def tagged(group: Group, params: Params) -> Group:
    """Give a group that is being created the tags of the request."""
    for tag in _read(params):
        group = _with(group, tag)
    return group


def tag_rows(group: Group) -> list[dict[str, Any]]:
    """Show a group's tags."""
    both = ((group.tags, True), (group.own_tags, False))
    return [
        {
            "ResourceId": group.name,
            "ResourceType": KIND,
            "Key": key,
            "Value": value,
            "PropagateAtLaunch": propagates,
        }
        for tags, propagates in both
        for key, value in tags.items()
    ]


def group_filter(params: Params) -> Callable[[Group], bool]:
    """Read the filters of DescribeAutoScalingGroups; return what says whether a group passes all of them."""
    wanted = _wanted(params, {"tag-key", "tag-value"})

    def passes(group: Group) -> bool:
        tags = {**group.tags, **group.own_tags}
        have = {"tag-key": set(tags), "tag-value": set(tags.values())}
        return all(
            have[name] & ok if name in have else tags.get(name.removeprefix("tag:")) in ok
            for name, ok in wanted
        )

    return passes


def _wanted(params: Params, known: set[str]) -> list[tuple[str, set[str]]]:
    """Read filters: names, of which each has one of the values; `tag:KEY` where `tag-key` is known."""
    wanted = []
    for item in params.structs("Filters"):
        name, values = item.need("Name"), item.strings("Values") or []
        if name not in known and not ("tag-key" in known and name.startswith("tag:")):
            allowed = " ".join(sorted(known))
            raise invalid(f"Filter type {name} is not correct. Allowed Filter types are: {allowed}")
        wanted.append((name, set(values)))
    return wanted


def _facts(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        KIND: row["ResourceId"],
        "key": row["Key"],
        "value": row["Value"],
        "propagate-at-launch": str(row["PropagateAtLaunch"]).lower(),
    }


def _read(params: Params) -> list[_Tag]:
    found = []
    for one in params.structs("Tags"):
        kind = one.text("ResourceType")
        if kind not in {None, KIND}:
            raise invalid(f"The resource type '{kind}' is not valid; it is {KIND}")
        tag = _Tag(
            one.text("ResourceId"),
            one.need("Key"),
            one.text("Value"),
            one.boolean("PropagateAtLaunch") is not False,
        )
        if len(tag.key) > KEY_CHARACTERS or len(tag.value or "") > VALUE_CHARACTERS:
            raise invalid(
                f"The tag '{tag.key}' is too long: at most {KEY_CHARACTERS} and {VALUE_CHARACTERS}"
            )
        if tag.key.lower().startswith("aws:"):
            raise invalid("Tag keys starting with 'aws:' are reserved for system use")
        found.append(tag)
    return found


def _names(tags: list[_Tag]) -> list[str]:
    if not tags:
        raise invalid("The request must contain the parameter Tags")
    names = [tag.group for tag in tags]
    if None in names:
        raise invalid("The ResourceId of a tag must be given")
    return [str(name) for name in names]


def _with(group: Group, tag: _Tag) -> Group:
    bare = _without(group, tag.key)
    added = {tag.key: tag.value or ""}
    if tag.propagates:
        after = replace(bare, tags={**bare.tags, **added})
    else:
        after = replace(bare, own_tags={**bare.own_tags, **added})
    if len(after.tags) + len(after.own_tags) > MOST_TAGS:
        raise Refusal(400, "LimitExceeded", f"A group has at most {MOST_TAGS} tags")
    return after


def _without(group: Group, key: str) -> Group:
    return replace(
        group,
        tags={name: value for name, value in group.tags.items() if name != key},
        own_tags={name: value for name, value in group.own_tags.items() if name != key},
    )
