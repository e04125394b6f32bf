"""S3 buckets: their making and their settings. What is in them is `calve.cache`'s own, without boto3."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Self

from calve.aws.session import needs
from calve.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from calve.aws.session import Session

__all__ = ["ABORT_DAYS", "Bucket"]

ABORT_DAYS = 3
"""After how many days S3 removes the parts of an upload that was never completed."""
_RULE_ID = "calve: incomplete uploads"
_CLASSIC = "us-east-1"  # the one region that CreateBucket must not name
_BLOCK = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
_UNSUPPORTED = frozenset(
    {"NotImplemented", "MethodNotAllowed", "UnsupportedOperation", "405", "501"}
)


class Bucket:
    """One bucket, for one session; `prefix` stands before the keys of `create_in_parts`.

    A setting's question is answered True (in force), False (not), or None: this store, which is not Amazon's, does
    not know the setting.
    """

    def __init__(self, session: Session, name: str, prefix: str = "") -> None:
        self.name = name
        self._prefix = prefix
        self._region = session.region or _CLASSIC
        self._client = session.client("s3", path_style=session.endpoint is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    @needs("s3:ListBucket")
    def exists(self) -> bool:
        """Say whether there is such a bucket.

        Raises:
            AccessError: it is another account's, or the caller may not list it.
            UsageError: it is in another region.
        """
        from botocore.exceptions import ClientError

        try:
            # A HEAD's answer would have no body to name the reason.
            answer = self._client.list_objects_v2(Bucket=self.name, MaxKeys=1)
        except ClientError as error:
            code = _code(error)
            if code == "NoSuchBucket":
                return False
            if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}:
                raise self._elsewhere("…") from error
            raise
        # boto follows a redirect to another region in silence; the cache's own client does not.
        region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", self._region)
        if region != self._region:
            raise self._elsewhere(region)
        return True

    def _elsewhere(self, region: str) -> UsageError:
        return UsageError(
            "the bucket is in another region",
            place=f"s3://{self.name}",
            hint=f"give its region in the URL: ?region={region}",
        )

    @needs("s3:CreateBucket", "s3:PutBucketOwnershipControls")
    def create(self) -> None:
        """Create the bucket in the session's region; its owner owns every object, and there are no ACLs.

        Raises:
            ConflictError: the name is taken, by whomever.
        """
        from botocore.exceptions import ClientError

        where: dict[str, Any] = {}
        if self._region != _CLASSIC:
            where["CreateBucketConfiguration"] = {"LocationConstraint": self._region}
        try:
            self._client.create_bucket(
                Bucket=self.name, ObjectOwnership="BucketOwnerEnforced", **where
            )
        except ClientError as error:
            if _code(error) == "BucketAlreadyExists":
                raise ConflictError(
                    "the name of the bucket is taken by somebody else",
                    place=f"s3://{self.name}",
                    hint="buckets of all accounts share their names: choose another",
                ) from error
            if _code(error) != "BucketAlreadyOwnedByYou":
                raise

    # Settings

    @needs("s3:GetBucketOwnershipControls")
    def is_owner_enforced(self) -> bool | None:
        """Say whether ACLs are off."""
        answer = self._ask(
            self._client.get_bucket_ownership_controls, "OwnershipControlsNotFoundError"
        )
        if answer is None:
            return None
        rules = answer.get("OwnershipControls", {}).get("Rules", [])
        return [rule["ObjectOwnership"] for rule in rules] == ["BucketOwnerEnforced"]

    @needs("s3:PutBucketOwnershipControls")
    def enforce_owner(self) -> None:
        """Turn ACLs off."""
        rules = [{"ObjectOwnership": "BucketOwnerEnforced"}]
        self._client.put_bucket_ownership_controls(
            Bucket=self.name, OwnershipControls={"Rules": rules}
        )

    @needs("s3:GetBucketPublicAccessBlock")
    def is_public_access_blocked(self) -> bool | None:
        """Say whether all four blocks are on."""
        answer = self._ask(
            self._client.get_public_access_block, "NoSuchPublicAccessBlockConfiguration"
        )
        if answer is None:
            return None
        blocks = answer.get("PublicAccessBlockConfiguration", {})
        return all(blocks.get(name) is True for name in _BLOCK)

    @needs("s3:PutBucketPublicAccessBlock")
    def block_public_access(self) -> None:
        """Turn all four blocks on."""
        self._client.put_public_access_block(
            Bucket=self.name, PublicAccessBlockConfiguration=dict.fromkeys(_BLOCK, True)
        )

    @needs("s3:GetEncryptionConfiguration")
    def is_encrypted(self) -> bool | None:
        """Say whether objects are encrypted by default, with S3's keys or those of KMS."""
        answer = self._ask(
            self._client.get_bucket_encryption, "ServerSideEncryptionConfigurationNotFoundError"
        )
        if answer is None:
            return None
        rules = answer.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
        return any(rule.get("ApplyServerSideEncryptionByDefault") for rule in rules)

    @needs("s3:PutEncryptionConfiguration")
    def encrypt(self) -> None:
        """Encrypt objects by default, with S3's keys (SSE-S3)."""
        rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        self._client.put_bucket_encryption(
            Bucket=self.name, ServerSideEncryptionConfiguration={"Rules": [rule]}
        )

    @needs("s3:GetLifecycleConfiguration")
    def aborts_uploads(self) -> bool | None:
        """Say whether a rule removes the parts of every upload that is not completed within some days."""
        answer = self._lifecycle()
        return None if answer is None else any(map(_aborts_all, answer.get("Rules", [])))

    @needs("s3:GetLifecycleConfiguration", "s3:PutLifecycleConfiguration")
    def abort_uploads(self) -> None:
        """Add that rule, with ABORT_DAYS; other rules stay.

        S3 knows no condition here: of two who write at the same time, the later one's rules are the bucket's.
        """
        answer = self._lifecycle() or {}
        kept = [rule for rule in answer.get("Rules", []) if rule.get("ID") != _RULE_ID]
        rule = {
            "ID": _RULE_ID,
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABORT_DAYS},
        }
        more = {}
        if "TransitionDefaultMinimumObjectSize" in answer:
            name = "TransitionDefaultMinimumObjectSize"
            more[name] = answer[name]
        self._client.put_bucket_lifecycle_configuration(
            Bucket=self.name, LifecycleConfiguration={"Rules": [*kept, rule]}, **more
        )

    def _lifecycle(self) -> dict[str, Any] | None:
        return self._ask(
            self._client.get_bucket_lifecycle_configuration, "NoSuchLifecycleConfiguration"
        )

    def _ask(self, call: Callable[..., Any], absent: str) -> dict[str, Any] | None:
        """Return a setting, {} where it is not set, None where the store does not know it."""
        from botocore.exceptions import ClientError

        try:
            return dict(call(Bucket=self.name))
        except ClientError as error:
            if _code(error) == absent:
                return {}
            if _code(error) in _UNSUPPORTED:
                return None
            raise

    # The probe

    @needs("s3:PutObject", "s3:AbortMultipartUpload")
    def create_in_parts(self, key: str, data: bytes) -> bool:
        """Write an object by a multipart upload, only where there is none; say whether it was written.

        Raises:
            UsageError: the store does not know such conditions.
        """
        from botocore.exceptions import ClientError

        named = {"Bucket": self.name, "Key": self._prefix + key}
        named["UploadId"] = self._client.create_multipart_upload(**named)["UploadId"]
        done = False
        try:
            part = self._client.upload_part(**named, PartNumber=1, Body=data)
            parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
            self._client.complete_multipart_upload(
                **named, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
            done = True
        except ClientError as error:
            if _code(error) in _UNSUPPORTED:
                raise UsageError(f"{error.operation_name}: {_code(error)}") from error
            if _code(error) != "PreconditionFailed":
                raise
        finally:
            if not done:
                with contextlib.suppress(
                    ClientError
                ):  # else the bucket's lifecycle removes the part
                    self._client.abort_multipart_upload(**named)
        return done


def _aborts_all(rule: dict[str, Any]) -> bool:
    """Say whether a rule of the lifecycle aborts uploads of every key."""
    prefix = rule.get("Prefix", "")
    scope = rule.get("Filter", {})
    everything = not prefix and all(name == "Prefix" and not value for name, value in scope.items())
    days = rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation")
    return rule.get("Status") == "Enabled" and everything and days is not None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
