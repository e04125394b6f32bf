"""TLS against a private authority."""

from __future__ import annotations

import datetime as dt
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from calve.errors import (
    CancelledError,
    NotFoundError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.tasks import Cancel
from calve.transport.http import Client, tls_context


def certificate(subject, key, issuer, issuer_key, *extensions):
    def name(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def authority(name, directory):
    """Make an authority and a certificate of it for `localhost`; return its file and a server's context."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_file, server_file = directory / f"{name}.pem", directory / f"{name}-server.pem"
    ca_file.write_bytes(
        certificate(name, ca_key, name, ca_key, x509.BasicConstraints(ca=True, path_length=None))
    )
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    server_file.write_bytes(secret + certificate("server", key, name, ca_key, names))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    return str(ca_file), context


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return authority("ours", tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return authority("theirs", tmp_path_factory.mktemp("theirs"))


def test_the_right_name(serve, ours):
    ca_file, context = ours
    body = b"x" * 300_000
    server = serve(lambda wire, _: wire.answer(body), context)
    with Client(context=tls_context(ca_file)) as client:
        for _ in range(10):
            url = f"https://localhost:{server.port}/"
            with client.request("GET", url) as response:
                assert response.read_all(1 << 20) == body
    assert (server.connections, len(server.requests)) == (1, 10)


def test_the_wrong_name(serve, ours):
    ca_file, context = ours
    server = serve(lambda wire, _: wire.answer(), context)
    with (
        Client(context=tls_context(ca_file)) as client,
        pytest.raises(VerificationError, match="certificate is refused"),
    ):
        client.request("GET", f"https://127.0.0.1:{server.port}/")
    assert not server.requests


def test_an_unknown_authority(serve, ours, theirs):
    server = serve(lambda wire, _: wire.answer(), theirs[1])
    for context in (tls_context(ours[0]), None):
        with Client(context=context) as client, pytest.raises(VerificationError) as error:
            client.request("GET", f"https://localhost:{server.port}/")
        assert "clock" in error.value.hint
    assert not server.requests


def test_tls_to_a_plain_server(serve, ours):
    def handler(wire, _):
        wire.answer()

    server = serve(handler)
    with (
        Client(context=tls_context(ours[0]), connect_s=0.3) as client,
        pytest.raises(TransientError),
    ):
        client.request("GET", f"https://localhost:{server.port}/")


def test_fin_before_the_end(serve, ours):
    ca_file, context = ours

    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        wire.hang_up()

    server = serve(handler, context)
    with (
        Client(context=tls_context(ca_file)) as client,
        client.request("GET", f"https://localhost:{server.port}/") as response,
    ):
        assert response.read() == b"hello"
        with pytest.raises(TransientError):
            response.read()


def test_closed_while_the_second_request_was_under_way(serve, ours):
    ca_file, context = ours

    def handler(wire, request):
        if request.number == 2:
            wire.hang_up()
        wire.answer()

    server = serve(handler, context)
    with Client(context=tls_context(ca_file)) as client:
        for _ in range(2):
            with client.request("GET", f"https://localhost:{server.port}/"):
                pass
    assert [request.connection for request in server.requests] == [1, 1, 2]


def test_cancel_wakes_a_blocked_read(serve, ours):
    ca_file, context = ours
    cancel = Cancel()

    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        cancel.cancel()
        wire.stall()

    server = serve(handler, context)
    with (
        Client(context=tls_context(ca_file), cancel=cancel, read_s=60) as client,
        pytest.raises(CancelledError),
        client.request("GET", f"https://localhost:{server.port}/") as response,
    ):
        response.read_all(100)


def test_bad_authority_files(tmp_path):
    with pytest.raises(NotFoundError):
        tls_context(str(tmp_path / "missing.pem"))
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(UsageError):
        tls_context(str(tmp_path / "empty.pem"))
