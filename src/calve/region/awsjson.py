"""AWS's JSON protocol, version 1.0: of CloudWatch, because it is what boto3 speaks to it.

Source: Smithy specification, "AWS JSON 1.0 protocol" and "AWS query compatible". A request becomes the same nested form
that `query.parse` makes of its own; a timestamp in an answer is a number of seconds since 1970.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.region.message import Response
from calve.region.query import Dialect
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from calve.region.message import Request

__all__ = ["CLOUDWATCH", "JsonDialect", "read", "speaks"]

CONTENT = "application/x-amz-json-1.0"
_TARGET = "x-amz-target"


@dataclass(frozen=True, slots=True)
class JsonDialect(Dialect):
    """How a service answers in JSON; `version` is its name in front of an action."""

    def answer(
        self,
        action: str,  # noqa: ARG002  (an answer in JSON does not name it)
        result: Mapping[str, Any],
        request_id: str,
    ) -> Response:
        """Write the answer to an action, without what is None."""
        there = {name: value for name, value in result.items() if value is not None}
        return _response(200, there, {"x-amzn-RequestId": request_id})

    def error(self, refusal: Refusal, request_id: str) -> Response:
        """Write an error."""
        kind = "Sender" if refusal.status < 500 else "Receiver"
        headers = {
            "x-amzn-RequestId": request_id,
            "x-amzn-query-error": f"{refusal.code};{kind}",
        }
        body = {"__type": f"{self.namespace}#{refusal.code}", "message": refusal.message}
        return _response(refusal.status, body, headers)


CLOUDWATCH = JsonDialect(
    "monitoring",
    "GraniteServiceVersion20100801",
    "com.amazonaws.cloudwatch.v2010_08_01",
    "",
    "ValidationError",
)


def speaks(request: Request) -> bool:
    """Say whether a request is of this protocol."""
    return _TARGET in request.headers


def read(request: Request, body: bytes) -> dict[str, Any]:
    """Decode a request into its parameters, all as text, with its service as `Version` and its `Action`.

    Raises:
        Refusal: SerializationException, where it is no such request.
    """
    version, _, action = request.headers.get(_TARGET, "").partition(".")
    try:
        form = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise _malformed() from None
    if not isinstance(form, dict):
        raise _malformed()
    return {**_text(form), "Version": version, "Action": action}


def _text(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _text(value) for name, value in node.items() if value is not None}
    if isinstance(node, list):
        return [_text(value) for value in node]
    return str(node).lower() if isinstance(node, bool) else str(node)


def _malformed() -> Refusal:
    return Refusal(400, "SerializationException", "The request's body is no object in JSON")


def _response(status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return Response(status, {"Content-Type": CONTENT, **headers}, json.dumps(body).encode())
