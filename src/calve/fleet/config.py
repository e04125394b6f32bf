"""calve.toml: the cache, and the fleets with their systems, health checks and rollouts.

docs/reference/calve-toml.md describes every key. What is wrong in the file is a UsageError that names the file, the
line where it can be told, and the key. Types only: nothing here asks AWS or evaluates Nix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calve.contract.health import MOST_S
from calve.errors import CalveError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.cache.url import S3
    from calve.fleet.document import CacheTable, FleetTable, HealthTable, KeyTable, RolloutTable

__all__ = [
    "FILE_NAME",
    "FLEET_NAME",
    "MOST_ALARMS",
    "MOST_BAKE_S",
    "Cache",
    "Command",
    "Config",
    "Delivery",
    "Environment",
    "File",
    "Fleet",
    "Health",
    "KeySource",
    "Parameter",
    "Rollout",
    "Secret",
    "Strategy",
    "load",
    "parse",
]

FILE_NAME = "calve.toml"

E = TypeVar("E", bound=StrEnum)

_MAX_BYTES = 1 << 20
FLEET_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""Lower-case letters, digits and -, at most 63: it stands in keys, tags and descriptions."""
_DURATION = re.compile(r"(?=[0-9])(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?")
_MAX_WARMUP_S = 2 * 3600
MOST_BAKE_S = 48 * 3600
"""Auto Scaling's bound."""
MOST_ALARMS = 10
"""That Auto Scaling takes."""
_ARN = re.compile(r"arn:aws[a-z-]*:(ssm|secretsmanager):([a-z0-9-]{1,40}):[0-9]{12}:.+")


class Delivery(StrEnum):
    """How a release gets onto machines."""

    INITRD = "initrd"
    IMAGE = "image"
    SSH = "ssh"
    USER_DATA_BUILD = "user-data-build"
    USER_DATA_PULL = "user-data-pull"


class Strategy(StrEnum):
    """How machines are replaced: as many at a time as the bounds allow, or one first, and a pause."""

    ROLLING = "rolling"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class File:
    """A key in a file; a relative path is meant from the directory of calve.toml."""

    path: Path


@dataclass(frozen=True, slots=True)
class Environment:
    """A key in an environment variable."""

    name: str


@dataclass(frozen=True, slots=True)
class Command:
    """A key on a command's standard output; it runs in `directory`."""

    argv: tuple[str, ...]
    directory: Path


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key in a SecureString of Systems Manager's parameter store; None of region or profile is boto's default."""

    name: str
    region: str | None = None
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class Secret:
    """A key in Secrets Manager: the name or ARN of a secret; None of region or profile is boto's default."""

    id: str
    region: str | None = None
    profile: str | None = None


KeySource = File | Environment | Command | Parameter | Secret


@dataclass(frozen=True, slots=True)
class Cache:
    """The binary cache.

    Attributes:
        url: its own.
        key: signs what is pushed.
        trusted: public keys, `name:base64`: the root keys, where the cache has a keyring.
        root_key: signs the keyring.
    """

    url: str
    key: KeySource | None = None
    trusted: tuple[str, ...] = ()
    root_key: KeySource | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """What a machine must answer, within so many seconds from its launch: a path by HTTP, or a TCP port."""

    http: str | None
    tcp: int | None
    within_s: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """How a release is put on the fleet.

    Attributes:
        min_healthy_percent: of the group's size, and `max_healthy_percent`: bounds of the healthy machines.
        bake_s: how long all must stay well at the end.
        warmup_s: how long a machine is in service before it counts.
        strategy: `canary` pauses for `canary_s` after the first machine.
        alarms: names of CloudWatch alarms; one that goes off rolls back.
    """

    min_healthy_percent: int
    max_healthy_percent: int
    bake_s: int
    warmup_s: int = 0
    strategy: Strategy = Strategy.ROLLING
    canary_s: int = 300
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fleet:
    """One Auto Scaling group and what belongs to it.

    Attributes:
        name: its own.
        system: a flake attribute, a file or a store path, as written; relative to the file's directory.
        delivery: how a release gets onto machines.
        group: the Auto Scaling group, by name or tag.
        health: None is the balancer's judgement alone.
        rollout: the rules.
    """

    name: str
    system: str
    delivery: Delivery
    group: str
    health: Health | None
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class Config:
    """A fleet file; `path` is where it was read from."""

    path: Path
    cache: Cache | None
    fleets: Mapping[str, Fleet]


