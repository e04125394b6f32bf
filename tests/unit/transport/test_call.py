from __future__ import annotations

import pytest

from calve.errors import (
    AccessError,
    ConflictError,
    DamagedError,
    NotFoundError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.transport.call import MAX_HOPS, follow, signed_request
from calve.transport.credentials import Credentials
from calve.transport.http import Client
from calve.transport.sigv4 import Signer

DATE = "Sun, 01 Mar 2026 12:00:00 GMT"  # the fake clock's


class Rotating:
    """A provider that gives a new key when asked to refresh."""

    def __init__(self):
        self.refreshes = 0

    def credentials(self, *, refresh=False):
        self.refreshes += refresh
        return Credentials(f"AKIA{self.refreshes}", "secret", f"token{self.refreshes}")


def refuse(wire, code, status="403 Forbidden", **fields):
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    wire.answer(body, status=status, **fields)


@pytest.fixture
def provider():
    return Rotating()


@pytest.fixture
def signer(provider, clock):
    return Signer("s3", "eu-central-1", provider, clock=clock)


def test_a_signed_put(serve, client, signer):
    server = serve(lambda wire, _: wire.answer())
    with signed_request(client, signer, "PUT", f"{server.url}/b/k", body=b"data"):
        pass
    (request,) = server.requests
    assert request.headers["x-amz-date"] == "20260301T120000Z"
    assert request.headers["x-amz-security-token"] == "token0"
    assert request.headers["x-amz-content-sha256"].startswith("3a6eb0790f39ac87")
    scope = "AKIA0/20260301/eu-central-1/s3/aws4_request"
    assert f"Credential={scope}, SignedHeaders=host;" in request.headers["authorization"]


def test_what_is_signed_of_the_body(signer, provider, clock):
    ebs = Signer("ebs", "eu-central-1", provider, clock=clock)
    https, http = "https://h/", "http://h/"
    given = {"x-amz-content-sha256": "00"}
    assert signer.payload_hash(https, {}, b"x") == "UNSIGNED-PAYLOAD"
    assert signer.payload_hash(https, given, b"x") == "00"
    assert signer.payload_hash(http, {}, [b"x"]) == "UNSIGNED-PAYLOAD"
    assert signer.payload_hash(http, {}, None).startswith("e3b0c442")
    assert ebs.payload_hash(https, {}, b"").startswith("e3b0c442")
    assert ebs.payload_hash(https, {}, [b""]) == "UNSIGNED-PAYLOAD"


def test_skew_is_corrected_once(serve, client, signer, provider):
    def handler(wire, request):
        if request.headers["x-amz-date"] == "20260301T180000Z":
            wire.answer(b"ok")
        else:
            refuse(wire, "RequestTimeTooSkewed", Date="Sun, 01 Mar 2026 18:00:00 GMT")

    server = serve(handler)
    for _ in range(2):
        with signed_request(client, signer, "GET", server.url) as response:
            assert response.read_all(10) == b"ok"
    assert len(server.requests) == 3
    assert provider.refreshes == 0


def test_a_denial_with_the_corrected_time_is_no_skew(serve, client, signer):
    date = "Sun, 01 Mar 2026 18:00:00 GMT"
    server = serve(lambda wire, _: refuse(wire, "AccessDenied", Date=date))
    for count in (2, 3):
        with pytest.raises(AccessError):
            signed_request(client, signer, "GET", server.url)
        assert len(server.requests) == count


def test_skew_that_stays(serve, client, signer):
    hours = iter(range(13, 24))

    def handler(wire, _):
        date = f"Sun, 01 Mar 2026 {next(hours)}:00:00 GMT"
        refuse(wire, "RequestTimeTooSkewed", Date=date)

    server = serve(handler)
    with pytest.raises(AccessError, match="TooSkewed") as error:
        signed_request(client, signer, "GET", server.url)
    assert "clock" in error.value.hint
    assert len(server.requests) == 2


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "ExpiredTokenException"])
def test_expired_credentials_are_renewed_once(serve, client, signer, provider, code):
    def handler(wire, request):
        if request.headers["x-amz-security-token"] == "token1":
            wire.answer(request.body)
        else:
            refuse(wire, code, "400 Bad Request", Date=DATE)

    server = serve(handler)
    with signed_request(client, signer, "PUT", server.url, body=b"again") as response:
        assert response.read_all(10) == b"again"
    assert (len(server.requests), provider.refreshes) == (2, 1)


def test_credentials_that_stay_expired(serve, client, signer, provider):
    server = serve(lambda wire, _: refuse(wire, "ExpiredToken", "400 Bad Request"))
    with pytest.raises(AccessError, match="ExpiredToken") as error:
        signed_request(client, signer, "GET", server.url)
    assert (len(server.requests), provider.refreshes) == (2, 1)
    assert "secret" not in str(error.value)


def test_threads_renew_once(signer, provider):
    generation = signer.generation
    for _ in range(3):
        signer.refresh(generation)
    assert provider.refreshes == 1
    signer.refresh(signer.generation)
    assert provider.refreshes == 2


