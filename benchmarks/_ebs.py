"""The region's EBS direct in a process of its own, over TLS, and the uploaders that are measured against it.

`python -m benchmarks._ebs serve DIRECTORY DELAY_S` prints its address, keys and certificate, then serves until it is
ended. `python -m benchmarks._ebs calve|boto3 DISK COUNT` uploads blocks to what is told in the environment, and prints
what the PUTs took: wall and CPU seconds, without starting an interpreter, importing or beginning and sealing a snapshot.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import json
import os
import resource
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calve.disk.disk import BLOCK_BYTES, Block
from calve.process import Process
from calve.region.blocks import Snapshots
from calve.region.ebs import EbsService
from calve.region.faults import Delay, FaultPlan
from calve.region.server import Server
from calve.region.signature import Principals

REGION = "test-region"
THREADS = 64
_TOLD = "CALVE_BENCH_EBS"


class Ebs:
    """EBS direct that answers each request after the same delay."""

    def __init__(self, directory: Path, delay_s: float) -> None:
        argv = [sys.executable, "-m", "benchmarks._ebs", "serve", str(directory), str(delay_s)]
        self._process = Process(argv, stdout="pipe", stderr=sys.stderr.fileno())
        assert self._process.stdout is not None
        self._told = self._process.stdout.readline().decode()
        if not self._told:
            self._process.stop()
            raise SystemExit("the EBS service did not start")

    @property
    def cpu_s(self) -> float:
        """Return the CPU seconds that the service has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def upload(self, uploader: str, disk: Path, count: int) -> dict[str, float]:
        """Run an uploader; return `wall_s`, `cpu_s`, `requests`, `peak_mb`."""
        argv = [sys.executable, "-m", "benchmarks._ebs", uploader, str(disk), str(count)]
        env = {**os.environ, _TOLD: self._told}
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, check=True)
        return dict(json.loads(done.stdout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.stop()


# The service


def _certificate(file: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "region")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(secret + made.public_bytes(Encoding.PEM))


def serve(directory: Path, delay_s: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    certificate = directory / "region.pem"
    _certificate(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    principals = Principals()
    key = principals.add_user("bench")
    snapshots = Snapshots(directory / "ebs", region=REGION)
    service = EbsService(snapshots, principals)
    faults = FaultPlan()
    if delay_s:
        faults.add(Delay(delay_s), method="PUT", times=None)
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    with Server(service.handle, name="ebs", context=context, faults=faults) as server:
        told = {"url": server.url, "certificate": str(certificate)}
        told |= {"access_key": key.access_key, "secret_key": key.secret_key}
        print(json.dumps(told), flush=True)
        done.wait()


# The uploaders


def _measured(work: Callable[[], int]) -> dict[str, float]:
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    requests = work()
    wall_s, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak_mb = after.ru_maxrss / 1024
    return {"wall_s": wall_s, "cpu_s": cpu_s, "requests": requests, "peak_mb": peak_mb}


def _planned(disk: Path, count: int) -> list[Block]:
    with disk.open("rb") as file:
        data = (file.read(BLOCK_BYTES) for _ in range(count))
        return [Block(index, hashlib.sha256(one).hexdigest()) for index, one in enumerate(data)]


def calve(told: dict[str, str], disk: Path, count: int) -> dict[str, float]:
    """Upload as `calve` does: the plan's digests are known, a journal is kept, the schedule decides."""
    from calve.aws.ebs import EbsDirect
    from calve.image.journal import Begun, Journal
    from calve.image.schedule import Limits
    from calve.image.sending import Sending
    from calve.tasks import Cancel, limit_arenas
    from calve.transport.credentials import Credentials, Static
    from calve.transport.http import Client, tls_context

    limit_arenas()  # as every command does
    blocks = _planned(disk, count)
    keys = Static(Credentials(told["access_key"], told["secret_key"]))
    with (
        tempfile.TemporaryDirectory() as work,
        Client(context=tls_context(told["certificate"])) as client,
    ):
        ebs = EbsDirect(client, REGION, keys, endpoint=told["url"])
        made = ebs.start(8, token=os.urandom(8).hex())
        taken = Journal.open(Path(work, "journal"), Begun("", REGION, 0, made.id))
        with ebs.apart(connect_s=3.0, read_s=12.0) as puts:
            sending = Sending(puts, made.id, disk, blocks, taken=taken.done, limits=Limits())
            found = _measured(lambda: sending.run(Cancel()))
        taken.close()
        linear = hashlib.sha256(b"".join(bytes.fromhex(block.sha256) for block in blocks))
        ebs.complete(made.id, count, linear.digest())
    return found


def boto3(told: dict[str, str], disk: Path, count: int) -> dict[str, float]:
    """Upload as NixOS/amis does: 64 threads, a connection each, adaptive retries, a checksum per block."""
    import boto3 as boto
    from botocore.config import Config

    config = Config(
        connect_timeout=5,
        read_timeout=12,
        max_pool_connections=THREADS,
        retries={"mode": "adaptive", "total_max_attempts": 12},
    )
    client = boto.client(
        "ebs",
        endpoint_url=told["url"],
        verify=told["certificate"],
        region_name=REGION,
        aws_access_key_id=told["access_key"],
        aws_secret_access_key=told["secret_key"],
        config=config,
    )
    made = client.start_snapshot(VolumeSize=8, ClientToken=os.urandom(8).hex())["SnapshotId"]

    def put(index: int) -> None:
        with disk.open("rb") as file:
            file.seek(index * BLOCK_BYTES)
            data = file.read(BLOCK_BYTES)
        client.put_snapshot_block(
            SnapshotId=made,
            BlockIndex=index,
            BlockData=data,
            DataLength=len(data),
            Checksum=base64.b64encode(hashlib.sha256(data).digest()).decode(),
            ChecksumAlgorithm="SHA256",
        )

    def work() -> int:
        with ThreadPool(THREADS) as pool:
            return len(pool.map(put, range(count), chunksize=1))

    found = _measured(work)
    client.complete_snapshot(SnapshotId=made, ChangedBlocksCount=count)
    return found


def main() -> None:
    what, path, number = sys.argv[1:]
    if what == "serve":
        serve(Path(path), float(number))
        return
    uploaders = {"calve": calve, "boto3": boto3}
    told: dict[str, Any] = json.loads(os.environ[_TOLD])
    print(json.dumps(uploaders[what](told, Path(path), int(number))))


if __name__ == "__main__":
    main()
