"""What a cache behind a plain web server refuses; reading is tested with the transport and against real servers."""

from __future__ import annotations

import pytest

from calve.cache.objects import Listed
from calve.cache.web import WebObjects
from calve.errors import UsageError
from calve.transport.http import Client


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
