"""Secrets: parameters of Systems Manager, secrets of Secrets Manager. What is read is returned and kept nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from calve.aws.session import needs
from calve.errors import UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from calve.aws.session import Session

__all__ = ["ParameterStore", "SecretsManager"]


class _Gateway:
    """A client that is closed at the end."""

    _SERVICE = ""

    def __init__(self, session: Session) -> None:
        self._client = session.client(self._SERVICE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()


class ParameterStore(_Gateway):
    """The parameter store of AWS Systems Manager, for one session."""

    _SERVICE = "ssm"

    @needs("ssm:GetParameter", "kms:Decrypt")
    def secure_string(self, name: str) -> str:
        """Return a SecureString, decrypted.

        Args:
            name: of the parameter, or its ARN; `name:label` and `name:version` choose an older one.

        Raises:
            NotFoundError: there is no such parameter.
            UsageError: it is a parameter that everybody who may list can read.
        """
        answer = self._client.get_parameter(Name=name, WithDecryption=True)
        parameter = answer["Parameter"]
        if parameter["Type"] != "SecureString":
            raise UsageError(
                f"the parameter is a {parameter['Type']}, which is kept in the clear",
                place=f"ssm {name}",
                hint="store the key as a SecureString",
            )
        return str(parameter["Value"])


class SecretsManager(_Gateway):
    """AWS Secrets Manager, for one session."""

    _SERVICE = "secretsmanager"

    @needs("secretsmanager:GetSecretValue", "kms:Decrypt")
    def secret_string(self, secret_id: str) -> str:
        """Return a secret's current text.

        Args:
            secret_id: its name or ARN.

        Raises:
            NotFoundError: there is no such secret.
            UsageError: it is binary.
        """
        answer = self._client.get_secret_value(SecretId=secret_id)
        if "SecretString" not in answer:
            raise UsageError(
                "the secret is binary",
                place=f"secretsmanager {secret_id}",
                hint="store the key as text, as calve keys generate writes it",
            )
        return str(answer["SecretString"])
