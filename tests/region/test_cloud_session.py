"""boto's own errors and credentials as Calve's."""

import socket

import pytest

from calve.aws.ec2 import Ec2
from calve.aws.session import Session, credentials_provider
from calve.errors import AccessError, CalveError, TransientError
from calve.transport.credentials import Credentials

NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


def test_the_chain_is_asked_again_on_refresh(monkeypatch):
    provider = credentials_provider()
    with pytest.raises(AccessError, match="no AWS credentials"):
        provider.credentials()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert provider.credentials() == Credentials("AKID1", "secret", None, None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID2")
    assert provider.credentials().access_key == "AKID1"
    assert provider.credentials(refresh=True).access_key == "AKID2"


def test_a_profile_is_used_or_missed(nothing_configured):
    (nothing_configured / "credentials").write_text(
        "[web]\naws_access_key_id = AKID3\naws_secret_access_key = s\naws_session_token = t\n"
    )
    assert credentials_provider("web").credentials() == Credentials("AKID3", "s", "t", None)
    with pytest.raises(AccessError, match="other"):
        credentials_provider("other").credentials()
    with pytest.raises(AccessError, match="other"):
        Session("eu-central-1", profile="other").client("ec2")


def test_no_region_and_no_credentials():
    with pytest.raises(CalveError, match="region") as caught:
        Session().client("ec2")
    assert caught.value.hint.startswith("set AWS_REGION")
    gateway = Ec2(Session("eu-central-1", "http://127.0.0.1:1"))
    with pytest.raises(AccessError, match="credentials"):
        gateway.template("web")
    gateway._client.close()


def test_an_endpoint_that_is_not_there_is_transient(monkeypatch):
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    keys = Credentials("AKID", "secret")
    gateway = Ec2(Session("eu-central-1", f"http://127.0.0.1:{port}", credentials=keys))
    with pytest.raises(TransientError, match="Could not connect"):
        gateway.template("web")
    gateway._client.close()
