"""The roles do their work in the region's S3 with their policies, and nothing beside it."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import io
import os
import threading

import pytest

from calve.cache import keyring, roots
from calve.cache.objects import Objects, open_objects
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.cache.roots import Root
from calve.clock import SYSTEM
from calve.errors import AccessError
from calve.fleet import ends, history, lock, release
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.infra.policies import policy
from calve.infra.roles import Role
from calve.infra.scope import Scope
from calve.nix import nar, narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import fixed_output
from calve.region.objects import ObjectService
from calve.region.server import Server
from calve.region.signature import Principals, allowed
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

REGION = "eu-central-1"
KEY = SecretKey.generate("acme-1")
NOW = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
SCOPE = Scope(region=REGION, bucket="acme-nix", prefix="p/", fleet="web", group="web")


class Account:
    """A region with a bucket, and a cache in it as each role sees it."""

    def __init__(self, directory, owner):
        self.principals = Principals()
        self.service = ObjectService(
            directory / "s3", self.principals, region=REGION, domains=("s3.localhost",)
        )
        self.service.add_bucket("acme-nix")
        self.server = owner.enter_context(Server(self.service.handle))
        self.owner = owner

    def role(self, role: Role, session: str = "i-0123456789abcdef0") -> Objects:
        """Return the cache as a role sees it; conditions are about other services than S3."""
        self.principals.set_policy(role.value, allowed(policy(role, SCOPE).document))
        key = self.principals.add_session(
            role.value, session, dt.datetime.max.replace(tzinfo=dt.UTC)
        )
        client = self.owner.enter_context(Client(context=None))
        where = f"s3://acme-nix/p?region={REGION}&endpoint={self.server.url}"
        given = Credentials(key.access_key, key.secret_key, key.token)
        return open_objects(where, client, Static(given))


@pytest.fixture
def account(tmp_path):
    before = set(threading.enumerate())
    with contextlib.ExitStack() as owner:
        yield Account(tmp_path, owner)
    assert set(threading.enumerate()) <= before


@pytest.fixture
def store(tmp_path):
    """Return a store with one path, which is large enough for a multipart upload."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(20 << 20))
    data = bytearray()
    narwriter.dump(tree, data.extend)
    nar_hash = Hash("sha256", hashlib.sha256(data).digest())
    path = fixed_output("system", nar_hash, ())
    source = io.BytesIO(data)
    with LocalStore(tmp_path / "store", create=True) as store:
        info = PathInfo(path, nar_hash, len(data), ())
        store.stage(info, nar.read(source.read, limit=len(data)))
        store.commit([info])
        yield store, path


@pytest.fixture
def pushed(account, store):
    """Return the manifest's digest of a closure that the builder pushed."""
    return push(store[0], [store[1]], account.role(Role.BUILDER), KEY).manifests[store[1]]


def make(objects, digest, path):
    return release.create(objects, "web", release.Content(str(path), digest, ("acme-1",)), now=NOW)


def denied(call, *args, **kwargs):
    with pytest.raises(AccessError):
        call(*args, **kwargs)
    return True


def test_the_builder_pushes_in_parts_again_and_leaves_nothing_under_way(account, store):
    builder = account.role(Role.BUILDER)
    assert push(store[0], [store[1]], builder, KEY).new_paths == 1
    assert account.service.counts["UploadPart"] == 2
    assert push(store[0], [store[1]], builder, KEY, check=True).new_paths == 0
    assert not list(builder.list("pending/"))


def test_the_builder_makes_no_release_and_takes_nothing_away(account, store, pushed):
    builder = account.role(Role.BUILDER)
    assert denied(make, builder, pushed, store[1])
    assert denied(builder.delete, f"{store[1].digest}.narinfo")
    assert denied(builder.put, keyring.KEY, b"{}")


def test_a_machine_pulls_and_reports_and_can_do_no_more(account, store, pushed, tmp_path):
    make(account.role(Role.RELEASER), pushed, store[1])
    machine = account.role(Role.MACHINE)
    with LocalStore(tmp_path / "machine", create=True) as sink:
        made = plan([machine], [store[1]], sink, Keyring((KEY.public,)), manifest=pushed)
        assert pull(made, sink).paths == 1
    assert keyring.read(machine, Keyring((KEY.public,))) is None
    here = account.principals.role_id("machine")
    machine.put(f"boot-reports/{here}:i-0123456789abcdef0/00000001.log", b"ok")
    assert denied(machine.put, f"boot-reports/{here}:i-0fedcba9876543210/00000001.log", b"ok")
    assert denied(machine.put, "nar/x", b"x")
    assert denied(machine.get, "fleets/web/releases/00000001.json", 1 << 16)
    assert denied(machine.get, f"boot-reports/{here}:i-0123456789abcdef0/00000001.log", 1 << 16)


def test_the_releaser_keeps_the_records_of_its_own_fleet(account, store, pushed):
    releaser = account.role(Role.RELEASER)
    with lock.held(releaser, "web", doing="deploy", clock=SYSTEM) as held:
        held.renew()
        assert make(releaser, pushed, store[1]).number == 1
    assert lock.read(releaser, "web", NOW) is None
    history.keep(releaser, "web", NOW)
    assert roots.read_root(releaser, "fleet", "web.00000001").manifest == pushed
    ends.write(releaser, Verdict("web", 1, Outcome.RELEASED, "", "cli", NOW))
    assert denied(
        release.create, releaser, "db", release.Content(str(store[1]), pushed, ()), now=NOW
    )
    assert denied(roots.write_root, releaser, Root("pin", "web", pushed, NOW))
    assert denied(releaser.put, "nar/x", b"x")
    assert denied(releaser.delete, "fleets/web/releases/00000001.json")


def test_the_guard_judges_and_makes_no_release(account, store, pushed):
    releaser = account.role(Role.RELEASER)
    make(releaser, pushed, store[1])
    history.keep(releaser, "web", NOW)
    guard = account.role(Role.GUARD)
    assert release.read(guard, "web", 1).manifest == pushed
    reason = Reason("boots", "it does not boot", (), "guard", NOW)
    ends.write_reason(guard, "web", 1, reason)
    ends.keep_log(guard, "web", 1, "i-0", "panic")
    ends.write(guard, Verdict("web", 1, Outcome.ROLLED_BACK, "", "guard", NOW))
    history.keep(guard, "web", NOW)
    assert roots.read_root(guard, "fleet", "web.00000001") is None
    ends.trip(guard, "web", 1, reason)
    assert denied(make, guard, pushed, store[1])
    assert denied(guard.put, "fleets/web/releases/00000001.json", b"{}")
    assert denied(guard.put, "fleets/web/lock.json", b"{}")
    assert denied(guard.get, "nar/x", 1)


def test_the_observer_sees_what_became_of_it(account, store, pushed):
    releaser = account.role(Role.RELEASER)
    make(releaser, pushed, store[1])
    ends.write(releaser, Verdict("web", 1, Outcome.RELEASED, "", "cli", NOW))
    observer = account.role(Role.OBSERVER)
    assert release.listed(observer, "web").latest == 1
    assert ends.read(observer, "web", 1).outcome is Outcome.RELEASED
    assert list(roots.list_roots(observer))
    assert observer.head(f"manifests/{pushed}.json.zst")
    assert denied(observer.put, "fleets/web/lock.json", b"{}")
    assert denied(observer.delete, "fleets/web/releases/00000001/verdict.json")
