"""EC2's tags: read, written, and the actions on those of any resource.

Source: EC2 API reference, CreateTags, DeleteTags, DescribeTags, TagSpecification; "Tag restrictions" (EC2 User
Guide): 50 a resource, keys of 128 and values of 256 characters, no key that begins with `aws:`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calve.region.query import EC2, Action, Params, filters, page
from calve.region.signature import Refusal

__all__ = ["Shelf", "Tags", "check_tags", "specified", "tag_facts", "tag_set"]

TAGS_MOST = 50
KEY_CHARACTERS = 128
VALUE_CHARACTERS = 256


def tag_set(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Write tags as EC2 answers them."""
    return [{"key": key, "value": value} for key, value in tags.items()]


def tag_facts(tags: Mapping[str, str]) -> dict[str, str]:
    """Name tags as filters do."""
    return {f"tag:{key}": value for key, value in tags.items()}


def check_tags(tags: Mapping[str, str]) -> None:
    """Refuse tags that EC2 would refuse."""
    for key, value in tags.items():
        if not 1 <= len(key) <= KEY_CHARACTERS or len(value) > VALUE_CHARACTERS:
            raise Refusal(
                400,
                "InvalidParameterValue",
                f"Tag key or value is too long: '{key}' (at most {KEY_CHARACTERS} and {VALUE_CHARACTERS}).",
            )
        if key.lower().startswith("aws:"):
            raise Refusal(
                400,
                "InvalidParameterValue",
                "Tag keys starting with 'aws:' are reserved for internal use",
            )
    if len(tags) > TAGS_MOST:
        raise Refusal(
            400, "TagLimitExceeded", f"The maximum number of Tags for a resource is {TAGS_MOST}."
        )


def specified(params: Params, *kinds: str) -> dict[str, dict[str, str]]:
    """Read TagSpecification: the tags by resource type, of which only some are allowed."""
    found: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    for item in params.structs("TagSpecification"):
        kind = item.need("ResourceType")
        if kind not in found:
            raise Refusal(
                400,
                "InvalidParameterValue",
                f"'{kind}' is not a valid taggable resource type for this operation.",
            )
        tags = _pairs(item)
        check_tags(tags)
        found[kind].update(tags)
    return found


def _pairs(params: Params) -> dict[str, str]:
    pairs = [(one.need("Key"), one.text("Value") or "") for one in params.structs("Tag")]
    tags = dict(pairs)
    if len(tags) < len(pairs):
        raise Refusal(400, "InvalidParameterValue", "Duplicate tag keys were specified.")
    return tags


@dataclass(frozen=True, slots=True)
class Shelf:
    """Resources of one kind.

    Attributes:
        kind: As TagSpecification names it.
        missing: The code where an id is not there.
        all: Tags by id, of all that there are.
        put: Replaces the tags of one.
    """

    kind: str
    missing: str
    all: Callable[[], Mapping[str, Mapping[str, str]]]
    put: Callable[[str, Mapping[str, str]], object]


class Tags:
    """The actions on tags.

    Args:
        shelves: By the prefix of their resources' ids, such as `snap`.
    """

    dialect = EC2

    def __init__(self, shelves: Mapping[str, Shelf]) -> None:
        self._shelves = shelves
        self.actions: Mapping[str, Action] = {
            "CreateTags": self._create,
            "DeleteTags": self._delete,
            "DescribeTags": self._describe,
        }

    def _create(self, params: Params, _now: float) -> Mapping[str, Any]:
        found, tags = self._found(params), _pairs(params)
        params.done()
        changed = [(shelf, one, {**old, **tags}) for shelf, one, old in found]
        check_tags(tags)
        for _, _, new in changed:
            check_tags(new)
        for shelf, one, new in changed:
            shelf.put(one, new)
        return {"return": True}

    def _delete(self, params: Params, _now: float) -> Mapping[str, Any]:
        found = self._found(params)
        wanted = [(one.need("Key"), one.text("Value")) for one in params.structs("Tag")]
        params.done()
        for shelf, one, old in found:
            gone = {key for key, value in wanted if value in {None, old.get(key)}}
            gone = gone if wanted else set(old)
            shelf.put(one, {key: value for key, value in old.items() if key not in gone})
        return {"return": True}

    def _found(self, params: Params) -> list[tuple[Shelf, str, Mapping[str, str]]]:
        ids = params.strings("ResourceId")
        if not ids:
            raise Refusal(
                400, "MissingParameter", "The request must contain the parameter resourceIdSet"
            )
        found = []
        for one in ids:
            prefix, _, rest = one.partition("-")
            shelf = self._shelves.get(prefix)
            if shelf is None or not re.fullmatch(r"[0-9a-f]{8,17}", rest):
                raise Refusal(400, "InvalidID", f"The ID '{one}' is not valid")
            tags = shelf.all().get(one)
            if tags is None:
                raise Refusal(400, shelf.missing, f"The ID '{one}' does not exist")
            found.append((shelf, one, tags))
        return found

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        match = filters(params, {"resource-id", "resource-type", "key", "value"})
        rows = [
            {"resourceId": one, "resourceType": shelf.kind, "key": key, "value": value}
            for shelf in self._shelves.values()
            for one, tags in shelf.all().items()
            for key, value in tags.items()
        ]
        found = [
            row
            for row in rows
            if match(
                {
                    "resource-id": row["resourceId"],
                    "resource-type": row["resourceType"],
                    "key": row["key"],
                    "value": row["value"],
                    f"tag:{row['key']}": row["value"],
                }
            )
        ]
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=1000)
        params.done()
        return {"tagSet": list(shown), "nextToken": token}
