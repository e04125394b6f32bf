"""`calve iam`: the policies that Calve's roles need in an account."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common, fleet_options
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.fleet.config import Config, Fleet
    from calve.infra.policies import Policy
    from calve.infra.scope import Scope

__all__ = ["arguments", "run"]

_ROLES = ("builder", "releaser", "observer", "machine", "guard")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    what = parser.add_subparsers(title="what", metavar="WHAT", dest="what", required=True)
    text = "print the policy of a role, as narrow as the fleet file allows"
    show = what.add_parser("show", help=text, description=text, allow_abbrev=False)
    show.add_argument("role", metavar="ROLE", choices=_ROLES, help=f"one of {', '.join(_ROLES)}")
    show.add_argument(
        "--fleet", metavar="NAME", help="the fleet (default: the fleet file's, where it has one)"
    )
    show.add_argument(
        "--group", metavar="NAME", help="its Auto Scaling group (default: the fleet file's)"
    )
    show.add_argument("--account", metavar="ID", help="the account, 12 digits")
    show.add_argument(
        "--role-arn", metavar="ARN", help="the role of the machines, which a release passes to them"
    )
    form = show.add_mutually_exclusive_group()
    form.add_argument(
        "--terraform", action="store_true", help="print it as an aws_iam_policy resource"
    )
    form.add_argument(
        "--json", action="store_true", help="print it with its name and what is not known"
    )
    common.add_config(show)


def run(options: argparse.Namespace, session: Session) -> int:
    """Print a policy."""
    from calve.fleet.config import load
    from calve.infra.policies import policy
    from calve.infra.roles import Role
    from calve.infra.scope import Scope

    config = load(options.config)
    scope = Scope.of(
        None if config is None else config.cache,
        _fleet(config, options.fleet),
        name=options.fleet,
        group=options.group,
        account=options.account,
        machine_role=options.role_arn,
    )
    found = policy(Role(options.role), scope)
    _print(options, session, found, scope)
    return 0


def _fleet(config: Config | None, name: str | None) -> Fleet | None:
    """Return the fleet that is named, or the only one; None where no file says."""
    if config is None or not config.fleets:
        return None
    if name is None and len(config.fleets) > 1:
        return None
    return fleet_options.fleet_of(config, name)


def _print(options: argparse.Namespace, session: Session, found: Policy, scope: Scope) -> None:
    from calve.infra.scope import PLACEHOLDERS
    from calve.infra.terraform import policy_resource

    name = "-".join(part for part in ("calve", scope.fleet, found.role.value) if part)
    words = {PLACEHOLDERS[field][0]: PLACEHOLDERS[field][1] for field in found.unknown}
    if options.json:
        session.document(
            {
                "role": found.role.value,
                "name": name,
                "policy": found.document,
                "characters": found.characters,
                "placeholders": sorted(words),
            }
        )
        return
    if options.terraform:
        text = policy_resource(
            name, f"Calve's {found.role.value}: {found.role.text}", found.document
        )
        session.result(text.rstrip("\n"))
    else:
        session.result(found.dump())
    for word, source in words.items():
        session.prose(f"{word} stands for what is not known: give {source}")
