"""What a cache behind a plain web server refuses; reading is tested with the transport and against real servers."""

from __future__ import annotations

import pytest

from calve.cache.objects import Listed
from calve.cache.web import WebObjects
from calve.errors import TransientError, UsageError
from calve.region.message import Request, Response
from calve.region.server import Server
from calve.transport.http import Client
from calve.transport.retry import Policy


def test_a_web_server_can_only_be_read() -> None:
    listed = Listed("x", 1, "tag", 0.0)
    with Client() as client:
        cache = WebObjects("http://127.0.0.1:9", client)
        for call in (
            lambda: cache.put("x", b""),
            lambda: cache.put_stream("x", iter([b""])),
            lambda: cache.delete("x"),
            lambda: cache.delete("x", match="tag"),
            lambda: cache.delete_many([listed]),
            lambda: cache.list("x"),
        ):
            with pytest.raises(UsageError, match="web server") as caught:
                call()
            assert caught.value.place == "http://127.0.0.1:9/x"
        assert cache.delete_many([]) == []


def test_it_is_tried_again_as_long_as_the_client_says() -> None:
    asked: list[str] = []

    def handle(request: Request) -> Response:
        asked.append(request.path)
        return Response(503, {}, b"")

    with (
        Server(handle, name="down") as server,
        Client(retries=Policy(attempts=3, base_s=0.0)) as client,
        pytest.raises(TransientError),
    ):
        WebObjects(server.url, client).get("nix-cache-info", 100)
    assert len(asked) == 3
