"""Settings of buckets: public access block, default encryption, lifecycle, object ownership.

Source: S3 API Reference of Get, Put and Delete of PublicAccessBlock, BucketEncryption, BucketLifecycleConfiguration
and BucketOwnershipControls. What is put is checked against the schema and the rules that the reference names, kept as
it was sent, and given back. A bucket that is made by CreateBucket has AWS's defaults of since April 2023; one that
was added by a test has none, as one that is older, or of another maker's store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from calve.region import objects_xml as xml
from calve.region.message import Response
from calve.region.signature import Refusal

__all__ = ["KINDS", "Kind", "Settings"]

_NAMESPACE = f' xmlns="{xml.NAMESPACE}"'
_FLAGS = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
_OWNERSHIPS = {"BucketOwnerEnforced", "BucketOwnerPreferred", "ObjectWriter"}
_ALGORITHMS = {"AES256", "aws:kms", "aws:kms:dsse"}
_ACTIONS = frozenset(
    {
        "AbortIncompleteMultipartUpload", "Expiration", "NoncurrentVersionExpiration", "NoncurrentVersionTransition",
        "Transition",
    }
)  # fmt: skip
_RULES = 1000
_ID_CHARS = 255


@dataclass(frozen=True, slots=True)
class Kind:
    """One setting as S3 knows it.

    Attributes:
        parameter: The query parameter that names it.
        operation: The end of its operations' names: `GetBucketEncryption`.
        action: The end of its IAM actions.
        document: The document's root.
        missing: The error's code and sentence where it is not set.
        check: Refuses what the reference forbids.
    """

    parameter: str
    operation: str
    action: str
    document: str
    missing: tuple[str, str]
    check: Callable[[ET.Element], None]


class Settings:
    """The settings of all buckets of a region, thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._documents: dict[tuple[str, str], bytes] = {}
        self.unsupported: frozenset[str] = frozenset()
        """Parameters (`publicAccessBlock`) that this store does not know, as other makers' stores do."""

    def create(self, bucket: str, ownership: str) -> None:
        """Give a new bucket AWS's defaults; `ownership` is the header of CreateBucket, "" where there is none."""
        if ownership and ownership not in _OWNERSHIPS:
            raise _invalid("x-amz-object-ownership", ownership)
        flags = "".join(f"<{name}>true</{name}>" for name in _FLAGS)
        rule = (
            "<Rule><ApplyServerSideEncryptionByDefault><SSEAlgorithm>AES256</SSEAlgorithm>"
            "</ApplyServerSideEncryptionByDefault><BucketKeyEnabled>false</BucketKeyEnabled></Rule>"
        )
        owner = (
            f"<Rule><ObjectOwnership>{ownership or 'BucketOwnerEnforced'}</ObjectOwnership></Rule>"
        )
        contents = {"publicAccessBlock": flags, "encryption": rule, "ownershipControls": owner}
        with self._lock:
            for parameter, content in contents.items():
                name = KINDS[parameter].document
                body = f"<{name}{_NAMESPACE}>{content}</{name}>"
                self._documents[bucket, parameter] = body.encode()

    def get(self, bucket: str, kind: Kind) -> Response:
        """Answer a GET."""
        self._check_supported(kind)
        with self._lock:
            body = self._documents.get((bucket, kind.parameter))
        if body is None:
            code, message = kind.missing
            raise Refusal(404, code, message, [("BucketName", bucket)])
        return Response(200, {"Content-Type": "application/xml"}, body)

    def put(self, bucket: str, kind: Kind, data: bytes) -> Response:
        """Answer a PUT."""
        self._check_supported(kind)
        kind.check(xml.parse(data, kind.document))
        with self._lock:
            self._documents[bucket, kind.parameter] = data
        return Response(200)

    def delete(self, bucket: str, kind: Kind) -> Response:
        """Answer a DELETE."""
        self._check_supported(kind)
        with self._lock:
            self._documents.pop((bucket, kind.parameter), None)
        return Response(204)

    def _check_supported(self, kind: Kind) -> None:
        if kind.parameter in self.unsupported:
            raise Refusal(
                501,
                "NotImplemented",
                "A header you provided implies functionality that is not implemented.",
            )


# The rules


def _check_public_access(root: ET.Element) -> None:
    _only(root, *_FLAGS)
    for flag in root:
        if (flag.text or "").strip().lower() not in {"true", "false"}:
            raise xml.malformed()


