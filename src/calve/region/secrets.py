"""Secrets as AWS keeps them: Systems Manager's GetParameter and Secrets Manager's GetSecretValue, in JSON 1.1.

Source: "AWS JSON 1.1 protocol" (Smithy), and the API references of both actions with their errors. Requests are
signed for `ssm` and `secretsmanager`; both answer at one endpoint. `handle` is what a `Server` serves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calve.clock import SYSTEM, Clock
from calve.region.access import denial
from calve.region.message import Response
from calve.region.signature import ANONYMOUS, Identity, Principals, Refusal, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.message import Request

__all__ = ["Parameter", "Secret", "SecretService"]

BODY_BYTES = 64 * 1024
_ACCOUNT = "123456789012"
_CONTENT_TYPE = "application/x-amz-json-1.1"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter; `kind` is String, StringList or SecureString, `key` the KMS key of a SecureString."""

    name: str
    value: str = field(repr=False)
    kind: str = "SecureString"
    key: str = "alias/aws/ssm"
    version: int = 1


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret; `value` is text or bytes, `deleted` one that is scheduled for deletion."""

    name: str
    value: str | bytes = field(repr=False)
    deleted: bool = False


class SecretService:
    """Both services of one region; thread-safe.

    Args:
        principals: Keys and policies: actions `ssm:GetParameter`, `secretsmanager:GetSecretValue`, `kms:Decrypt`.
        region: What signatures must name.
        clock: For signatures and dates.
    """

    def __init__(
        self, principals: Principals, *, region: str = "test-region", clock: Clock = SYSTEM
    ) -> None:
        self.region = region
        self._principals = principals
        self._clock = clock
        self._lock = threading.Lock()
        self._parameters: dict[str, Parameter] = {}
        self._secrets: dict[str, Secret] = {}
        self.calls: list[str] = []
        """The actions that were asked for, refused ones too."""

    def put_parameter(self, parameter: Parameter) -> None:
        """Put a parameter, replacing what has its name."""
        with self._lock:
            self._parameters[parameter.name] = parameter

    def put_secret(self, secret: Secret) -> str:
        """Put a secret, replacing what has its name; return its ARN."""
        with self._lock:
            self._secrets[secret.name] = secret
        return self._secret_arn(secret.name)

    def handle(self, request: Request) -> Response:
        """Answer a request."""
        try:
            body = request.body.read_all(BODY_BYTES)
        except ValueError:
            return _error(Refusal(413, "RequestEntityTooLarge", "the request is too long"))
        target = request.headers.get("x-amz-target", "")
        actions: dict[str, tuple[str, Callable[[Identity, _Members], dict[str, Any]]]] = {
            "AmazonSSM.GetParameter": ("ssm", self._get_parameter),
            "secretsmanager.GetSecretValue": ("secretsmanager", self._get_secret),
        }
        with self._lock:
            self.calls.append(target)
        try:
            if request.method != "POST" or request.path != "/" or target not in actions:
                raise Refusal(400, "UnknownOperationException", "")  # noqa: TRY301
            service, perform = actions[target]
            identity = self._identify(request, service, body)
            answer = perform(identity, _Members.parse(request, body))
        except Refusal as refusal:
            return _error(refusal)
        return _answer(200, answer)

    def _identify(self, request: Request, service: str, body: bytes) -> Identity:
        identity = verify(
            request,
            self._principals,
            service=service,
            region=self.region,
            now=self._clock.now(),
            payload_sha256=hashlib.sha256(body).hexdigest(),
        )
        if identity is ANONYMOUS:
            raise Refusal(
                400, "MissingAuthenticationTokenException", "Missing Authentication Token"
            )
        return identity

    def _check(self, identity: Identity, action: str, resource: str) -> None:
        if not self._principals.allows(identity, action, resource):
            raise Refusal(400, "AccessDeniedException", denial(identity, action, resource))

    # Systems Manager

    def _get_parameter(self, identity: Identity, members: _Members) -> dict[str, Any]:
        members.only("Name", "WithDecryption")
        wanted = members.text("Name", least=1, most=2048)
        decrypt = members.flag("WithDecryption")
        prefix = f"arn:aws:ssm:{self.region}:{_ACCOUNT}:parameter"
        name = wanted
        if name.startswith(f"{prefix}/"):
            # The ARN of /a/b and that of b both have one slash after `parameter`.
            name = name.removeprefix(prefix)
            name = name if name in self._parameters else name[1:]
        arn = f"{prefix}/{name.lstrip('/')}"
        self._check(identity, "ssm:GetParameter", arn)
        with self._lock:
            found = self._parameters.get(name)
        if found is None:
            raise Refusal(400, "ParameterNotFound", "")
        value = found.value
        if found.kind == "SecureString" and not decrypt:
            value = base64.b64encode(hashlib.sha256(value.encode()).digest()).decode()
        elif found.kind == "SecureString" and found.key != "alias/aws/ssm":
            self._check(identity, "kms:Decrypt", found.key)
        parameter = {
            "ARN": arn,
            "DataType": "text",
            "LastModifiedDate": self._clock.now().timestamp(),
            "Name": found.name,
            "Type": found.kind,
            "Value": value,
            "Version": found.version,
        }
        return {"Parameter": parameter}

    # Secrets Manager

    def _secret_arn(self, name: str) -> str:
        suffix = hashlib.sha256(name.encode()).hexdigest()[:6]
        return f"arn:aws:secretsmanager:{self.region}:{_ACCOUNT}:secret:{name}-{suffix}"

    def _get_secret(self, identity: Identity, members: _Members) -> dict[str, Any]:
        members.only("SecretId", "VersionId", "VersionStage")
        wanted = members.text("SecretId", least=1, most=2048)
        with self._lock:
            secrets = list(self._secrets.values())
        found = next(
            (one for one in secrets if wanted in {one.name, self._secret_arn(one.name)}), None
        )
        arn = wanted if found is None else self._secret_arn(found.name)
        self._check(identity, "secretsmanager:GetSecretValue", arn)
        if found is None:
            raise Refusal(
                400,
                "ResourceNotFoundException",
                "Secrets Manager can't find the specified secret.",
            )
        if found.deleted:
            raise Refusal(
                400,
                "InvalidRequestException",
                "You can't perform this operation on the secret because it was marked for deletion.",
            )
        answer = {
            "ARN": arn,
            "CreatedDate": self._clock.now().timestamp(),
            "Name": found.name,
            "VersionId": str(uuid.uuid5(uuid.NAMESPACE_URL, arn)),
            "VersionStages": ["AWSCURRENT"],
        }
        if isinstance(found.value, str):
            return answer | {"SecretString": found.value}
        return answer | {"SecretBinary": base64.b64encode(found.value).decode()}


@dataclass(frozen=True, slots=True)
class _Members:
    """The members of a request's document."""

    values: Mapping[str, Any]

    @classmethod
    def parse(cls, request: Request, body: bytes) -> _Members:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != _CONTENT_TYPE:
            raise Refusal(404, "UnknownOperationException", f"the content type is {kind!r}")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise Refusal(400, "SerializationException", "the body is no JSON object")
        return cls(values)

    def only(self, *names: str) -> None:
        """Refuse members that the action does not have (AWS ignores them; we wrote them by mistake)."""
        for name in self.values:
            if name not in names:
                raise Refusal(400, "ValidationException", f"there is no member {name}")

    def text(self, name: str, *, least: int, most: int) -> str:
        """Return a text that must be there."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise Refusal(400, "SerializationException", f"{name} is not a text")
        if value is None or not least <= len(value) <= most:
            raise Refusal(
                400,
                "ValidationException",
                f"1 validation error detected: Value at '{name}' failed to satisfy constraint: "
                f"Member must have length from {least} to {most}",
            )
        return value

    def flag(self, name: str) -> bool:
        """Return true or false, which it is where it is missing."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise Refusal(400, "SerializationException", f"{name} is not true or false")
        return value


def _answer(status: int, document: Mapping[str, Any]) -> Response:
    headers = {"Content-Type": _CONTENT_TYPE, "x-amzn-RequestId": str(uuid.uuid4())}
    return Response(status, headers, json.dumps(document).encode())


def _error(refusal: Refusal) -> Response:
    names = {
        "ExpiredToken": "ExpiredTokenException",
        "InvalidAccessKeyId": "UnrecognizedClientException",
        "SignatureDoesNotMatch": "InvalidSignatureException",
    }
    code = names.get(refusal.code, refusal.code)
    status = 400 if refusal.status == 403 else refusal.status
    return _answer(status, {"__type": code, "message": refusal.message})
