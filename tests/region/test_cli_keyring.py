"""`calve keys` and `calve cache init` as an operator runs them: processes, the region's S3, a directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import calve
from calve.cache.keyring import Document
from calve.nix.signing import Keyring, SecretKey
from calve.region.faults import Answer
from calve.region.message import Response

ROOT, NEW, OLD = (SecretKey.generate(name) for name in ("root-1", "new-1", "old-1"))
ROOTS = Keyring((ROOT.public,))


class Operator:
    """A home, root keys, and how to call calve."""

    def __init__(self, directory: Path):
        self.directory = directory
        for key in (ROOT, NEW, OLD):
            place = directory / f"{key.name}.sec"
            place.write_text(key.dump())
            place.chmod(0o600)
        self.env = {
            **os.environ,
            "PYTHONPATH": str(Path(calve.__file__).parents[1]),
            "HOME": str(directory / "home"),
        }
        for name in ("NO_COLOR", "FORCE_COLOR", "AWS_PROFILE", "XDG_STATE_HOME"):
            self.env.pop(name, None)
        self.secrets = [key.dump()[10:60] for key in (ROOT, NEW, OLD)]

    def run(self, *args, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "calve", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
            env=self.env,
            cwd=self.directory,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, done.stderr
        for secret in self.secrets:
            assert secret not in done.stdout + done.stderr
        return done

    def json(self, *args):
        return json.loads(self.run(*args, "--json").stdout)

    def states(self, *args):
        return {one["name"]: one["state"] for one in self.json("cache", "init", *args)["steps"]}


@pytest.fixture
def operator(tmp_path):
    return Operator(tmp_path)


@pytest.fixture
def url(server, admin, operator):
    operator.env["AWS_ACCESS_KEY_ID"] = admin.access_key
    operator.env["AWS_SECRET_ACCESS_KEY"] = admin.secret_key
    return f"s3://fresh/pre/fix?region=test-region&endpoint={server.url}"


SETTINGS = ("ownership", "public-access-block", "encryption", "incomplete-uploads")


def test_a_bucket_from_nothing(operator, url, service):
    root = ("--root-key", "root-1.sec")
    dry = operator.states("--cache", url, *root, "--dry-run")
    assert dry["bucket"] == dry["keyring.json"] == "would change"
    assert service.counts["CreateBucket"] == service.counts["PutObject"] == 0
    first = operator.states("--cache", url, *root)
    # A bucket that is new has AWS's defaults.
    assert {name for name, state in first.items() if state == "changed"} == {
        "bucket",
        "incomplete-uploads",
        "nix-cache-info",
        "keyring.json",
    }
    bucket = service.bucket("fresh")
    assert bucket.keys() == ["pre/fix/keyring.json", "pre/fix/nix-cache-info"]
    before = {key: bucket.get(key).etag for key in bucket.keys()}  # noqa: SIM118
    again = operator.states("--cache", url, *root)
    assert set(again.values()) == {"already"}
    assert list(again) == ["bucket", "conditions", *SETTINGS, "nix-cache-info", "keyring.json"]
    assert service.counts["PutBucketLifecycleConfiguration"] == 1
    # The probe came and went.
    assert {key: bucket.get(key).etag for key in bucket.keys()} == before  # noqa: SIM118
    assert any("pre/fix/calve-probe-" in call.key for call in service.calls)


def test_an_older_bucket_is_brought_up_to_date(operator, url, service):
    service.add_bucket("fresh")
    told = operator.run("cache", "init", "--cache", url).stdout.splitlines()
    assert [line.partition(" (")[0] for line in told] == [
        "bucket: already",
        "conditions: already",
        *(f"{name}: changed" for name in SETTINGS),
        "nix-cache-info: changed",
    ]
    assert set(operator.states("--cache", url).values()) == {"already"}


@pytest.mark.parametrize(
    ("ignored", "name"),
    [
        (("PutObject", "if-none-match"), "If-None-Match of PutObject"),
        (
            ("CompleteMultipartUpload", "if-none-match"),
            "If-None-Match of CompleteMultipartUpload",
        ),
        (("PutObject", "if-match"), "If-Match of PutObject"),
        (("DeleteObject", "if-match"), "If-Match of DeleteObject"),
        (("DeleteObjects", "etag"), "ETag of DeleteObjects"),
    ],
)
def test_a_store_that_ignores_conditions(operator, url, service, ignored, name):
    bucket = service.add_bucket("fresh")
    service.ignored = frozenset({ignored})
    refused = operator.run("cache", "init", "--cache", url, code=2)
    assert f"the store ignores or does not know {name}\n" in refused.stderr
    assert bucket.keys() == []
    assert service.counts["PutPublicAccessBlock"] == 0


def test_a_store_without_some_settings(operator, url, service):
    service.add_bucket("fresh")
    service.settings.unsupported = frozenset({"publicAccessBlock", "ownershipControls"})
    told = operator.states("--cache", url)
    assert told["public-access-block"] == told["ownership"] == "unsupported"
    assert told["encryption"] == "changed"


def test_denied(operator, url, service, principals):
    service.add_bucket("fresh")
    nobody = principals.add_user("nobody", [])
    operator.env["AWS_ACCESS_KEY_ID"] = nobody.access_key
    operator.env["AWS_SECRET_ACCESS_KEY"] = nobody.secret_key
    assert "s3:ListBucket" in operator.run("cache", "init", "--cache", url, code=4).stderr


def test_a_directory_and_a_web_server(operator, tmp_path):
    there = tmp_path / "cache"
    assert operator.states("--cache", there, "--dry-run") == {"nix-cache-info": "would change"}
    assert not there.exists()
    assert operator.states("--cache", there) == {"nix-cache-info": "changed"}
    assert operator.states("--cache", there) == {"nix-cache-info": "already"}
    assert "StoreDir: /nix/store" in (there / "nix-cache-info").read_text()
    operator.run("cache", "init", "--cache", "https://127.0.0.1:1", code=2)
    assert "no cache is named" in operator.run("cache", "init", code=2).stderr


# Keys


@pytest.fixture(params=["directory", "s3"])
def cache(request, operator, tmp_path):
    if request.param == "directory":
        return str(tmp_path / "cache")
    url = request.getfixturevalue("url")
    request.getfixturevalue("service").add_bucket("fresh")
    return url


def test_a_key_comes_and_another_goes(operator, cache):
    root = ("--cache", cache, "--root-key", "root-1.sec")
    trust = ("--cache", cache, "--trusted", ROOT.public.dump())
    assert "has no keyring" in operator.run("keys", "list", *trust).stderr
    dry = operator.json("keys", "add", OLD.public.dump(), *root, "--dry-run")
    assert (dry["sequence"], dry["changed"], dry["dry_run"]) == (1, True, True)
    assert operator.json("keys", "add", OLD.public.dump(), *root)["sequence"] == 1
    # The file of a secret key stands for its public one.
    added = operator.run("keys", "add", "new-1.sec", *root)
    assert added.stdout.startswith("added to the keyring of ")
    assert operator.run("keys", "revoke", "old-1", *root).returncode == 0
    assert operator.run("keys", "revoke", "old-1", *root).stdout.startswith("already revoked")
    told = operator.json("keys", "list", *trust)
    assert told.pop("cache")
    assert told == {
        "trusted": [ROOT.public.dump(), NEW.public.dump()],
        "roots": [ROOT.public.dump()],
        "sequence": 3,
        "added": [NEW.public.dump()],
        "revoked": [OLD.public.dump()],
        "signed_by": ["root-1"],
    }
    listed = operator.run("keys", "list", *trust)
    assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [
        ["root-1", "root"],
        ["new-1", "added"],
        ["old-1", "revoked"],
    ]


def test_a_rollback_is_noticed_by_the_next_command(operator, tmp_path):
    cache = tmp_path / "cache"
    root = ("--cache", cache, "--root-key", "root-1.sec")
    operator.run("keys", "add", OLD.public.dump(), *root)
    before = (cache / "keyring.json").read_bytes()
    operator.run("keys", "revoke", "old-1", *root)
    (cache / "keyring.json").write_bytes(before)
    trust = ("--cache", cache, "--trusted", ROOT.public.dump())
    assert "number 2 was seen before" in operator.run("keys", "list", *trust, code=7).stderr
    (cache / "keyring.json").unlink()
    operator.run("keys", "list", *trust, code=7)
    operator.run("keys", "add", NEW.public.dump(), *root, code=7)
    operator.run("keys", "revoke", OLD.public.dump(), *root, "--sequence", 2, code=2)
    operator.run("keys", "revoke", OLD.public.dump(), *root, "--sequence", 3)
    assert operator.json("keys", "list", *trust)["sequence"] == 3


def test_two_operators_at_once(operator, url, service, faults):
    service.add_bucket("fresh")
    root = ("--cache", url, "--root-key", "root-1.sec")
    operator.run("keys", "add", OLD.public.dump(), *root)
    body = b"<Error><Code>PreconditionFailed</Code><Message>At least one did not hold</Message></Error>"
    lost = Response(412, {"Content-Type": "application/xml"}, body)
    faults.add(Answer(lost), method="PUT", path="*keyring.json")
    refused = operator.run("keys", "add", NEW.public.dump(), *root, code=6)
    assert "somebody else changed the keyring at the same time" in refused.stderr
    assert operator.json("keys", "add", NEW.public.dump(), *root)["sequence"] == 2


def test_the_fleet_file_says_where_all_is(operator, tmp_path):
    (tmp_path / "calve.toml").write_text(
        f'[cache]\nurl = "{tmp_path}/c"\ntrusted = ["{ROOT.public.dump()}"]\n'
        'root-key = { command = ["cat", "root-1.sec"] }\nkey = { file = "new-1.sec" }\n'
    )
    told = operator.states()
    assert told == {"nix-cache-info": "changed", "keyring.json": "changed"}
    assert operator.json("keys", "add", "new-1.sec")["sequence"] == 2
    assert operator.run("keys", "show").stdout == f"{NEW.public.dump()}\n"
    assert operator.json("keys", "list")["added"] == [NEW.public.dump()]
    body = (tmp_path / "c/keyring.json").read_bytes()
    assert Document.parse(body).verify(ROOTS) == "root-1"


def test_show_takes_public_keys(operator, tmp_path):
    (tmp_path / "new.pub").write_text(f"{NEW.public.dump()}\n")
    for source in ("new.pub", NEW.public.dump(), "new-1.sec"):
        assert operator.run("keys", "show", source).stdout == f"{NEW.public.dump()}\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("add", NEW.public.dump()), 2, "no root key"),
        (("add", NEW.public.dump(), "--root-key", "root-1.sec"), 2, "no cache is named"),
        (("add", NEW.dump(), "--cache", "/c", "--root-key", "root-1.sec"), 2, "not a public key"),
        (("add", "none", "--cache", "/c", "--root-key", "root-1.sec"), 5, "no such key file"),
        (("revoke", "x", "--cache", "c:", "--root-key", "root-1.sec"), 2, "not the URL"),
        (("list",), 2, "no root key is known"),
        (("show",), 2, "no key to show"),
        (("show", NEW.dump()), 2, "holds 64 bytes instead of 32"),
        (("show", "none"), 5, "no such key file"),
    ],
)
def test_wrong_usage(operator, args, code, words):
    assert words in operator.run("keys", *args, code=code).stderr


def test_a_root_key_that_readers_do_not_have(operator, tmp_path):
    args = ("--cache", tmp_path / "c", "--root-key", "new-1.sec", "--trusted", ROOT.public.dump())
    refused = operator.run("keys", "add", OLD.public.dump(), *args, code=2)
    assert "new-1 is not one of the root keys" in refused.stderr
    assert not (tmp_path / "c").exists()
