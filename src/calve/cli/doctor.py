"""`calve doctor`: whether a fleet could be deployed to from here, and what to change where it could not.

Nothing is changed: what may be written is tried by requests that cannot succeed, what may be launched by dry runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from calve.cli import common, fleet_options
from calve.cli.session import Session
from calve.errors import AccessError, CalveError, CancelledError, NotFoundError

if TYPE_CHECKING:
    from calve.aws.account import Account
    from calve.cache.objects import Objects
    from calve.cli.fleet_options import Opened
    from calve.fleet.config import Cache, Config, Fleet
    from calve.nix.signing import Keyring
    from calve.rollout.facts import Facts, Target

__all__ = ["Row", "arguments", "run"]

T = TypeVar("T")

OK: Final = "ok"
WARNING: Final = "warning"
PROBLEM: Final = "problem"
_INFO: Final = "nix-cache-info"
_INFO_BYTES: Final = 64 * 1024
_NO_VERSION: Final = '"calve-doctor"'
"""A tag that no object's version has: a write in place of it is judged, and never done."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one look found.

    Attributes:
        state: `ok`, `warning` or `problem`.
        code: names the look, or preflight's rule.
        about: `cache`, or a fleet's name.
        message: what was found.
        hint: what to do about it; empty where there is nothing to be done.
        permission: it is for want of a permission.
    """

    state: str
    code: str
    about: str
    message: str
    hint: str = ""
    permission: bool = False

    def document(self) -> dict[str, object]:
        """Return it as JSON's types."""
        return {
            "state": self.state,
            "code": self.code,
            "about": self.about,
            "message": self.message,
            "hint": self.hint or None,
            "permission": self.permission,
        }


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser, "all that are there")
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Look at everything; exit 1 where there is a problem, 4 where only permissions are missing."""
    config = fleet_options.config_of(options)
    fleets = list(config.fleets.values())
    if options.fleet is not None:
        fleets = [fleet_options.fleet_of(config, options.fleet)]
    look = _Look(options, session)
    look.cache(config, fleets)
    if config.cache is not None:
        for fleet in fleets:
            look.fleet(fleet)
    _print(options, session, config, look.rows)
    problems = [row for row in look.rows if row.state == PROBLEM]
    if not problems:
        return 0
    return AccessError.exit_code if all(row.permission for row in problems) else 1


class _Look:
    """Looks, one after the other, and takes down what each found in `rows`."""

    def __init__(self, options: argparse.Namespace, session: Session) -> None:
        self.rows: list[Row] = []
        self._options = options
        self._session = session
        self._known: bool | None = None

    def _add(self, state: str, code: str, about: str, message: str, hint: str = "") -> None:
        self.rows.append(Row(state, code, about, message, hint))

    def _fail(self, code: str, about: str, error: CalveError, hint: str = "") -> None:
        denied = isinstance(error, AccessError)
        self.rows.append(Row(PROBLEM, code, about, str(error), error.hint or hint, denied))

    def _try(self, code: str, about: str, call: Callable[[], T], hint: str = "") -> T | None:
        """Do something; None, and a problem, where it fails: `hint` is for an error that has none."""
        try:
            return call()
        except CancelledError:
            raise
        except CalveError as error:
            self._fail(code, about, error, hint)
        return None

    # The cache

    def cache(self, config: Config, fleets: list[Fleet]) -> None:
        """Look at the cache: is it there, may it be written, which keys count, and is ours one of them."""
        cache = config.cache
        if cache is None:
            hint = 'calve.toml: [cache] with url = "s3://…"'
            self._add(PROBLEM, "cache", "cache", "the fleet file names no cache", hint)
            return
        keyring = None
        with common.caches(self._session, [cache.url]) as (objects,):
            if self._reach(objects):
                self._write(objects, "push", "pending/doctor.json")
                for fleet in fleets:
                    self._write(objects, "release", f"fleets/{fleet.name}/doctor.json")
                keyring = self._keyring(cache, objects)
        self._key(cache, keyring)

    def _reach(self, objects: Objects) -> bool:
        hint = "calve cache init sets it up"
        if self._try("cache", "cache", lambda: objects.get(_INFO, _INFO_BYTES), hint) is None:
            return False
        self._add(OK, "cache", "cache", f"{objects.url} answers")
        return True

    def _write(self, objects: Objects, code: str, key: str) -> None:
        def attempt() -> bool:
            objects.put(key, b"{}", match=_NO_VERSION)
            return True

        if self._try(code, "cache", attempt):
            self._add(OK, code, "cache", f"{key.rpartition('/')[0]}/ may be written")

    def _keyring(self, cache: Cache, objects: Objects) -> Keyring | None:
        from calve.cache import keyring as keyrings
        from calve.nix.signing import Keyring

        if not cache.trusted:
            hint = "cache.trusted; calve keys show FILE prints a public key"
            self._add(PROBLEM, "trusted", "cache", "no key is trusted", hint)
            return None
        roots = Keyring.parse(cache.trusted)
        found = self._try("keyring", "cache", lambda: keyrings.trusted([objects], roots))
        if found is None:
            return None
        names = ", ".join(key.name for key in found.keyring.keys)
        number = found.sequences.get(objects.url)
        what = "no keyring" if number is None else f"keyring {number}"
        self._add(OK, "keyring", "cache", f"{what}: {names} count")
        return found.keyring

    def _key(self, cache: Cache, keyring: Keyring | None) -> None:
        from calve.fleet import keys

        source = cache.key
        if source is None:
            text = "the fleet file names no signing key: nothing can be pushed from here"
            self._add(WARNING, "key", "cache", text, "cache.key says where it is")
            return
        key = self._try("key", "cache", lambda: keys.read(source, cancel=self._session.cancel))
        if key is None or keyring is None:
            return
        if key.public in keyring.keys:
            self._add(OK, "key", "cache", f"the signing key {key.name} is one of them")
        else:
            text = f"the signing key {key.name} does not count: no machine takes what it signs"
            hint = f"{key.public.dump()} in cache.trusted, or calve keys add"
            self._add(PROBLEM, "key", "cache", text, hint)

    # A fleet

    def fleet(self, fleet: Fleet) -> None:
        """Look at a fleet: who we are, its group, what preflight says, the role of its machines."""
        self._options.fleet = fleet.name
        self._try("aws", fleet.name, self._open)

    def _open(self) -> None:
        with fleet_options.open_fleet(self._session, self._options) as opened:
            self._fleet(opened)

    def _fleet(self, opened: Opened) -> None:
        from calve.aws.account import Account
        from calve.rollout.facts import Sources, gather
        from calve.rollout.preflight import PERMISSION, check

        name, account = opened.fleet.name, Account(opened.aws)
        if not self._caller(opened, account):
            return
        target = self._target(opened)
        sources = Sources.of(opened.gateways, opened.aws)
        facts = self._try(
            "group",
            name,
            lambda: gather(sources, opened.fleet, target, cancel=self._session.cancel),
        )
        if facts is None:
            return
        self._add(OK, "group", name, _group(facts))
        found = check(facts)
        for one in found:
            state = PROBLEM if one.refuses else WARNING
            denied = one.code == PERMISSION
            self.rows.append(Row(state, one.code, name, one.message, one.hint, denied))
        if not any(one.refuses for one in found):
            self._add(OK, "preflight", name, "nothing stands against a deploy")
        self._role(facts, opened)

    def _caller(self, opened: Opened, account: Account) -> bool:
        """Say who we are, once; False where nobody knows us, so that nothing more can be asked."""
        if self._known is not None:
            return self._known
        self._known = True
        self._add(OK, "region", "aws", str(opened.aws.region))
        try:
            self._add(OK, "credentials", "aws", account.caller())
        except AccessError as error:
            self._known = False
            self._fail("credentials", "aws", error)
        except CalveError as error:
            self._add(WARNING, "credentials", "aws", f"not checked: {error}")
        return self._known

    def _target(self, opened: Opened) -> Target:
        """Return the live release: what a machine that the group launches now will fetch."""
        from calve.cache import manifest as manifests
        from calve.fleet import history
        from calve.nix.storepath import StorePath
        from calve.rollout.facts import Target

        name, objects = opened.fleet.name, opened.gateways.objects
        live = self._try("live", name, lambda: history.live(objects, name))
        if live is None:
            return Target()
        manifest = self._try("live", name, lambda: manifests.read(objects, live.manifest))
        return Target(
            manifest, release=live, cache=opened.cache.url, live=StorePath.parse(live.system)
        )

    def _role(self, facts: Facts, opened: Opened) -> None:
        from calve.aws.profiles import Profiles

        name, template = facts.fleet.name, facts.template
        if template is None:
            return
        if template.profile is None:
            text = "the launch template names no instance profile: machines have no credentials"
            self._add(WARNING, "role", name, text, "calve iam show machine: the policy of its role")
            return
        try:
            role = Profiles(opened.aws).role(template.profile)
        except NotFoundError as error:
            self._fail("role", name, error, "calve iam show machine: the policy of its role")
        except CalveError as error:
            self._add(WARNING, "role", name, f"not checked: {error}", error.hint or "")
        else:
            self._add(OK, "role", name, f"machines have the role {role.arn}")


def _group(facts: Facts) -> str:
    group = facts.group
    what = f"{group.template_id} version {group.version}"
    return f"{group.name}: {common.plural(group.desired, 'machine')} of {what}"


def _print(options: argparse.Namespace, session: Session, config: Config, rows: list[Row]) -> None:
    from calve.ui.text import one_line

    counts = {state: sum(row.state == state for row in rows) for state in (PROBLEM, WARNING)}
    if options.json:
        session.document(
            {
                "file": str(config.path),
                "problems": counts[PROBLEM],
                "warnings": counts[WARNING],
                "checks": [row.document() for row in rows],
            }
        )
        return
    for row in rows:
        session.result(f"{row.state:<8} {row.about}: {one_line(row.message)}")
        if row.hint:
            session.result(f"{'':<8} {one_line(row.hint)}")
    session.prose(
        f"{common.plural(counts[PROBLEM], 'problem')}, {common.plural(counts[WARNING], 'warning')}"
    )
