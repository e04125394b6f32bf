"""What serves caches to what is measured: nginx with a delay per request, and the region's S3, each its own process.

`python -m benchmarks._server DIRECTORY DELAY_S OTHERS` is the S3: it prints its address, its keys and the address
at which it tells its counts, then serves until it is ended.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calve.errors import CalveError
from calve.process import Process, which
from calve.region.faults import Delay, FaultPlan
from calve.region.objects import ObjectService
from calve.region.objects_store import Object
from calve.region.server import Request, Response, Server
from calve.region.signature import ANONYMOUS, Allow, Principals

REGION = "test-region"
BUCKET = "bench"
UNSIGNED = "nix-"
"""What buckets begin with that take unsigned requests too."""
_WITHIN_S = 120.0

_CONFIGURATION = """
{modules}
daemon off;
pid {work}/nginx.pid;
error_log {work}/error.log;
events {{ worker_connections 1024; }}
http {{
  log_format requests '$request_method $request_uri $status $body_bytes_sent $connection';
  access_log {work}/access.log requests;
  client_body_temp_path {work}/body;
  proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi;
  scgi_temp_path {work}/scgi;
  sendfile on;
  tcp_nodelay on;
  keepalive_requests 100000;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    location / {{ {delay} }}
  }}
}}
"""
_MODULES = "/usr/lib/nginx/modules"
_LUA = ("ndk_http_module.so", "ngx_http_lua_module.so")


class Nginx:
    """Serves a directory, each request after the same delay; a process of its own, unprivileged.

    Raises:
        CalveError: nginx, or its Lua module where a delay is asked for, is not installed, or it does not start.
    """

    def __init__(self, root: Path, delay_s: float) -> None:
        self._root = root.absolute()
        self._delay_s = delay_s
        self._owner = contextlib.ExitStack()
        self._work = Path()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._work = Path(
                undo.enter_context(tempfile.TemporaryDirectory(prefix="calve-nginx-"))
            )
            self._work.chmod(0o777)
            listener = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.settimeout(0)  # nginx takes it as it is, and wants it so
            self._port = listener.getsockname()[1]
            (self._work / "nginx.conf").write_text(self._configuration())
            log = self._work / "error.log"
            process = undo.enter_context(
                Process(
                    [
                        *(which("nginx", package="nginx-light"), "-p", self._work, "-e", log),
                        *("-c", self._work / "nginx.conf"),
                    ],
                    # Our socket is inherited: the port is never free for somebody else.
                    env={"NGINX": f"{listener.fileno()};", "PATH": os.defpath},
                    pass_fds=[listener.fileno()],
                    stderr=sys.stderr.fileno() if "CALVE_BENCH_DEBUG" in os.environ else None,
                    unprivileged=True,
                )
            )
            end = time.monotonic() + 10
            while not (self._work / "nginx.pid").exists():
                if process.returncode is not None or time.monotonic() > end:
                    said = log.read_text() if log.exists() else ""
                    raise CalveError(f"nginx does not run: {said.strip()[-500:]}")
                time.sleep(0.01)
            self._owner = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner.__exit__(kind, error, trace)

    def _configuration(self) -> str:
        modules = delay = ""
        if self._delay_s:
            modules = "".join(f"load_module {_MODULES}/{name};\n" for name in _LUA)
            delay = f"access_by_lua_block {{ ngx.sleep({self._delay_s}) }}"
        return _CONFIGURATION.format(
            modules=modules, delay=delay, work=self._work, port=self._port, root=self._root
        )

    def log(self) -> list[str]:
        """Return the requests so far: method, path, status, bytes of the body, connection."""
        file = self._work / "access.log"
        return file.read_text().splitlines() if file.exists() else []

    def requests(self) -> int:
        return len(self.log())


# S3


class S3:
    """The region's S3 in a process of its own, with a bucket that holds other objects already."""

    def __init__(self, directory: Path, delay_s: float, others: int = 0) -> None:
        argv = [
            sys.executable,
            "-m",
            "benchmarks._server",
            str(directory),
            str(delay_s),
            str(others),
        ]
        self._process = Process(argv, stdout="pipe", stderr=sys.stderr.fileno())
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.stop()
            raise SystemExit("the S3 service did not start")
        self._told: dict[str, Any] = json.loads(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def endpoint(self) -> str:
        return str(self._told["url"])

    @property
    def credentials(self) -> dict[str, str]:
        """Return the variables that give a client its keys."""
        return {
            "AWS_ACCESS_KEY_ID": self._told["access_key"],
            "AWS_SECRET_ACCESS_KEY": self._told["secret_key"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }

    def counts(self) -> dict[str, int]:
        """Return how many requests there were, by operation."""
        return dict(self._ask("counts"))

    def calls(self) -> list[list[Any]]:
        """Return the last requests: method, operation, key, status."""
        return list(self._ask("calls"))

    def requests(self) -> int:
        return sum(self.counts().values())

    def bucket(self, name: str) -> str:
        """Make a bucket; return its name."""
        self._ask(f"bucket/{name}")
        return name

    def forget(self, bucket: str, prefix: str = "") -> None:
        """Remove all objects that begin so."""
        self._ask(f"forget/{bucket}/{prefix}")

    def _ask(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self._told['control']}/{what}", timeout=_WITHIN_S) as answer:
            return json.loads(answer.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.stop()


def _fill(bucket: Path, count: int) -> None:
    """Write other objects as a bucket keeps them; all have the same, empty, data file."""
    bucket.mkdir(parents=True)
    (bucket / "other.data").touch()
    etag = hashlib.md5(b"").hexdigest()
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    for number in range(count):
        key = f"{hashlib.sha256(b'%d' % number).hexdigest()[:32]}.narinfo"
        entry = Object(key, 0, etag, now, "other.data")
        name = hashlib.sha256(key.encode()).hexdigest()
        (bucket / f"{name}.json").write_bytes(entry.dump())


def _control(service: ObjectService, request: Request) -> Response:
    answer: Any = None
    match request.path.strip("/").split("/", 2):
        case ["counts"]:
            answer = service.counts
        case ["calls"]:
            answer = [[it.method, it.operation, it.key, it.status] for it in list(service.calls)]
        case ["bucket", name]:
            service.add_bucket(name)
        case ["forget", name, *prefix]:
            _forget(service, name, prefix[0] if prefix else "")
        case _:
            return Response(404, {}, b"")
    return Response(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())


def _forget(service: ObjectService, name: str, prefix: str) -> None:
    from calve.region.objects_store import Condition

    bucket = service.bucket(name)
    after: str | None = ""
    while after is not None:
        found, after = bucket.listing(prefix, "", after, 1000)
        for entry in found:
            if isinstance(entry, Object):
                bucket.delete(entry.key, Condition())


def main() -> None:
    directory, delay_s, others = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _fill(directory / BUCKET, others)
    principals = Principals()
    key = principals.add_user("bench")
    # A Nix that was built without AWS's library does not sign: it has buckets that anyone may write to.
    principals.set_policy(ANONYMOUS.principal, [Allow("s3:*", f"arn:aws:s3:::{UNSIGNED}*")])
    service = ObjectService(directory, principals, region=REGION)
    service.add_bucket(BUCKET)
    faults = FaultPlan()
    if delay_s:
        faults.add(Delay(delay_s), times=None)
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    with (
        Server(service.handle, name="s3", faults=faults) as s3,
        Server(lambda request: _control(service, request), name="control") as control,
    ):
        told = {"url": s3.url, "control": control.url}
        told |= {"access_key": key.access_key, "secret_key": key.secret_key}
        print(json.dumps(told), flush=True)
        done.wait()


if __name__ == "__main__":
    main()