def test_a_head_with_an_expired_token_has_no_body(serve, client, signer, provider):
    def handler(wire, request):
        wire.answer(status="200 OK" if request.number > 1 else "400 Bad Request")

    server = serve(handler)
    with signed_request(client, signer, "HEAD", server.url) as response:
        assert response.status == 200
    assert provider.refreshes == 1


def test_a_body_in_pieces_is_not_sent_again(serve, client, signer, provider):
    server = serve(lambda wire, _: refuse(wire, "ExpiredToken", "400 Bad Request"))
    with pytest.raises(AccessError):
        signed_request(client, signer, "PUT", server.url, body=iter([b"x"]))
    assert (len(server.requests), provider.refreshes) == (1, 0)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        ("403 Forbidden", "AccessDenied", AccessError),
        ("404 Not Found", "NoSuchKey", NotFoundError),
        ("412 Precondition Failed", "PreconditionFailed", ConflictError),
        ("503 Busy", "SlowDown", TransientError),
        ("307 Temporary Redirect", "TemporaryRedirect", UsageError),
    ],
)
def test_other_errors_are_not_tried_again(serve, client, signer, status, code, kind):
    server = serve(lambda wire, _: refuse(wire, code, status, Date=DATE, Location="/x"))
    with pytest.raises(kind):
        signed_request(client, signer, "GET", server.url)
    assert len(server.requests) == 1


def test_a_malformed_date_is_ignored(serve, client, signer):
    server = serve(lambda wire, _: refuse(wire, "AccessDenied", Date="yesterday"))
    with pytest.raises(AccessError):
        signed_request(client, signer, "GET", server.url)
    assert len(server.requests) == 1


def test_without_a_signer(serve, client):
    def handler(wire, request):
        if request.path == "/old":
            wire.answer(status="302 Found", Location="/new")
        elif request.path == "/new":
            wire.answer(b"ok")
        else:
            wire.answer(status="404 Not Found")

    server = serve(handler)
    with signed_request(client, None, "GET", f"{server.url}/old") as response:
        assert response.read_all(10) == b"ok"
        assert response.url == f"{server.url}/new"
    with pytest.raises(NotFoundError):
        signed_request(client, None, "GET", f"{server.url}/none")
    with pytest.raises(NotFoundError):
        signed_request(client, None, "PUT", f"{server.url}/none", body=b"")
    assert not any("authorization" in request.headers for request in server.requests)


def test_follow_to_another_host_drops_secrets(serve, client):
    other = serve(lambda wire, _: wire.answer(b"ok"))

    def handler(wire, request):
        location = f"{other.url}/there?x=1#part" if request.path == "/2" else "2"
        wire.answer(status="307 x", Location=location)

    server = serve(handler)
    headers = {"Authorization": "Basic x", "X-Amz-Security-Token": "t", "Range": "bytes=1-"}
    with follow(client, "GET", f"{server.url}/1", headers=headers) as response:
        assert response.read_all(10) == b"ok"
    assert [request.path for request in server.requests] == ["/1", "/2"]
    assert all("authorization" in request.headers for request in server.requests)
    (request,) = other.requests
    assert request.path == "/there?x=1"
    assert request.headers["range"] == "bytes=1-"
    assert not {"authorization", "x-amz-security-token"} & set(request.headers)


def test_a_loop_ends(serve, client):
    server = serve(lambda wire, _: wire.answer(status="301 x", Location="/"))
    with pytest.raises(VerificationError, match="redirects"):
        follow(client, "GET", server.url)
    assert len(server.requests) == MAX_HOPS + 1


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/",
        "http://[fd00:ec2:0:0::254]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://2852039166/latest/meta-data/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://169.254.169.254./",
        "http://a..b/",
        f"http://{'a' * 64}.example/",
        "//host:99999/",
        "ftp://host/",
        "file:///etc/passwd",
        "http://user:pass@host/",
        "http://[::1/",
        "/a b",
    ],
)
def test_redirects_that_are_refused(serve, client, location):
    server = serve(lambda wire, _: wire.answer(status="302 x", Location=location))
    with pytest.raises(VerificationError):
        follow(client, "GET", server.url)
    assert len(server.requests) == 1


def test_a_redirect_to_nowhere(serve, client):
    server = serve(lambda wire, _: wire.answer(status="302 x"))
    with pytest.raises(DamagedError):
        follow(client, "GET", server.url)


def test_https_stays_https():
    class Redirecting(Client):
        def request(self, method, url, **kwargs):
            return Answer()

    class Answer:
        status = 302
        headers = {"location": "http://host/"}  # noqa: RUF012
        place = "https://host/"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    with Redirecting() as client, pytest.raises(VerificationError, match="https to http"):
        follow(client, "GET", "https://host/")


def test_only_reads_are_redirected(client):
    with pytest.raises(UsageError):
        follow(client, "PUT", "http://host/")


@pytest.mark.parametrize(
    "date",
    [
        "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 99999999999 00:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Mon, 01 Jan 0001 00:00:00 +1400",
    ],
)
def test_a_date_beyond_all_bounds_is_ignored(serve, client, signer, clock, date):
    server = serve(lambda wire, _: refuse(wire, "RequestTimeTooSkewed", Date=date))
    for _ in range(2):
        with pytest.raises(AccessError):
            signed_request(client, signer, "GET", server.url)
        clock.seconds += 3600
    assert len(server.requests) == 2
