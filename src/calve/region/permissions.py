"""Who may use a snapshot or an image beside its owner, as EC2's attributes say it.

Source: EC2 API reference, ModifySnapshotAttribute and ModifyImageAttribute: either a structure with `Add` and
`Remove`, or an operation type with user ids and groups. The only group is `all`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.region.query import Params

__all__ = ["change", "rows"]


def change(params: Params, name: str, current: frozenset[str]) -> frozenset[str]:
    """Read what a request changes; return who may use it then.

    Args:
        params: The request's.
        name: The structure's, such as `LaunchPermission`.
        current: Account ids, and `all`.
    """
    added: set[str] = set()
    removed: set[str] = set()
    structure = params.struct(name)
    if structure is not None:
        added.update(_listed(structure.structs("Add")))
        removed.update(_listed(structure.structs("Remove")))
    kind = params.text("OperationType")
    several = {*(params.strings("UserId") or ()), *(params.strings("UserGroup") or ())}
    if several and kind not in {"add", "remove"}:
        raise Refusal(
            400, "MissingParameter", "The request must contain the parameter OperationType"
        )
    (added if kind == "add" else removed).update(several)
    for one in added | removed:
        if one != "all" and not re.fullmatch(r"[0-9]{12}", one):
            raise Refusal(
                400, "InvalidParameterValue", f"'{one}' is no account and no group 'all'."
            )
    return (current | added) - removed


def _listed(items: Iterable[Params]) -> list[str]:
    return [item.text("UserId") or item.need("Group") for item in items]


def rows(current: frozenset[str]) -> list[dict[str, Any]]:
    """Write permissions as EC2 answers them."""
    return [{"group": one} if one == "all" else {"userId": one} for one in sorted(current)]
