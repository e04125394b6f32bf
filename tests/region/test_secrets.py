"""Signing keys in AWS: real boto3 against the region's two services, and what of them is ever shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

import calve
from calve.aws.secrets import ParameterStore, SecretsManager
from calve.aws.session import Session, actions_of
from calve.errors import AccessError, CalveError, NotFoundError, UsageError
from calve.fleet import config, keys
from calve.nix.signing import SecretKey
from calve.region.secrets import Parameter, Secret, SecretService
from calve.region.server import Server
from calve.region.signature import Allow
from calve.transport.credentials import Credentials

REGION = "test-region"
KEY = SecretKey.generate("acme-1")
TEXT = KEY.dump()


@pytest.fixture
def vault(principals):
    return SecretService(principals, region=REGION)


@pytest.fixture
def endpoint(vault, monkeypatch, admin):
    with Server(vault.handle) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", admin.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", admin.secret_key)
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "elsewhere")
        yield server.url


def ssm(name="/acme/key", region=REGION):
    return config.Parameter(name, region)


def manager(name="acme/key", region=REGION):
    return config.Secret(name, region)


@pytest.mark.usefixtures("endpoint")
def test_a_key_out_of_either_by_name_and_by_arn(vault):
    vault.put_parameter(Parameter("/acme/key", f"{TEXT}\n"))
    arn = vault.put_secret(Secret("acme/key", TEXT))
    assert keys.read(ssm()) == KEY
    assert keys.read(ssm(f"arn:aws:ssm:{REGION}:123456789012:parameter/acme/key")) == KEY
    assert keys.read(manager()) == KEY
    assert keys.read(manager(arn)) == KEY
    assert vault.calls == ["AmazonSSM.GetParameter"] * 2 + ["secretsmanager.GetSecretValue"] * 2


@pytest.mark.usefixtures("endpoint")
def test_the_region_of_an_arn_goes_before_the_bucket_s(vault):
    arn = vault.put_secret(Secret("acme/key", TEXT)).replace(REGION, "eu-west-1")
    vault.region = "eu-west-1"
    text = f'[cache]\nurl = "s3://acme?region=us-west-2"\nkey = {{ secretsmanager = "{arn}" }}\n'
    source = config.parse(text, Path("calve.toml")).cache.key
    assert keys.read(source) == KEY


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("source", [ssm("/none"), manager("none")])
def test_one_that_is_not_there(source):
    with pytest.raises(NotFoundError) as caught:
        keys.read(source)
    assert caught.value.exit_code == 5


@pytest.mark.usefixtures("endpoint")
def test_denied_and_wrong_credentials(vault, principals, monkeypatch):
    vault.put_parameter(Parameter("/acme/key", TEXT, key="alias/ours"))
    vault.put_secret(Secret("acme/key", TEXT))
    nobody = principals.add_user("nobody", [Allow("ssm:*")])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", nobody.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", nobody.secret_key)
    with pytest.raises(AccessError, match="kms:Decrypt") as parameter:
        keys.read(ssm())
    with pytest.raises(AccessError, match="GetSecretValue") as secret:
        keys.read(manager())
    assert parameter.value.exit_code == 4
    assert "secretsmanager:GetSecretValue" in secret.value.hint
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessError, match="InvalidSignatureException"):
        keys.read(ssm())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOBODY")
    with pytest.raises(AccessError):
        keys.read(manager())


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("kind", ["String", "StringList"])
def test_a_parameter_in_the_clear_is_refused(vault, kind):
    vault.put_parameter(Parameter("/acme/key", TEXT, kind))
    with pytest.raises(UsageError, match=f"is a {kind}, which is kept in the clear"):
        keys.read(ssm())


@pytest.mark.usefixtures("endpoint")
def test_a_binary_secret_and_one_that_is_being_deleted(vault):
    vault.put_secret(Secret("acme/key", TEXT.encode()))
    with pytest.raises(UsageError, match="the secret is binary"):
        keys.read(manager())
    vault.put_secret(Secret("acme/key", TEXT, deleted=True))
    with pytest.raises(CalveError, match="marked for deletion"):
        keys.read(manager())


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize(
    "value",
    [KEY.public.dump(), TEXT[:-4], "x" * 4097, f"{TEXT} {TEXT}"],
    ids=["public", "cut", "long", "twice"],
)
def test_what_is_no_key_is_not_shown(vault, value):
    vault.put_parameter(Parameter("/acme/key", value))
    vault.put_secret(Secret("acme/key", value))
    for source, place in ((ssm(), "ssm /acme/key"), (manager(), "secretsmanager acme/key")):
        with pytest.raises(UsageError, match=f"^{place}: not a secret key") as caught:
            keys.read(source)
        chain = [caught.value, caught.value.__cause__, caught.value.__context__]
        assert value[9:] not in "".join(map(repr, chain))


def test_push_takes_it_and_nothing_shows_it(vault, endpoint, tmp_path):
    vault.put_parameter(Parameter("/acme/key", TEXT))
    (tmp_path / "calve.toml").write_text(
        f'[cache]\nurl = "{tmp_path}/c"\nkey = {{ ssm = "/acme/key" }}\n'
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "calve", "keys", "show"],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(calve.__file__).parents[1]),
            "AWS_DEFAULT_REGION": REGION,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"{KEY.public.dump()}\n"), done.stderr
    assert TEXT[7:40] not in done.stdout + done.stderr


def test_the_iam_actions_are_named():
    assert actions_of(ParameterStore) == {"ssm:GetParameter", "kms:Decrypt"}
    assert actions_of(SecretsManager) == {"secretsmanager:GetSecretValue", "kms:Decrypt"}


# The services themselves


@pytest.fixture
def client_of_service(endpoint, admin):
    made = []

    def make(service, **options):
        client = boto3.client(
            service,
            region_name=REGION,
            endpoint_url=endpoint,
            aws_access_key_id=admin.access_key,
            aws_secret_access_key=admin.secret_key,
            **options,
        )
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def refusal(call, *args, **kwargs):
    with pytest.raises(ClientError) as caught:
        call(*args, **kwargs)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def test_ssm_s_rules(vault, client_of_service):
    client = client_of_service("ssm")
    vault.put_parameter(Parameter("plain", "value", "String"))
    vault.put_parameter(Parameter("/secure", TEXT))
    assert client.get_parameter(Name="plain")["Parameter"]["Value"] == "value"
    locked = client.get_parameter(Name="/secure")["Parameter"]
    assert (locked["Type"], locked["Value"] == TEXT) == ("SecureString", False)
    opened = client.get_parameter(Name="/secure", WithDecryption=True)["Parameter"]
    assert (opened["Value"], opened["Version"]) == (TEXT, 1)
    assert refusal(client.get_parameter, Name="none") == (400, "ParameterNotFound")
    assert refusal(client.describe_parameters) == (400, "UnknownOperationException")


def test_secrets_manager_s_rules(vault, client_of_service):
    client = client_of_service("secretsmanager")
    vault.put_secret(Secret("text", TEXT))
    vault.put_secret(Secret("bytes", b"\x00\xff"))
    answer = client.get_secret_value(SecretId="text")
    assert (answer["SecretString"], answer["VersionStages"]) == (TEXT, ["AWSCURRENT"])
    assert client.get_secret_value(SecretId="bytes")["SecretBinary"] == b"\x00\xff"
    assert refusal(client.get_secret_value, SecretId="no") == (400, "ResourceNotFoundException")


def test_requests_that_nobody_signed_or_that_are_none(endpoint):
    def post(body, **headers):
        request = urllib.request.Request(endpoint, body, {"content-type": "text/plain", **headers})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5)
        with caught.value as error:
            return json.loads(error.read())["__type"]

    target = {"x-amz-target": "AmazonSSM.GetParameter"}
    assert post(b"{}", **target) == "MissingAuthenticationTokenException"
    assert post(b"{}") == "UnknownOperationException"
    assert post(b"x" * 70_000, **target) == "RequestEntityTooLarge"


def test_the_gateways_with_an_endpoint_of_their_own(vault, endpoint, admin):
    vault.put_secret(Secret("text", TEXT))
    session = Session(REGION, endpoint, credentials=Credentials(admin.access_key, admin.secret_key))
    with SecretsManager(session) as secrets:
        assert secrets.secret_string("text") == TEXT
    with ParameterStore(session) as parameters, pytest.raises(NotFoundError):
        parameters.secure_string("text")
