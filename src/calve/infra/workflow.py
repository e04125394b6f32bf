"""The workflow that builds, pushes and deploys a fleet, with credentials that nobody keeps.

GitHub gives the run a token, AWS gives a role for it for an hour. Two runs for one fleet wait for
each other; one that has begun is never cancelled: a release that stands half-way is nobody's.
Source: GitHub Docs, "Configuring OpenID Connect in Amazon Web Services", "Control the concurrency
of workflows and jobs".
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from calve.fleet.config import Environment, File
from calve.fleet.system import attribute

if TYPE_CHECKING:
    from pathlib import Path

    from calve.fleet.config import KeySource

__all__ = ["KEY_NAME", "ROLE_NAME", "Workflow"]

KEY_NAME: Final = "CALVE_SIGNING_KEY"
"""The repository's secret that has the signing key."""
ROLE_NAME: Final = "CALVE_ROLE_ARN"
"""The repository's variable that has the role's ARN."""

_CHECKOUT: Final = "actions/checkout@v5"
_NIX: Final = "cachix/install-nix-action@v31"
_CREDENTIALS: Final = "aws-actions/configure-aws-credentials@v6"


@dataclass(frozen=True, slots=True)
class Workflow:
    """One fleet's workflow.

    Attributes:
        fleet: its name.
        system: as in the fleet file; of a flake it is built and pushed in steps of their own.
        region: of its group.
        key: where the fleet file looks for the signing key. One in a file or a variable comes out
            of a secret of the repository; for one in AWS the role does.
        directory: of the fleet file, and of the repository.
    """

    fleet: str
    system: str
    region: str
    key: KeySource | None
    directory: Path

    def text(self) -> str:
        """Return the file's text."""
        return (
            _HEAD.format(fleet=self.fleet)
            + (_environment(self.key.name) if isinstance(self.key, Environment) else "")
            + _steps(self.region)
            + (_key_step(self._key_file(self.key)) if isinstance(self.key, File) else "")
            + (_build_steps(self.system) if "#" in self.system else "")
            + _deploy_step(self.fleet)
        )

    def _key_file(self, key: File) -> str:
        inside = key.path.is_relative_to(self.directory)
        return str(key.path.relative_to(self.directory) if inside else key.path)


# The doubled braces are GitHub's.
_HEAD: Final = """\
# Builds, pushes and deploys the fleet {fleet}. Written by `calve init`; it is yours now.
name: deploy {fleet}

on:
  push:
    branches: [main]
  workflow_dispatch:

permissions:
  contents: read
  id-token: write # for the role

concurrency:
  group: calve-{fleet}
  cancel-in-progress: false

jobs:
  deploy:
    runs-on: ubuntu-latest
    timeout-minutes: 60
"""


def _environment(name: str) -> str:
    return f"""\
    env:
      {name}: ${{{{ secrets.{name} }}}}
"""


def _steps(region: str) -> str:
    return f"""\
    steps:
      - uses: {_CHECKOUT}
        with:
          persist-credentials: false
      - uses: {_NIX}
      - name: Install Calve
        run: pipx install calve
      - uses: {_CREDENTIALS}
        with:
          # A role with the policies of `calve iam show builder` and `calve iam show releaser`.
          role-to-assume: ${{{{ vars.{ROLE_NAME} }}}}
          aws-region: {region}
"""


def _key_step(file: str) -> str:
    return f"""\
      - name: Take the signing key out of its secret
        run: |
          (umask 077 && printenv {KEY_NAME} > {shlex.quote(file)})
        env:
          {KEY_NAME}: ${{{{ secrets.{KEY_NAME} }}}}
"""


def _build_steps(system: str) -> str:
    return f"""\
      - name: Build
        run: |
          nix build --print-build-logs --out-link result {shlex.quote(attribute(system))}
      - name: Push
        run: calve push ./result --json
"""


def _deploy_step(fleet: str) -> str:
    return f"""\
      - name: Deploy
        run: calve deploy {fleet} --yes --json
"""
