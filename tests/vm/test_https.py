"""One boot over HTTPS by name: private CA, a resolver behind the machine's network, virtual hosts, a session token."""

from __future__ import annotations

import datetime as dt
import ssl
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from calve.demo.world import BUCKET, REGION, S3_DOMAIN
from calve.region.qemu import Forward
from calve.region.resolver import Resolver
from calve.region.server import Server

ADDRESS = "169.254.169.251"
RESOLVER = "169.254.169.253"  # Amazon's own address of it


def certificate(folder, names):
    """Make an authority and a certificate for some names; return the authority's file and a server's context."""
    now = dt.datetime.now(dt.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "private authority")])
    made = []
    for key, subject, authority in (
        (keys[0], issuer, True),
        (keys[1], x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]), False),
    ):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
            )
        made.append(builder.sign(keys[0], hashes.SHA256()))
    authority_file, chain = folder / "ca.pem", folder / "server.pem"
    authority_file.write_bytes(made[0].public_bytes(serialization.Encoding.PEM))
    chain.write_bytes(
        made[1].public_bytes(serialization.Encoding.PEM)
        + keys[1].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return authority_file, context


@pytest.fixture(scope="module")
def https(rig, tmp_path_factory):
    authority, context = certificate(tmp_path_factory.mktemp("ca"), [f"*.{S3_DOMAIN}"])
    before = rig.world.machines.forwards
    path = rig.release("tiny", 1)
    with (
        Server(rig.world.objects.handle, name="s3-tls", context=context) as server,
        Resolver({f"*.{S3_DOMAIN}": ADDRESS}) as resolver,
    ):
        rig.world.machines.forwards = (
            Forward(ADDRESS, 443, server.port),
            Forward(RESOLVER, 53, resolver.port),
        )
        endpoint = quote(f"https://{S3_DOMAIN}", safe="")
        cache = f"s3://{BUCKET}?region={REGION}&endpoint={endpoint}&addressing-style=virtual"
        # The machine's only network is TCP here: glibc is told to ask resolvers that way.
        options = '"RES_OPTIONS=use-vc timeout:2 attempts:2"'
        data = rig.user_data(path, caches=(cache,))
        try:
            with rig.boot(data, ca_file=authority, command_line=options) as boot:
                answer = boot.get()
                yield boot, answer, server, resolver
        finally:
            rig.world.machines.forwards = before


def test_it_serves(https):
    _, answer, _, _ = https
    assert answer == (200, "calve demo release 1\n")


def test_everything_came_over_tls_by_name(https, rig):
    boot, _, server, resolver = https
    assert server.requests >= 6
    assert boot.event("ready")["fetched_bytes"] > 10_000_000
    assert any(BUCKET in str(query) for query in resolver.queries)


def test_it_signed_with_the_role_s_session_token(https, rig):
    boot, _, _, _ = https
    mine = [call for call in rig.world.objects.calls if call.principal.endswith(boot.name)]
    assert mine
    assert {call.status for call in mine if call.key != "keyring.json"} == {200}
    assert all(call.principal == f"calve-machine/{boot.name}" for call in mine)
