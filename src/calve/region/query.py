"""AWS's query protocol: a form in, XML out (EC2, Auto Scaling and Elastic Load Balancing speak it).

Source: "AWS query protocol" and "Amazon EC2 query protocol" of the Smithy specification, and each service's API
reference. A list is `Name.member.1` in general and `Name.1` in EC2's dialect; both are read.
"""

from __future__ import annotations

import datetime
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from xml.sax.saxutils import escape

from calve.region.message import Response
from calve.region.signature import Refusal

__all__ = [
    "AUTOSCALING",
    "EC2",
    "ELB",
    "Dialect",
    "Params",
    "Replays",
    "Service",
    "filters",
    "page",
    "parse",
    "time_of",
]

T = TypeVar("T")
FIELDS = 4096
DEPTH = 12
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse(body: bytes) -> dict[str, Any]:
    """Decode a form into nested dicts and lists of strings.

    Raises:
        Refusal: MalformedQueryString, for what is no form.
    """
    try:
        pairs = urllib.parse.parse_qsl(
            body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=FIELDS
        )
    except ValueError:
        raise _malformed("it is no form in UTF-8") from None
    root: dict[str, Any] = {}
    for key, value in pairs:
        names = key.split(".")
        if len(names) > DEPTH or not all(names):
            raise _malformed(f"the name {key} is no path")
        node = root
        for name in names[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise _malformed(f"{key} stands within a value")
        if names[-1] in node:
            raise _malformed(f"{key} stands twice")
        node[names[-1]] = value
    return {name: _collapse(value) for name, value in root.items()}


def _collapse(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if set(node) == {"member"}:
        return _collapse(node["member"])
    if all(name.isascii() and name.isdigit() and len(name) < 6 for name in node):
        return [_collapse(node[name]) for name in sorted(node, key=int)]
    return {name: _collapse(value) for name, value in node.items()}


def _malformed(what: str) -> Refusal:
    return Refusal(400, "MalformedQueryString", f"The query string is malformed: {what}.")


class Params:
    """A request's parameters, each read once and by type; `done` refuses those nobody read.

    A simulation that ignores a parameter would lie to its client, so an unknown one is an error.
    """

    def __init__(
        self, values: Mapping[str, Any], code: str = "ValidationError", place: str = ""
    ) -> None:
        self._values = dict(values)
        self._code = code
        self._place = place
        self._unread = set(self._values)
        self._children: list[Params] = []

    def refusal(self, message: str) -> Refusal:
        """Make the service's own error for a bad value."""
        return Refusal(400, self._code, message)

    def _take(self, name: str) -> Any:
        self._unread.discard(name)
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """Read a string; None where it is absent."""
        value = self._take(name)
        if value is not None and not isinstance(value, str):
            raise self.refusal(f"{self._place}{name} must be a single value")
        return value

    def need(self, name: str) -> str:
        """Read a string that must be there."""
        value = self.text(name)
        if not value:
            raise Refusal(
                400,
                "MissingParameter",
                f"The request must contain the parameter {self._place}{name}",
            )
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Read a whole number within bounds; None where it is absent."""
        value = self.text(name)
        if value is None:
            return None
        if not re.fullmatch(r"-?[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise self.refusal(
                f"Value {value} for {self._place}{name} is not a whole number from {low} to {high}."
            )
        return int(value)

    def boolean(self, name: str) -> bool | None:
        """Read `true` or `false`; None where it is absent."""
        value = self.text(name)
        if value is None:
            return None
        if value.lower() not in {"true", "false"}:
            raise self.refusal(f"Value {value} for {self._place}{name} is neither true nor false.")
        return value.lower() == "true"

    def strings(self, name: str) -> list[str] | None:
        """Read a list of strings; None where it is absent."""
        value = self._take(name)
        if value is None:
            return None
        if value == "":
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(f"{self._place}{name} must be a list of values")
        return list(value)

    def raw(self, name: str) -> dict[str, Any]:
        """Read a structure as it was sent; {} where it is absent."""
        value = self._take(name) or {}
        if not isinstance(value, dict):
            raise self.refusal(f"{self._place}{name} must be a structure")
        return value

    def struct(self, name: str) -> Params | None:
        """Read a structure; None where it is absent."""
        return self._child(self.raw(name), name) if name in self._values else None

    def structs(self, name: str) -> list[Params]:
        """Read a list of structures; [] where it is absent."""
        value = self._take(name) or []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.refusal(f"{self._place}{name} must be a list of structures")
        return [self._child(item, name) for item in value]

    def _child(self, values: Mapping[str, Any], name: str) -> Params:
        child = Params(values, self._code, f"{self._place}{name}.")
        self._children.append(child)
        return child

    def left(self) -> Iterator[str]:
        """Name what nobody read."""
        yield from (self._place + name for name in sorted(self._unread))
        for child in self._children:
            yield from child.left()

    def done(self) -> None:
        """Refuse what was sent and not read: it is not simulated."""
        for name in self.left():
            raise Refusal(
                400,
                "UnknownParameter",
                f"The parameter {name} is not recognized (or not simulated)",
            )


def filters(
    params: Params, known: Iterable[str], *, name: str = "Filter"
) -> Callable[[Mapping[str, str]], bool]:
    """Read EC2's filters; return what says whether a resource's facts match all of them.

    Args:
        params: The request's.
        known: Filters that are simulated, beside `tag:KEY` and `tag-key`.
        name: Of the parameter.

    A value matches whole, with `*` and `?` as wildcards. Tags are facts by the name `tag:KEY`.
    """
    wanted: list[tuple[str, list[re.Pattern[str]]]] = []
    for item in params.structs(name):
        key, values = item.need("Name"), item.strings("Value") or []
        if key not in known and not key.startswith("tag:") and key != "tag-key":
            raise Refusal(
                400, "InvalidParameterValue", f"The filter '{key}' is invalid (or not simulated)"
            )
        wanted.append((key, [_wildcard(value) for value in values]))

    def match(facts: Mapping[str, str]) -> bool:
        tags = [fact.removeprefix("tag:") for fact in facts if fact.startswith("tag:")]
        for key, patterns in wanted:
            found = tags if key == "tag-key" else [facts[key]] if key in facts else []
            if not any(one.fullmatch(text) for one in patterns for text in found):
                return False
        return True

    return match


def _wildcard(value: str) -> re.Pattern[str]:
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in value)
    return re.compile("".join(parts), re.DOTALL)


def page(
    items: Sequence[T], params: Params, size_name: str, *, mark: str, most: int
) -> tuple[Sequence[T], str | None]:
    """Cut one page out of a list; return it with the token of the next."""
    size = params.integer(size_name, 1, most) or most
    at = params.text(mark)
    if at is not None and not re.fullmatch(r"[0-9]{1,9}", at):
        raise Refusal(400, "InvalidNextToken", f"The token '{at}' is invalid.")
    start = int(at or 0)
    following = start + size
    return items[start:following], str(following) if following < len(items) else None


def time_of(seconds: float) -> str:
    """Write an instant (seconds since 1970) in ISO 8601 with milliseconds."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one service writes XML.

    Attributes:
        service: As in a credential's scope.
        version: The API version in `Version=`.
        namespace: Of the answer's elements.
        item: What a list's elements are called.
        validation: The code for a bad parameter.
    """

    service: str
    version: str
    namespace: str
    item: str
    validation: str

    def answer(self, action: str, result: Mapping[str, Any], request_id: str) -> Response:
        """Write the answer to an action."""
        fields = "".join(self._element(name, value) for name, value in result.items())
        if self.item == "item":
            inner = f"<requestId>{request_id}</requestId>{fields}"
        else:
            inner = (
                f"<{action}Result>{fields}</{action}Result>"
                f"<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>"
            )
        name = f"{action}Response"
        return _xml(200, f'<{name} xmlns="{self.namespace}">{inner}</{name}>')

    def error(self, refusal: Refusal, request_id: str) -> Response:
        """Write an error."""
        code = f"<Code>{_text(refusal.code)}</Code><Message>{_text(refusal.message)}</Message>"
        if self.item == "item":
            body = (
                f"<Response><Errors><Error>{code}</Error></Errors>"
                f"<RequestID>{request_id}</RequestID></Response>"
            )
        else:
            kind = "Sender" if refusal.status < 500 else "Receiver"
            body = (
                f'<ErrorResponse xmlns="{self.namespace}"><Error><Type>{kind}</Type>{code}</Error>'
                f"<RequestId>{request_id}</RequestId></ErrorResponse>"
            )
        return _xml(refusal.status, body)

    def _element(self, name: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, Mapping):
            inner = "".join(self._element(key, item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            inner = "".join(self._element(self.item, item) for item in value)
        elif isinstance(value, bool):
            inner = "true" if value else "false"
        else:
            inner = _text(str(value))
        return f"<{name}>{inner}</{name}>"


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def _xml(status: int, document: str) -> Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{document}'.encode()
    return Response(status, {"Content-Type": "text/xml;charset=UTF-8"}, body)


EC2 = Dialect(
    "ec2", "2016-11-15", "http://ec2.amazonaws.com/doc/2016-11-15/", "item", "InvalidParameterValue"
)
AUTOSCALING = Dialect(
    "autoscaling",
    "2011-01-01",
    "http://autoscaling.amazonaws.com/doc/2011-01-01/",
    "member",
    "ValidationError",
)
ELB = Dialect(
    "elasticloadbalancing",
    "2015-12-01",
    "http://elasticloadbalancing.amazonaws.com/doc/2015-12-01/",
    "member",
    "ValidationError",
)

Action = Callable[[Params, float], Mapping[str, Any]]
"""One action: its parameters and the time of day in seconds, to its result; Refusal where it is refused."""


class Service(Protocol):
    """What answers some of the actions of one dialect, by their names."""

    dialect: Dialect
    actions: Mapping[str, Action]


class Replays(Generic[T]):
    """What was made for a client's token: the same question again gets it again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, T]] = {}

    def find(self, token: str | None, asked: object) -> T | None:
        """Return what was made; None where nothing was, or there is no token. A Refusal where it was asked otherwise."""
        before = self._kept.get(token) if token else None
        if before is None:
            return None
        if before[0] != asked:
            raise Refusal(
                400,
                "IdempotentParameterMismatch",
                "The client token was used before with other parameters.",
            )
        return before[1]

    def keep(self, token: str | None, asked: object, made: T) -> None:
        """Keep what was made."""
        if token:
            self._kept[token] = (asked, made)
