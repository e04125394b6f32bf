"""One request and a good answer to it, or an error: signed for AWS, or plain to a cache that may redirect."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from calve.errors import DamagedError, UsageError, VerificationError
from calve.transport.connection import Target
from calve.transport.status import Problem, error_from, raise_for_status, read_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from calve.transport.http import Client, Response
    from calve.transport.sigv4 import Signer

__all__ = ["MAX_HOPS", "follow", "signed_request"]

MAX_HOPS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_METADATA_HOSTS = ("169.254.", "fd00:ec2::", "fe80:", "::ffff:169.254.")
_SECRET_HEADERS = ("authorization", "cookie", "x-amz-security-token", "x-aws-ec2-metadata-token")


def signed_request(
    client: Client,
    signer: Signer | None,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | Iterable[bytes] | None = None,
    read_s: float | None = None,
) -> Response:
    """Send a signed request; return an answer below 300, raise the error for any other.

    An answer that blames the clock or the credentials is corrected once: the clock by the answer's Date, expired
    credentials by new ones; then the request is sent again, where its body can be. Nothing else is retried here,
    and a signed request is never redirected. Without a signer the request is sent plain, and a GET or HEAD is
    redirected by `follow`.

    Raises:
        CalveError: those of `Client.request` and of `raise_for_status`.
    """
    fields = dict(headers or {})
    if signer is None and method in {"GET", "HEAD"}:
        response = follow(client, method, url, headers=fields, read_s=read_s)
        raise_for_status(response)
        return response
    generation = 0 if signer is None else signer.generation
    response = client.request(method, url, headers=fields, body=body, signer=signer, read_s=read_s)
    if response.status < 300:
        return response
    problem = read_error(response)
    again = signer is not None and (body is None or isinstance(body, bytes))
    if again and signer is not None and _corrected(signer, generation, response, problem):
        response = client.request(
            method, url, headers=fields, body=body, signer=signer, read_s=read_s
        )
        if response.status < 300:
            return response
        problem = read_error(response)
    raise error_from(response.status, problem, response.headers, place=response.place)


def _corrected(signer: Signer, generation: int, response: Response, problem: Problem) -> bool:
    """Say whether the same request, signed again, may be accepted."""
    if response.status not in {400, 401, 403}:
        return False
    # A HEAD's answer has no body to name the reason: S3 answers 400 to one with an expired token.
    silent_400 = response.method == "HEAD" and response.status == 400 and not problem.code
    if problem.expired or silent_400:
        signer.refresh(generation)
        signer.adjust(response.headers.get("date"))
        return True
    return signer.adjust(response.headers.get("date"))


def follow(
    client: Client,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    read_s: float | None = None,
) -> Response:
    """Send a plain GET or HEAD and follow at most 5 redirects; return the last answer, whatever its status.

    Every hop is checked: from https only to https, never to the instance metadata service. Headers with secrets
    are not sent to another host.

    Raises:
        VerificationError: a redirect that is refused.
        CalveError: those of `Client.request`.
    """
    if method not in {"GET", "HEAD"}:
        raise UsageError(f"a {method} is not redirected")
    fields = {name.lower(): value for name, value in (headers or {}).items()}
    for _ in range(MAX_HOPS + 1):
        response = client.request(method, url, headers=fields, read_s=read_s)
        if response.status not in _REDIRECTS:
            return response
        with response:
            location = response.headers.get("location")
            if not location:
                raise DamagedError("a redirect without a Location", place=response.place)
            onward = _hop(url, location)
        if Target.parse(onward).endpoint != Target.parse(url).endpoint:
            for name in _SECRET_HEADERS:
                fields.pop(name, None)
        url = onward
    raise VerificationError(f"more than {MAX_HOPS} redirects", place=Target.parse(url).place)


def _hop(url: str, location: str) -> str:
    """Return where a redirect leads; VerificationError where it must not."""
    place = Target.parse(url).place
    try:
        onward = urljoin(url, location).partition("#")[0]
        target = Target.parse(onward)
    except (ValueError, UsageError):
        raise VerificationError("a redirect to what is not a URL", place=place) from None
    if url.startswith("https:") and target.endpoint.scheme != "https":
        raise VerificationError("a redirect from https to http is refused", place=place)
    if _address(target.endpoint.host).startswith(_METADATA_HOSTS):
        raise VerificationError("a redirect to the metadata service is refused", place=place)
    return onward


def _address(host: str) -> str:
    """Return an address in its usual form, however it was written (2852039166, 0xa9fea9fe); a name as it is."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        return host
    return str(found[0][4][0])
