"""The standard streams as a command can use them, whatever it was started with."""

from __future__ import annotations

import codecs
import io
import os
import sys

__all__ = ["let_go", "prepare"]

_PLAIN = {"━": b"="}


def prepare() -> None:
    """See that there are streams, and that they take what we write.

    A standard descriptor that is closed would be the number of the next file opened, a database say, and what is
    written to the stream would go there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # noqa: FBT003
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("calve", _as_it_came)
        sys.stdout.reconfigure(errors="calve")


def _as_it_came(error: UnicodeError) -> tuple[bytes, int]:
    """Let a path's bytes go out as they came in, and write `?` for what the stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    data = b""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        raw = 0xDC80 <= code <= 0xDCFF
        data += bytes([code - 0xDC00]) if raw else _PLAIN.get(character, b"?")
    return data, error.end


def let_go() -> None:
    """Flush, and forget a stream that cannot be: the interpreter would complain again at its end."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            setattr(sys, name, None)