def load(path: Path | None = None) -> Config | None:
    """Read a fleet file.

    Args:
        path: the file; None is ./calve.toml, where there is one.

    Returns:
        None where no file was named and there is none.

    Raises:
        NotFoundError: there is no such file.
        UsageError: something in it is wrong.
    """
    where = Path(FILE_NAME) if path is None else path
    try:
        with where.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        if path is None:
            return None
        raise NotFoundError("there is no such file", place=where) from error
    except OSError as error:
        raise CalveError(f"cannot be read: {error.strerror}", place=where) from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"longer than {_MAX_BYTES >> 20} MiB", place=where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8", place=where) from error
    return parse(text, where)


def parse(text: str, path: Path) -> Config:
    """Read a fleet file's text; UsageError where something in it is wrong."""
    import tomllib

    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise UsageError(f"not TOML: {error}", place=path) from error
    try:
        return _Reader(path).read(document)
    except UsageError as error:
        from calve.fleet.places import line_of

        line = line_of(text, error.message.partition(":")[0])
        place = path if line is None else f"{path}:{line}"
        raise UsageError(error.message, place=place, hint=error.hint) from error


class _Reader:
    """Turns the tables of one file into what they mean."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._base = path.absolute().parent

    def read(self, document: Mapping[str, Any]) -> Config:
        from calve.fleet.document import CacheTable, FleetTable, convert, unknown

        for name in document:
            if name not in {"cache", "fleet"}:
                raise unknown(name, name, ("cache", "fleet"), self._path)
        cache = None
        if "cache" in document:
            cache = self._cache(convert(document["cache"], CacheTable, "cache", self._path))
        tables = document.get("fleet", {})
        if not isinstance(tables, dict) or not all(
            isinstance(one, dict) for one in tables.values()
        ):
            raise self._wrong("fleet", "must be tables, [fleet.NAME]")
        fleets = {}
        for name, table in tables.items():
            path = f"fleet.{name}"
            if not FLEET_NAME.fullmatch(name):
                raise self._wrong(
                    path, "a fleet's name has lower-case letters, digits and -, at most 63"
                )
            fleets[name] = self._fleet(name, convert(table, FleetTable, path, self._path), path)
        return Config(self._path, cache, fleets)

    def _wrong(self, path: str, why: str, hint: str | None = None) -> UsageError:
        return UsageError(f"{path}: {why}", place=self._path, hint=hint)

    # The cache

    def _cache(self, table: CacheTable) -> Cache:
        from calve.cache import url as urls
        from calve.nix.signing import PublicKey

        try:
            place = urls.parse(table.url)
        except UsageError as error:
            raise self._wrong("cache.url", error.message, error.hint) from error
        for at, text in enumerate(table.trusted):
            try:
                PublicKey.parse(text)
            except UsageError as error:
                raise self._wrong(f"cache.trusted[{at}]", error.message, error.hint) from error
        bucket = place if isinstance(place, urls.S3) else None
        key = None if table.key is None else self._key(table.key, "cache.key", bucket)
        root = table.root_key
        root_key = None if root is None else self._key(root, "cache.root-key", bucket)
        return Cache(table.url, key, tuple(table.trusted), root_key)

    def _key(self, table: KeyTable, path: str, bucket: S3 | None) -> KeySource:
        names = table.__struct_fields__
        given = [name for name in names if getattr(table, name) is not None]
        if len(given) != 1:
            raise self._wrong(
                path, f"must have exactly one of {', '.join(names[:-1])} and {names[-1]}"
            )
        value = getattr(table, given[0])
        if not value or not value[0] or any("\0" in text for text in value):
            raise self._wrong(f"{path}.{given[0]}", "is empty, or has a NUL")
        if table.file is not None:
            return File(self._base / table.file)
        if table.env is not None:
            return Environment(table.env)
        if table.command is not None:
            return Command(tuple(table.command), self._base)
        # An ARN says where it is; else it is where the bucket is.
        region, profile = (None, None) if bucket is None else (bucket.region, bucket.profile)
        arn = _ARN.fullmatch(value)
        if arn is not None:
            region = arn[2]
        if (arn is not None and arn[1] != given[0]) or (arn is None and value.startswith("arn:")):
            raise self._wrong(f"{path}.{given[0]}", f"is an ARN, but not one of {given[0]}")
        return (Parameter if table.ssm is not None else Secret)(value, region, profile)

    # Fleets

    def _fleet(self, name: str, table: FleetTable, path: str) -> Fleet:
        if not table.system:
            raise self._wrong(f"{path}.system", "is empty")
        group = name if table.group is None else table.group
        if not group:
            raise self._wrong(f"{path}.group", "is empty")
        return Fleet(
            name=name,
            system=table.system,
            delivery=self._member(Delivery, table.delivery, f"{path}.delivery", "a delivery"),
            group=group,
            health=None if table.health is None else self._health(table.health, f"{path}.health"),
            rollout=self._rollout(table.rollout, f"{path}.rollout"),
        )

    def _member(self, kind: type[E], text: str, path: str, what: str) -> E:
        """Read a word as a member of an enumeration; the error names the one that was meant."""
        from calve.fleet.document import unknown

        try:
            return kind(text)
        except ValueError:
            hint = unknown(path, text, [str(each.value) for each in kind], self._path).hint
            raise self._wrong(path, f"{text!r} is not {what}", hint) from None

    def _health(self, table: HealthTable, path: str) -> Health:
        if (table.http is None) == (table.tcp is None):
            raise self._wrong(path, "must have exactly one of http and tcp")
        if table.http is not None and not table.http.startswith("/"):
            raise self._wrong(f"{path}.http", 'must be a path such as "/healthz"')
        if table.tcp is not None and not 1 <= table.tcp <= 65535:
            raise self._wrong(f"{path}.tcp", "must be a port, 1 to 65535")
        within_s = self._duration(table.within, f"{path}.within", "3m", 1, MOST_S)
        return Health(table.http, table.tcp, within_s)

    def _rollout(self, table: RolloutTable, path: str) -> Rollout:
        lowest = table.min_healthy
        if not 0 <= lowest <= 100:
            raise self._wrong(f"{path}.min-healthy", "must be a percentage, 0 to 100")
        highest = lowest + 100 if table.max_healthy is None else table.max_healthy
        if not 100 <= highest <= 200:
            raise self._wrong(f"{path}.max-healthy", "must be a percentage, 100 to 200")
        if highest - lowest > 100:
            raise self._wrong(
                f"{path}.max-healthy", "must not be more than 100 above min-healthy"
            )  # Auto Scaling's rule
        bake_s = self._duration(table.bake, f"{path}.bake", "2m", 0, MOST_BAKE_S)
        warmup_s = self._duration(table.warm_up, f"{path}.warm-up", "30s", 0, _MAX_WARMUP_S)
        canary_s = self._duration(table.canary, f"{path}.canary", "5m", 0, MOST_BAKE_S)
        if len(table.alarms) > MOST_ALARMS:
            raise self._wrong(f"{path}.alarms", f"must be at most {MOST_ALARMS}")
        return Rollout(
            lowest,
            highest,
            bake_s,
            warmup_s,
            self._member(Strategy, table.strategy, f"{path}.strategy", "a strategy"),
            canary_s,
            tuple(table.alarms),
        )

    def _duration(self, text: str, path: str, example: str, least_s: int, most_s: int) -> int:
        """Read "90s", "3m", "1h30m" as seconds."""
        match = _DURATION.fullmatch(text)
        if match is None:
            raise self._wrong(path, f'must be a duration such as "{example}"')
        hours, minutes, seconds = (int(part or 0) for part in match.groups())
        value_s = hours * 3600 + minutes * 60 + seconds
        if not least_s <= value_s <= most_s:
            raise self._wrong(path, f"must be from {least_s}s to {most_s // 3600}h")
        return value_s
