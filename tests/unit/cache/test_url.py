from __future__ import annotations

import pytest

from calve.cache.url import S3, Directory, Web, parse
from calve.errors import UsageError


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/srv/cache", "/srv/cache"),
        ("/srv/cache/", "/srv/cache"),
        ("file:///srv/cache", "/srv/cache"),
        (
            "file:///srv/cache?compression=zstd&secret-key=/k&parallel-compression=true",
            "/srv/cache",
        ),
        ("file:///srv/a%20b", "/srv/a b"),
        ("/", "/"),
    ],
)
def test_directories(text: str, path: str) -> None:
    assert parse(text) == Directory(path)


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("https://cache.nixos.org", "https://cache.nixos.org"),
        ("http://127.0.0.1:8080/a/b/?priority=10&trusted=true", "http://127.0.0.1:8080/a/b"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
    ],
)
def test_web(text: str, base: str) -> None:
    assert parse(text) == Web(base)


def test_s3_defaults_are_those_of_aws() -> None:
    where = parse("s3://acme-nix?region=eu-central-1")
    assert where == S3("acme-nix", "", "eu-central-1", "https", None, None, virtual=True)
    assert where.base == "https://acme-nix.s3.eu-central-1.amazonaws.com"
    assert parse("s3://acme-nix").region == "us-east-1"
    assert parse("s3://a.b.c?region=eu-west-1").base == "https://s3.eu-west-1.amazonaws.com/a.b.c"
    assert (
        parse("s3://acme?region=cn-north-1").base == "https://acme.s3.cn-north-1.amazonaws.com.cn"
    )


@pytest.mark.parametrize(
    ("query", "base"),
    [
        ("endpoint=127.0.0.1:9000&scheme=http", "http://127.0.0.1:9000/acme"),
        ("endpoint=http://127.0.0.1:9000", "http://127.0.0.1:9000/acme"),
        ("endpoint=http%3A%2F%2F127.0.0.1%3A9000%2F", "http://127.0.0.1:9000/acme"),
        ("endpoint=s3.example.org", "https://s3.example.org/acme"),
        ("endpoint=s3.example.org&addressing-style=virtual", "https://acme.s3.example.org"),
        ("addressing-style=path", "https://s3.us-east-1.amazonaws.com/acme"),
    ],
)
def test_s3_endpoints_and_addressing(query: str, base: str) -> None:
    assert parse(f"s3://acme?{query}").base == base


def test_s3_prefix_profile_and_text() -> None:
    where = parse("s3://acme/team/nix/?region=eu-west-1&profile=ops&multipart-upload=true")
    assert (where.prefix, where.profile) == ("team/nix/", "ops")
    assert str(where) == "s3://acme/team/nix?region=eu-west-1"
    assert parse(str(where)) == parse("s3://acme/team/nix?region=eu-west-1")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not the URL"),
        ("cache", "not the URL"),
        ("./cache", "not the URL"),
        ("ssh://host", "not the URL"),
        ("file://relative/dir", "absolute"),
        ("file:///a%00b", "absolute"),
        ("http://", "host"),
        ("http://user:secret@host/", "host"),
        ("https://host/a b", "blank"),
        ("https://host/#x", "fragment"),
        ("https://host?region=x", "'region'"),
        ("s3://acme?regoin=x", "'regoin'"),
        ("s3://acme?region=a&region=b", "twice"),
        ("s3://Acme", "bucket"),
        ("s3://a..b", "bucket"),
        ("s3://", "bucket"),
        ("s3://acme/../x", "prefix"),
        ("s3://acme?region=a/b", "region"),
        ("s3://acme?scheme=ftp", "scheme"),
        ("s3://acme?endpoint=a/b", "endpoint"),
        ("s3://acme?endpoint=ftp://a", "endpoint"),
        ("s3://acme?addressing-style=x", "addressing"),
    ],
)
def test_what_is_not_a_url_is_refused_with_its_place(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        parse(text)
    assert caught.value.place == text
