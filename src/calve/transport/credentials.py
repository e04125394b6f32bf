"""AWS credentials and where they come from.

A `Provider` gives what is valid now. `Static` and `Environment` are here, a machine's role is in `imds`, boto's
chain in `calve.aws`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from calve.errors import AccessError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping

__all__ = ["Credentials", "Environment", "Provider", "Static"]


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key pair, the token that temporary ones need, and when they end (UTC). Its repr has no secret."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    expires: dt.datetime | None = None


class Provider(Protocol):
    """Gives credentials; called before every request, by any thread."""

    def credentials(self, *, refresh: bool = False) -> Credentials:
        """Return credentials that are valid now; `refresh` says that the last ones were refused.

        Raises:
            AccessError: there are none.
        """


@dataclass(frozen=True, slots=True)
class Static:
    """The same credentials for ever."""

    value: Credentials

    def credentials(self, *, refresh: bool = False) -> Credentials:  # noqa: ARG002
        """Return them."""
        return self.value


class Environment:
    """Credentials out of AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ

    def credentials(self, *, refresh: bool = False) -> Credentials:  # noqa: ARG002
        """Return what the variables hold now; AccessError where one of the two keys is missing."""
        access_key = self._environ.get("AWS_ACCESS_KEY_ID", "").strip()
        secret_key = self._environ.get("AWS_SECRET_ACCESS_KEY", "").strip()
        if not access_key or not secret_key:
            raise AccessError(
                "no AWS credentials in the environment",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        token = self._environ.get("AWS_SESSION_TOKEN", "").strip()
        return Credentials(access_key, secret_key, token or None)
