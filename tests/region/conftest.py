"""The region's services as fixtures, boto3 as their client; every test must leave no thread behind."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.util
import socket
import sys
import threading
from pathlib import Path

import boto3
import botocore.config
import pytest

from calve.clock import SystemClock
from calve.region.faults import FaultPlan
from calve.region.objects import ObjectService
from calve.region.server import Server
from calve.region.signature import Principals

REGION = "test-region"

_spec = importlib.util.spec_from_file_location(
    "uploading", Path(__file__).with_name("uploading.py")
)
uploading = importlib.util.module_from_spec(_spec)
sys.modules["uploading"] = uploading  # for the tests that want more of it than the fixture
_spec.loader.exec_module(uploading)


class ShiftedClock(SystemClock):
    """The machine's clock, moved by hand."""

    def __init__(self):
        self.shift = dt.timedelta()

    def now(self):
        return super().now() + self.shift

    def monotonic(self):
        return super().monotonic() + self.shift.total_seconds()


@pytest.fixture(autouse=True)
def _no_threads_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(autouse=True)
def _no_aws_of_the_host(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def clock():
    return ShiftedClock()


@pytest.fixture
def principals():
    return Principals()


@pytest.fixture
def admin(principals):
    return principals.add_user("admin")


@pytest.fixture
def service(tmp_path, principals, clock):
    service = ObjectService(
        tmp_path / "s3", principals, region=REGION, domains=("s3.localhost",), clock=clock
    )
    service.add_bucket("nix")
    return service


@pytest.fixture
def faults():
    return FaultPlan()


@pytest.fixture
def server(service, faults):
    with Server(service.handle, faults=faults) as server:
        yield server


@pytest.fixture
def client_of(server):
    """Return a function: a key (and options) in, a boto3 S3 client out."""
    clients = []

    def make(key, *, style="path", url=None, attempts=1, region=REGION, **options):
        client = boto3.client(
            "s3",
            endpoint_url=url or server.url,
            region_name=region,
            aws_access_key_id=key.access_key,
            aws_secret_access_key=key.secret_key,
            aws_session_token=key.token,
            config=botocore.config.Config(
                s3={"addressing_style": style},
                retries={"total_max_attempts": attempts},
                read_timeout=5,
            ),
            **options,
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def s3(client_of, admin):
    return client_of(admin)


@pytest.fixture
def raw(server):
    """Return a function: bytes in, all that the server answers until it closes out."""

    def exchange(data, port=None):
        with socket.create_connection(("127.0.0.1", port or server.port), timeout=5) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while more := sock.recv(65536):
                answer += more
        return answer

    return exchange


@pytest.fixture
def place(tmp_path, principals, admin, faults):
    """A region's EBS and EC2, and disks to upload; see `uploading`."""
    with contextlib.ExitStack() as owner:
        yield uploading.Place(tmp_path, principals, admin, faults, owner)
