"""HAProxy itself: order of entering, draining, removing, and what a kept client connection sees of it."""

import http.client
import http.server
import signal
import threading
import time
from pathlib import Path

import pytest

from calve.errors import CalveError, ConflictError
from calve.region.balancer import HaProxy
from calve.region.targets import HealthCheck

CHECK = HealthCheck("/healthz", 5, 2, 2, 2)


class Page(http.server.ThreadingHTTPServer):
    """A machine of threads: /healthz answers `code`, every other page its name, /slow late."""

    daemon_threads = False

    def __init__(self, name="page", *, slow_s=0.5):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.code, self.slow_s = name, 200, slow_s
        self.ports = []
        self.release = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def handle_error(self, request, client_address):
        pass

    def close(self):
        self.release.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def __exit__(self, *_):
        self.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        code = 200
        if self.path == "/healthz":
            code = self.server.code
        else:
            self.server.ports.append(self.client_address[1])
        if self.path == "/slow":
            self.server.release.wait(self.server.slow_s)
        body = self.server.name.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def balancer():
    with HaProxy(check_interval_s=0.1) as one:
        one.start(CHECK)
        yield one


def get(client, path="/"):
    client.request("GET", path)
    answer = client.getresponse()
    return answer.status, answer.read()


@pytest.fixture
def client(balancer):
    one = http.client.HTTPConnection(*balancer.address, timeout=5)
    yield one
    one.close()


def test_a_target_has_no_traffic_until_it_is_ready_and_its_own_check_passed(balancer, client):
    with Page() as page:
        page.code = 503
        balancer.add("i-1", page.server_address)
        assert not balancer.checks()["i-1"].passing
        until(lambda: balancer.checks()["i-1"].known)
        check = balancer.checks()["i-1"]
        assert (check.passing, check.code) == (False, 503)
        page.code = 200
        until(lambda: balancer.checks()["i-1"].passing)
        assert get(client)[0] == 503
        balancer.ready("i-1")
        assert get(client) == (200, b"page")
        page.code = 500
        until(lambda: not balancer.checks()["i-1"].passing)
        assert balancer.checks()["i-1"].code == 500
        assert get(client)[0] == 503


def test_a_target_that_comes_back_is_not_believed_by_its_old_check(balancer):
    with Page() as page:
        balancer.add("i-1", page.server_address)
        until(lambda: balancer.checks()["i-1"].passing)
        balancer.remove("i-1")
        assert balancer.checks() == {}
        page.code = 503
        balancer.add("i-1", page.server_address)
        assert not balancer.checks()["i-1"].passing
        until(lambda: balancer.checks()["i-1"].known)
        assert not balancer.checks()["i-1"].passing


def test_a_silent_machine_times_out_and_a_closed_port_fails(balancer):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        balancer.add("i-1", silent.getsockname())
        until(lambda: balancer.checks()["i-1"].known)
        check = balancer.checks()["i-1"]
        assert (check.passing, check.timed_out, check.code) == (False, True, None)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    balancer.add("i-2", address)
    until(lambda: balancer.checks()["i-2"].known)
    check = balancer.checks()["i-2"]
    assert (check.passing, check.timed_out, check.code) == (False, False, None)


def test_a_kept_connection_sees_no_failure_while_its_machine_drains(balancer, client):
    with Page("old") as old, Page("new") as new:
        for name, page in (("i-1", old), ("i-2", new)):
            balancer.add(name, page.server_address)
            until(lambda name=name: balancer.checks()[name].passing)
        balancer.ready("i-1")
        answers = [get(client)]
        slow = threading.Thread(target=lambda: answers.append(get(client, "/slow")))
        slow.start()
        until(lambda: balancer.checks()["i-1"].connections == 1)
        balancer.ready("i-2")
        balancer.drain("i-1")
        assert balancer.checks()["i-1"].connections == 1
        slow.join()
        until(lambda: balancer.checks()["i-1"].connections == 0)
        balancer.remove("i-1")
        old.close()
        answers += [get(client) for _ in range(5)]
        assert answers == [(200, b"old")] * 2 + [(200, b"new")] * 5
        assert len(set(new.ports)) == 5  # no connection to a machine is kept


def test_removing_cuts_what_is_under_way(balancer, client):
    with Page(slow_s=30.0) as page:
        balancer.add("i-1", page.server_address)
        until(lambda: balancer.checks()["i-1"].passing)
        balancer.ready("i-1")
        client.request("GET", "/slow")
        until(lambda: balancer.checks()["i-1"].connections == 1)
        balancer.remove("i-1")
        with pytest.raises((http.client.HTTPException, ConnectionError, AssertionError)):
            answer = client.getresponse()
            assert answer.status == 200
        until(lambda: balancer.checks() == {})
        balancer.remove("i-1")  # nothing happens


def test_bad_input_and_a_second_start_are_refused(balancer):
    with pytest.raises(ConflictError):
        balancer.start(CHECK)
    with pytest.raises(CalveError, match="no target's name"):
        balancer.add("i-1; shutdown sessions", ("127.0.0.1", 1))
    with HaProxy() as other, pytest.raises(CalveError, match="health check path"):
        other.start(HealthCheck("/x\n  bind :1"))
    with pytest.raises(ConflictError, match="taken"):
        HaProxy(port=balancer.address[1])


def test_nothing_is_left(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o011)
    with HaProxy() as one:
        one.start(CHECK)
        pid = one._process.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert list(tmp_path.iterdir()) == []
    with HaProxy(port=one.address[1]) as again:
        assert again.address == one.address


def test_a_long_directory_holds_its_socket_and_is_left_empty(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with HaProxy(check_interval_s=0.1, directory=folder) as one:
        one.start(CHECK)
        assert one.checks() == {}
        assert len(list(folder.iterdir())) == 1
    assert list(folder.iterdir()) == []


def test_a_killed_haproxy_is_told_as_that(balancer):
    balancer._process.signal(signal.SIGKILL)
    balancer._process.wait()
    with pytest.raises(CalveError, match="haproxy has ended with -9"):
        balancer.checks()


def test_no_room_for_its_files_is_our_error(tmp_path):
    with HaProxy(directory=tmp_path / "absent") as one, pytest.raises(CalveError, match="start"):
        one.start(CHECK)
