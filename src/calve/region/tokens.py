"""Block tokens and page tokens of EBS direct: opaque to the client, bound to what they were given for, and short-lived.

Source: EBS direct API reference (base64, at most 256 characters) and "EBS direct APIs" (EBS User Guide): a block token
lasts 7 days, a page token 60 minutes.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import struct

__all__ = ["BLOCK_TOKEN_S", "PAGE_TOKEN_S", "Tokens"]

BLOCK_TOKEN_S = 7 * 24 * 3600.0
PAGE_TOKEN_S = 3600.0
_HEAD = struct.Struct(">dQ")
_MAC_BYTES = 24


class Tokens:
    """Issues tokens and reads them back.

    Args:
        key: Signs them; the same key reads them.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def issue(self, scope: str, expires_at: float, value: int = 0) -> str:
        """Make a token.

        Args:
            scope: What it is good for; it must be read with the same.
            expires_at: Seconds since 1970.
            value: A number it carries.
        """
        head = _HEAD.pack(expires_at, value)
        return base64.b64encode(head + self._mac(scope, head)).decode()

    def read(self, scope: str, token: str, now: float) -> int | None:
        """Return the number a token carries; None where it is forged, altered, of another scope or expired."""
        try:
            data = base64.b64decode(token, validate=True)
        except (binascii.Error, ValueError):
            return None
        head, mac = data[: _HEAD.size], data[_HEAD.size :]
        if len(mac) != _MAC_BYTES or not hmac.compare_digest(mac, self._mac(scope, head)):
            return None
        expires_at, value = _HEAD.unpack(head)
        return int(value) if now < expires_at else None

    def _mac(self, scope: str, head: bytes) -> bytes:
        return hmac.digest(self._key, scope.encode() + b"\0" + head, "sha256")[:_MAC_BYTES]
