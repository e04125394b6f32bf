from __future__ import annotations

import pytest

from calve.errors import AccessError
from calve.transport.credentials import Credentials, Environment, Static


def test_secrets_are_not_shown():
    value = Credentials("AKIA", "hidden", "hidden too")
    assert "hidden" not in repr(value)
    assert "hidden" not in repr(Static(value))
    assert Static(value).credentials(refresh=True) is value


def test_environment():
    environ = {"AWS_ACCESS_KEY_ID": " A\n", "AWS_SECRET_ACCESS_KEY": "s"}
    provider = Environment(environ)
    assert provider.credentials() == Credentials("A", "s", None)
    environ["AWS_SESSION_TOKEN"] = "t"
    assert provider.credentials().token == "t"
    assert "t" not in vars(provider).get("token", "")


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_missing_key(missing):
    environ = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "hidden", missing: ""}
    with pytest.raises(AccessError) as error:
        Environment(environ).credentials()
    assert "hidden" not in str(error.value)