def _check_encryption(root: ET.Element) -> None:
    rules = _children(root, "Rule")
    if len(rules) != 1:
        raise xml.malformed()
    (default,) = rules[0].findall("ApplyServerSideEncryptionByDefault") or [ET.Element("none")]
    algorithm, key = xml.text_of(default, "SSEAlgorithm"), xml.text_of(default, "KMSMasterKeyID")
    if algorithm not in _ALGORITHMS:
        raise xml.malformed()
    if key and algorithm == "AES256":
        raise _invalid(
            "KMSMasterKeyID", key, "a KMSMasterKeyID is not applicable if the algorithm is AES256"
        )


def _check_ownership(root: ET.Element) -> None:
    rules = _children(root, "Rule")
    if len(rules) != 1 or xml.text_of(rules[0], "ObjectOwnership") not in _OWNERSHIPS:
        raise xml.malformed()


def _check_lifecycle(root: ET.Element) -> None:
    rules = _children(root, "Rule")
    if not 1 <= len(rules) <= _RULES:
        raise xml.malformed()
    names = [xml.text_of(rule, "ID") for rule in rules if xml.text_of(rule, "ID")]
    if len(set(names)) != len(names):
        raise _invalid(
            "ID", names[0], "Rule ID must be unique. Found same ID for one or more rules"
        )
    for rule in rules:
        _check_rule(rule)


def _check_rule(rule: ET.Element) -> None:
    if len(xml.text_of(rule, "ID")) > _ID_CHARS:
        raise _invalid(
            "ID", xml.text_of(rule, "ID"), "ID length should not exceed allowed limit of 255"
        )
    if xml.text_of(rule, "Status") not in {"Enabled", "Disabled"}:
        raise xml.malformed()
    scope, old = rule.find("Filter"), rule.find("Prefix")
    if (scope is None) == (old is None):
        raise xml.malformed()
    actions = [child for child in rule if child.tag in _ACTIONS]
    if not actions:
        raise Refusal(400, "InvalidRequest", "At least one action needs to be specified in a rule")
    uploads = rule.find("AbortIncompleteMultipartUpload")
    if uploads is None:
        return
    if not _is_days(xml.text_of(uploads, "DaysAfterInitiation")):
        raise _invalid(
            "DaysAfterInitiation",
            xml.text_of(uploads, "DaysAfterInitiation"),
            "'DaysAfterInitiation' for AbortIncompleteMultipartUpload action must be a positive integer",
        )
    if scope is not None and next(scope.iter("Tag"), None) is not None:
        raise Refusal(
            400,
            "InvalidRequest",
            "AbortIncompleteMultipartUpload cannot be specified with Tags.",
        )


def _is_days(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31


def _children(root: ET.Element, name: str) -> list[ET.Element]:
    """Return the children, all of which must have the name."""
    if any(child.tag != name for child in root):
        raise xml.malformed()
    return list(root)


def _only(root: ET.Element, *names: str) -> None:
    found = [child.tag for child in root]
    if len(set(found)) != len(found) or not set(found) <= set(names):
        raise xml.malformed()


def _invalid(name: str, value: str, message: str = "Invalid Argument") -> Refusal:
    return Refusal(
        400, "InvalidArgument", message, [("ArgumentName", name), ("ArgumentValue", value)]
    )


KINDS: Mapping[str, Kind] = {
    kind.parameter: kind
    for kind in (
        Kind(
            "publicAccessBlock",
            "PublicAccessBlock",
            "BucketPublicAccessBlock",
            "PublicAccessBlockConfiguration",
            (
                "NoSuchPublicAccessBlockConfiguration",
                "The public access block configuration was not found",
            ),
            _check_public_access,
        ),
        Kind(
            "encryption",
            "BucketEncryption",
            "EncryptionConfiguration",
            "ServerSideEncryptionConfiguration",
            (
                "ServerSideEncryptionConfigurationNotFoundError",
                "The server side encryption configuration was not found",
            ),
            _check_encryption,
        ),
        Kind(
            "lifecycle",
            "BucketLifecycleConfiguration",
            "LifecycleConfiguration",
            "LifecycleConfiguration",
            ("NoSuchLifecycleConfiguration", "The lifecycle configuration does not exist"),
            _check_lifecycle,
        ),
        Kind(
            "ownershipControls",
            "BucketOwnershipControls",
            "BucketOwnershipControls",
            "OwnershipControls",
            (
                "OwnershipControlsNotFoundError",
                "The bucket ownership controls were not found",
            ),
            _check_ownership,
        ),
    )
}
"""By their query parameter."""
