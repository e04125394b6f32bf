"""The one place that opens boto3 clients, maps their errors to ours and lends boto's credentials to others."""

from __future__ import annotations

import datetime
import functools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from calve.errors import (
    AccessError,
    CalveError,
    ConflictError,
    NotFoundError,
    TransientError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from calve.transport.credentials import Credentials, Provider

__all__ = ["Session", "actions_of", "credentials_provider", "default_region", "needs"]

P = ParamSpec("P")
R = TypeVar("R")

CONNECT_S, READ_S, ATTEMPTS = 5, 30, 5
_ACCESS = {
    "AccessDenied",
    "AccessDeniedException",
    "AuthFailure",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "OptInRequired",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "UnauthorizedOperation",
    "UnrecognizedClientException",
}
_CONFLICT = {
    "AlreadyExists",
    "DuplicateTargetGroupName",
    "IdempotentParameterMismatch",
    "InstanceRefreshInProgress",
    "InvalidAMIName.Duplicate",
    "InvalidLaunchTemplateName.AlreadyExistsException",
    "InvalidSnapshot.InUse",
    "IrreversibleInstanceRefresh",
    "ResourceContention",
    "ResourceInUse",
    "ScalingActivityInProgress",
}
_TRANSIENT = {
    "InternalError",
    "InternalFailure",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "Throttling",
    "ThrottlingException",
}


@dataclass(frozen=True, slots=True)
class Session:
    """Where clients go and as whom.

    Attributes:
        region: The region's name; None for what boto's configuration says.
        endpoint: One URL for every service, in place of AWS's own.
        profile: A profile of boto's configuration; None for its default chain.
        credentials: Keys that go before boto's chain.
    """

    region: str | None = None
    endpoint: str | None = None
    profile: str | None = None
    credentials: Credentials | None = None

    def client(self, service: str, *, path_style: bool = False) -> Any:
        """Make a boto3 client.

        Args:
            service: boto's name of it.
            path_style: For S3: buckets stand in the path, not in the host's name.

        Raises:
            AccessError: The profile does not exist.
            CalveError: No region is configured.
        """
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        keys = self.credentials
        config = Config(
            connect_timeout=CONNECT_S,
            read_timeout=READ_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            proxies={} if self.endpoint is not None else None,
            s3={"addressing_style": "path"} if path_style else None,
        )
        try:
            return _boto3_session(self.profile, self.region).client(
                service,
                endpoint_url=self.endpoint,
                config=config,
                aws_access_key_id=keys.access_key if keys else None,
                aws_secret_access_key=keys.secret_key if keys else None,
                aws_session_token=keys.token if keys else None,
            )
        except BotoCoreError as error:
            raise _from_botocore(error, ()) from error


def _boto3_session(profile: str | None, region: str | None) -> Any:
    """Make a boto3 session; all share the models of services, which take 0.2 s to read."""
    import boto3
    import botocore.session

    core = botocore.session.Session(profile=profile)
    loader = _models()
    core.register_component("data_loader", loader)
    made = boto3.session.Session(botocore_session=core, region_name=region)
    loader.search_paths[:] = dict.fromkeys(loader.search_paths)  # each session adds boto3's own
    return made


@functools.cache
def _models() -> Any:
    import botocore.loaders

    return botocore.loaders.create_loader()


def needs(*actions: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a gateway's method with the IAM actions it needs, and map the errors it meets.

    The actions stand on the method as `actions`; see `actions_of`.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            from botocore.exceptions import BotoCoreError, ClientError

            try:
                return method(*args, **kwargs)
            except ClientError as error:
                raise _from_service(error, actions) from error
            except BotoCoreError as error:
                raise _from_botocore(error, actions) from error

        call.actions = actions  # type: ignore[attr-defined]
        return call

    return decorate


def actions_of(gateway: type) -> frozenset[str]:
    """Return every IAM action that a gateway's methods need."""
    found: set[str] = set()
    for member in vars(gateway).values():
        found.update(getattr(member, "actions", ()))
    return frozenset(found)


def _from_service(error: Any, actions: tuple[str, ...]) -> CalveError:
    """Map an error that a service answered; `error` is botocore's ClientError."""
    code = str(error.response.get("Error", {}).get("Code", "Unknown"))
    said = str(error.response.get("Error", {}).get("Message", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    place, message = error.operation_name, f"{code}: {said}"
    if code in _ACCESS:
        permission = ", ".join(actions)
        denied = AccessError(message, place=place, hint=f"the caller needs {permission}")
        denied.permission = permission
        return denied
    if code in _CONFLICT:
        return ConflictError(message, place=place)
    if _is_absent(code, said):
        return NotFoundError(message, place=place)
    if code in _TRANSIENT or status >= 500:
        return TransientError(message, place=place)
    return CalveError(message, place=place)


def _is_absent(code: str, message: str) -> bool:
    """Say whether this is about a thing that does not exist; Auto Scaling has no code of its own for that."""
    if code == "ValidationError":
        return "not found" in message or "does not exist" in message
    return "NotFound" in code or code == "NoSuchEntity"


def _from_botocore(error: Exception, actions: tuple[str, ...]) -> CalveError:
    """Map an error that boto met before or without an answer."""
    from botocore import exceptions

    message = str(error)
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError
        | exceptions.TokenRetrievalError
        | exceptions.SSOError
        | exceptions.ProfileNotFound,
    ):
        return AccessError(message, hint="set AWS_PROFILE, or sign in with `aws sso login`")
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return TransientError(message)
    if isinstance(error, exceptions.NoRegionError):
        return CalveError(message, hint="set AWS_REGION, or the region in the URL or the profile")
    return CalveError(message, place=", ".join(actions) or None)


class _BotoProvider:
    """boto's chain as a `transport.credentials.Provider`; boto refreshes what expires."""

    def __init__(self, profile: str | None) -> None:
        self._profile = profile
        self._chain: Any = None
        self._lock = threading.Lock()

    def credentials(self, *, refresh: bool = False) -> Credentials:
        """Return the keys in force; `refresh` looks for them anew.

        Raises:
            AccessError: There are none, or they cannot be fetched.
        """
        from botocore.exceptions import BotoCoreError

        from calve.transport.credentials import Credentials

        try:
            with self._lock:
                if self._chain is None or refresh:
                    self._chain = _boto3_session(self._profile, None).get_credentials()
                chain = self._chain
            if chain is None:
                raise AccessError(
                    "no AWS credentials were found",
                    hint="set AWS_PROFILE, or sign in with `aws sso login`",
                )
            frozen = chain.get_frozen_credentials()
        except BotoCoreError as error:
            raise _from_botocore(error, ()) from error
        expires = getattr(chain, "_expiry_time", None)
        if not isinstance(expires, datetime.datetime):
            expires = None
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token, expires)


def credentials_provider(profile: str | None = None) -> Provider:
    """Give boto's chain of credentials (environment, profile, SSO, container, instance) to the HTTP client."""
    return _BotoProvider(profile)


def default_region() -> str:
    """Return the region where none is named: AWS_REGION, else what boto's configuration says.

    Raises:
        UsageError: neither says one.
        AccessError: the profile that the environment names does not exist.
    """
    from botocore.exceptions import BotoCoreError

    named = os.environ.get("AWS_REGION")  # boto itself only knows AWS_DEFAULT_REGION
    if named:
        return named
    try:
        found = _boto3_session(None, None).region_name
    except BotoCoreError as error:
        raise _from_botocore(error, ()) from error
    if not found:
        raise UsageError(
            "no region is named", hint="give --region, or set AWS_REGION or the profile's region"
        )
    return str(found)
