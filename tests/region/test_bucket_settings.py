"""The settings of buckets: S3's rules of them, met by boto3; and what of boto3 the gateway makes."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError

from calve.aws.buckets import ABORT_DAYS, Bucket
from calve.aws.session import Session, actions_of
from calve.errors import AccessError, CalveError, ConflictError, UsageError
from calve.region.signature import Allow
from calve.transport.credentials import Credentials

REGION = "test-region"
BLOCK = {
    "BlockPublicAcls": True,
    "IgnorePublicAcls": True,
    "BlockPublicPolicy": True,
    "RestrictPublicBuckets": True,
}


def refusal(call, **kwargs):
    with pytest.raises(ClientError) as caught:
        call(**kwargs)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


@pytest.fixture
def bucket_of(server):
    owned = []

    def make(key, name="nix", *, region=REGION, prefix=""):
        credentials = Credentials(key.access_key, key.secret_key, key.token)
        made = Bucket(Session(region, server.url, credentials=credentials), name, prefix)
        owned.append(made)
        return made

    yield make
    for one in owned:
        one.__exit__(None, None, None)


@pytest.fixture
def bucket(bucket_of, admin):
    return bucket_of(admin)


# The service


def test_an_old_bucket_has_no_settings_and_a_new_one_aws_s_defaults(s3):
    reads = {
        s3.get_public_access_block: "NoSuchPublicAccessBlockConfiguration",
        s3.get_bucket_encryption: "ServerSideEncryptionConfigurationNotFoundError",
        s3.get_bucket_lifecycle_configuration: "NoSuchLifecycleConfiguration",
        s3.get_bucket_ownership_controls: "OwnershipControlsNotFoundError",
    }
    for read, code in reads.items():
        assert refusal(read, Bucket="nix") == (404, code)
        assert refusal(read, Bucket="none") == (404, "NoSuchBucket")
    s3.create_bucket(
        Bucket="new",
        CreateBucketConfiguration={"LocationConstraint": REGION},
        ObjectOwnership="ObjectWriter",
    )
    assert s3.get_public_access_block(Bucket="new")["PublicAccessBlockConfiguration"] == BLOCK
    rules = s3.get_bucket_encryption(Bucket="new")["ServerSideEncryptionConfiguration"]["Rules"]
    assert rules[0]["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}
    owners = s3.get_bucket_ownership_controls(Bucket="new")["OwnershipControls"]["Rules"]
    assert owners == [{"ObjectOwnership": "ObjectWriter"}]
    assert refusal(s3.get_bucket_lifecycle_configuration, Bucket="new")[0] == 404


def test_what_is_put_is_given_back_and_deleted(s3):
    s3.put_public_access_block(
        Bucket="nix", PublicAccessBlockConfiguration=BLOCK | {"BlockPublicAcls": False}
    )
    found = s3.get_public_access_block(Bucket="nix")["PublicAccessBlockConfiguration"]
    assert found == BLOCK | {"BlockPublicAcls": False}
    s3.delete_public_access_block(Bucket="nix")
    assert refusal(s3.get_public_access_block, Bucket="nix")[0] == 404


def rule(**changes):
    made = {
        "ID": "a",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 3},
    }
    return {name: value for name, value in (made | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ([], "MalformedXML"),
        ([rule(), rule()], "InvalidArgument"),
        ([rule(ID="x" * 256)], "InvalidArgument"),
        ([rule(Status="On")], "MalformedXML"),
        ([rule(Filter=None)], "MalformedXML"),
        ([rule(Prefix="x")], "MalformedXML"),
        ([rule(AbortIncompleteMultipartUpload=None)], "InvalidRequest"),
        (
            [rule(AbortIncompleteMultipartUpload={"DaysAfterInitiation": 0})],
            "InvalidArgument",
        ),
        ([rule(Filter={"Tag": {"Key": "a", "Value": "b"}})], "InvalidRequest"),
    ],
)
def test_lifecycles_that_s3_refuses(s3, rules, code):
    put = s3.put_bucket_lifecycle_configuration
    assert refusal(put, Bucket="nix", LifecycleConfiguration={"Rules": rules}) == (400, code)


def test_other_documents_that_s3_refuses(s3):
    default = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "rot13"}}
    put = s3.put_bucket_encryption
    for rules, code in (
        ([default], "MalformedXML"),
        ([], "MalformedXML"),
        (
            [
                {
                    "ApplyServerSideEncryptionByDefault": {
                        "SSEAlgorithm": "AES256",
                        "KMSMasterKeyID": "k",
                    }
                }
            ],
            "InvalidArgument",
        ),
    ):
        made = {"Rules": rules}
        assert refusal(put, Bucket="nix", ServerSideEncryptionConfiguration=made) == (400, code)
    controls = {"Rules": [{"ObjectOwnership": "Nobody"}]}
    put = s3.put_bucket_ownership_controls
    assert refusal(put, Bucket="nix", OwnershipControls=controls) == (400, "MalformedXML")
    assert refusal(s3.create_bucket, Bucket="new", ObjectOwnership="x") == (400, "InvalidArgument")


def test_a_put_without_a_checksum_is_refused(s3):
    def strip(request, **_):
        for name in list(request.headers.keys()):
            if "checksum" in name.lower():
                del request.headers[name]

    s3.meta.events.register_first("before-sign.s3.PutPublicAccessBlock", strip)
    put = s3.put_public_access_block
    assert refusal(put, Bucket="nix", PublicAccessBlockConfiguration=BLOCK) == (
        400,
        "InvalidRequest",
    )


def test_who_may(client_of, principals):
    reader = client_of(principals.add_user("reader", [Allow("s3:GetBucketPublicAccessBlock")]))
    assert refusal(reader.get_public_access_block, Bucket="nix")[0] == 404
    put = reader.put_public_access_block
    assert refusal(put, Bucket="nix", PublicAccessBlockConfiguration=BLOCK) == (403, "AccessDenied")
    assert refusal(reader.delete_public_access_block, Bucket="nix") == (403, "AccessDenied")
    assert refusal(reader.get_bucket_encryption, Bucket="nix") == (403, "AccessDenied")


@pytest.mark.parametrize("operation", ["PutObject", "CompleteMultipartUpload", "DeleteObject"])
def test_conditions_that_are_ignored_on_request(service, s3, operation):
    s3.put_object(Bucket="nix", Key="k", Body=b"one")
    service.ignored = frozenset({(operation, "if-none-match"), (operation, "if-match")})

    def complete():
        named = {"Bucket": "nix", "Key": "k"}
        named["UploadId"] = s3.create_multipart_upload(**named)["UploadId"]
        part = s3.upload_part(**named, PartNumber=1, Body=b"two")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        s3.complete_multipart_upload(**named, MultipartUpload=parts, IfNoneMatch="*")

    acts = {
        "PutObject": lambda: s3.put_object(Bucket="nix", Key="k", Body=b"two", IfNoneMatch="*"),
        "CompleteMultipartUpload": complete,
        "DeleteObject": lambda: s3.delete_object(Bucket="nix", Key="k", IfMatch='"no"'),
    }
    for name, act in acts.items():
        if name != operation:
            assert refusal(act) == (412, "PreconditionFailed")
    acts[operation]()


# The gateway


def test_each_setting_is_asked_and_set(bucket):
    assert bucket.exists()
    for ask, act in (
        (bucket.is_owner_enforced, bucket.enforce_owner),
        (bucket.is_public_access_blocked, bucket.block_public_access),
        (bucket.is_encrypted, bucket.encrypt),
        (bucket.aborts_uploads, bucket.abort_uploads),
    ):
        assert ask() is False
        act()
        assert ask() is True


def test_the_other_rules_of_a_lifecycle_stay(bucket, s3):
    others = [
        {"ID": "old", "Status": "Enabled", "Prefix": "logs/", "Expiration": {"Days": 9}},
        rule(ID="part", Filter={"Prefix": "tmp/"}),
        rule(ID="off", Status="Disabled"),
        {
            "ID": "tags",
            "Status": "Enabled",
            "Filter": {"And": {"Prefix": "a", "Tags": [{"Key": "k", "Value": "v"}]}},
            "Transitions": [{"Days": 30, "StorageClass": "GLACIER"}],
        },
    ]
    s3.put_bucket_lifecycle_configuration(Bucket="nix", LifecycleConfiguration={"Rules": others})
    assert bucket.aborts_uploads() is False
    bucket.abort_uploads()
    bucket.abort_uploads()
    found = s3.get_bucket_lifecycle_configuration(Bucket="nix")["Rules"]
    assert found[:-1] == others
    assert found[-1]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": ABORT_DAYS}
    assert bucket.aborts_uploads() is True


def test_a_block_that_is_not_whole_and_another_key_of_encryption(bucket, s3):
    s3.put_public_access_block(
        Bucket="nix", PublicAccessBlockConfiguration=BLOCK | {"IgnorePublicAcls": False}
    )
    assert bucket.is_public_access_blocked() is False
    kms = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": "alias/ours"}
    rules = {"Rules": [{"ApplyServerSideEncryptionByDefault": kms}]}
    s3.put_bucket_encryption(Bucket="nix", ServerSideEncryptionConfiguration=rules)
    assert bucket.is_encrypted() is True  # and it is not replaced by a weaker one


def test_a_store_without_settings(bucket, service):
    service.settings.unsupported = frozenset({"publicAccessBlock", "lifecycle"})
    assert bucket.is_public_access_blocked() is None
    assert bucket.aborts_uploads() is None
    assert bucket.is_encrypted() is False


def test_a_bucket_is_made_once_and_in_its_region(bucket_of, admin, service):
    new = bucket_of(admin, "new")
    assert not new.exists()
    new.create()
    new.create()  # ours already
    assert new.exists()
    assert new.is_owner_enforced()
    assert service.bucket("new").region == REGION
    with pytest.raises(CalveError, match="InvalidBucketName"):
        bucket_of(admin, "xn--a").create()


def test_a_bucket_elsewhere_another_s_or_denied(bucket_of, admin, principals, service, monkeypatch):
    service.add_bucket("far", "eu-west-1")
    with pytest.raises(UsageError, match="in another region") as caught:
        bucket_of(admin, "far").exists()
    assert caught.value.hint == "give its region in the URL: ?region=…"
    followed = bucket_of(admin)
    headers = {"x-amz-bucket-region": "eu-west-1"}
    answer = {"ResponseMetadata": {"HTTPHeaders": headers}}
    monkeypatch.setattr(followed._client, "list_objects_v2", lambda **_: answer)
    with pytest.raises(UsageError) as caught:
        followed.exists()
    assert caught.value.hint == "give its region in the URL: ?region=eu-west-1"
    nobody = principals.add_user("nobody", [])
    with pytest.raises(AccessError) as denied:
        bucket_of(nobody).exists()
    assert "s3:ListBucket" in denied.value.hint
    taken = bucket_of(admin, "taken")

    def create(**_):
        raise ClientError({"Error": {"Code": "BucketAlreadyExists"}}, "CreateBucket")

    monkeypatch.setattr(taken._client, "create_bucket", create)
    with pytest.raises(ConflictError, match="taken by somebody else"):
        taken.create()


def test_an_upload_in_parts_is_conditional_and_leaves_nothing(bucket_of, admin, service):
    bucket = bucket_of(admin, prefix="cache/")
    assert bucket.create_in_parts("k", b"one")
    assert not bucket.create_in_parts("k", b"two")
    assert service.bucket("nix").keys() == ["cache/k"]
    assert service.counts["AbortMultipartUpload"] == 1


def test_the_iam_actions_are_named():
    assert actions_of(Bucket) == {
        "s3:AbortMultipartUpload",
        "s3:CreateBucket",
        "s3:GetBucketOwnershipControls",
        "s3:GetBucketPublicAccessBlock",
        "s3:GetEncryptionConfiguration",
        "s3:GetLifecycleConfiguration",
        "s3:ListBucket",
        "s3:PutBucketOwnershipControls",
        "s3:PutBucketPublicAccessBlock",
        "s3:PutEncryptionConfiguration",
        "s3:PutLifecycleConfiguration",
        "s3:PutObject",
    }
