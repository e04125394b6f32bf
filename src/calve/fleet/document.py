"""calve.toml as it is written: the tables and their types, before anything is understood.

Imported by `fleet.config` when a file is read, and by nothing else: it is what needs msgspec.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from calve.errors import UsageError

__all__ = ["CacheTable", "FleetTable", "HealthTable", "KeyTable", "RolloutTable", "convert"]

T = TypeVar("T", bound=msgspec.Struct)

_KINDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "object": "a table",
    "str": "text",
}


class Table(msgspec.Struct, frozen=True, rename="kebab"):
    """A table of the file; fields are keys, `min_healthy` is `min-healthy`."""


class KeyTable(Table, frozen=True):
    """Where the signing key comes from: exactly one of them."""

    file: str | None = None
    env: str | None = None
    command: list[str] | None = None
    ssm: str | None = None
    secretsmanager: str | None = None


class CacheTable(Table, frozen=True):
    """The binary cache."""

    url: str
    key: KeyTable | None = None
    root_key: KeyTable | None = None
    trusted: list[str] = []


class HealthTable(Table, frozen=True):
    """What makes a machine healthy: exactly one of `http` and `tcp`."""

    http: str | None = None
    tcp: int | None = None
    within: str = "3m"


class RolloutTable(Table, frozen=True):
    """How a release is put on the fleet."""

    min_healthy: int = 100
    max_healthy: int | None = None
    bake: str = "2m"
    warm_up: str = "0s"
    strategy: str = "rolling"
    canary: str = "5m"
    alarms: list[str] = []


class FleetTable(Table, frozen=True):
    """One fleet."""

    system: str
    delivery: str = "initrd"
    group: str | None = None
    health: HealthTable | None = None
    rollout: RolloutTable = RolloutTable()


def convert(value: Any, kind: type[T], path: str, place: object) -> T:
    """Turn a table into its type.

    Args:
        value: as the TOML reader gives it.
        kind: which table it is.
        path: its own in the file, "fleet.web".
        place: the file.

    Raises:
        UsageError: a key is not known, missing, or of the wrong type; it names the key.
    """
    _check_keys(value, kind, path, place)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise UsageError(_explain(what, path + where.rstrip("`")), place=place) from None


def _check_keys(value: Any, kind: type[msgspec.Struct], path: str, place: object) -> None:
    """Refuse keys that are not known, here and in the tables inside, with the one that was meant."""
    if not isinstance(value, dict):
        return  # convert says so
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, inner in value.items():
        field = fields.get(name)
        if field is None:
            raise unknown(f"{path}.{name}", name, fields, place)
        for table in (HealthTable, KeyTable, RolloutTable):
            if field.type in {table, table | None}:
                _check_keys(inner, table, f"{path}.{name}", place)


def unknown(path: str, name: str, known: Any, place: object) -> UsageError:
    """Return the error for a name that is not known; its hint is the one that was meant, or all there are."""
    import difflib

    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
    return UsageError(f"{path}: is not known", place=place, hint=hint)


def _explain(what: str, path: str) -> str:
    """Put msgspec's sentence into words of the file: "Expected `int`, got `str`" and a missing field."""
    parts = what.split("`")
    if what.startswith("Object missing required field"):
        return f"{path}.{parts[1]}: is missing"
    if what.startswith("Expected `") and len(parts) >= 4:
        wanted, found = (
            _KINDS.get(name.removesuffix(" | null"), name) for name in (parts[1], parts[3])
        )
        return f"{path}: must be {wanted}, not {found}"
    return f"{path}: {what}"
