"""NAR, the archive that Nix hashes and ships: a stream of events, read, written and dumped from a file system.

Every string is a little-endian 64-bit length, the bytes, and zeros up to a multiple of 8. Only the canonical form is
read, so that what was unpacked dumps to the same bytes again.
Source: https://nix.dev/manual/nix/latest/protocols/nix-archive

A tree is a sequence of events: `Directory` … `End` around its entries in bytewise order of their names; `File`, then
its content in `bytes` of at most 256 KiB each, `size` in all; `Symlink`. The root's name is empty.
"""

from __future__ import annotations

from collections.abc import Iterator

from calve.errors import DamagedError
from calve.nix.narformat import (
    CHUNK_BYTES,
    CLOSE,
    CLOSE_ENTRY,
    CONTENTS,
    DIRECTORY,
    END,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    MAX_DATA_BYTES,
    MAX_DEPTH,
    MAX_NAME_BYTES,
    MAX_TARGET_BYTES,
    NODE,
    NODE_OF_ENTRY,
    REGULAR,
    SYMLINK,
    TARGET,
    U64,
    ZEROS,
    Directory,
    End,
    Event,
    File,
    Source,
    Symlink,
    Write,
    check_name,
    check_target,
)
from calve.nix.narwriter import dump, emit

__all__ = [
    "CHUNK_BYTES",
    "MAX_DEPTH",
    "Directory",
    "End",
    "Event",
    "File",
    "Source",
    "Symlink",
    "Write",
    "check_name",
    "dump",
    "emit",
    "read",
]


# Together with a string or a token that was cut, one event at most.
_READ_BYTES = MAX_DATA_BYTES - 8 * 1024


class _Input:
    """A NAR's bytes with a place in them; never holds more than two chunks.

    `data[at]` is the next byte; `received` counts what came from the source, so that the place in the NAR is
    `received - len(data) + at`. Every token of the grammar that may come next is 16 bytes or longer: one may look
    16 bytes ahead without asking for more than a well-formed NAR has.
    """

    __slots__ = ("at", "data", "limit", "received", "source")

    def __init__(self, source: Source, limit: int) -> None:
        self.source = source
        self.limit = limit
        self.data = b""
        self.at = 0
        self.received = 0

    @property
    def offset(self) -> int:
        return self.received - len(self.data) + self.at

    def damaged(self, what: str) -> DamagedError:
        return DamagedError(f"damaged NAR: {what} at byte {self.offset}")

    def more(self) -> bool:
        """Get another chunk behind what is left; False at the end of the source."""
        chunk = self.source(_READ_BYTES)
        self.received += len(chunk)
        if self.received > self.limit:
            raise DamagedError(
                f"damaged NAR: longer than the {self.limit} bytes that were promised"
            )
        self.data = self.data[self.at :] + chunk if self.at < len(self.data) else chunk
        self.at = 0
        return bool(chunk)

    def need(self, size: int) -> None:
        """Have `size` bytes at hand."""
        while len(self.data) - self.at < size:
            if not self.more():
                self.at = len(self.data)
                raise self.damaged("it ends too early,")

    def accept(self, token: bytes) -> bool:
        """Step over a token if its first 16 bytes, which must exist, are next."""
        if len(self.data) - self.at < 16:
            self.need(16)
        if self.data.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def expect(self, token: bytes) -> None:
        """Step over a token."""
        if len(self.data) - self.at < len(token):
            self.need(len(token))
        if not self.data.startswith(token, self.at):
            raise self.damaged("an unexpected token")
        self.at += len(token)

    def length(self) -> int:
        """Read the length of a string; what it promises must fit into the limit."""
        if len(self.data) - self.at < 8:
            self.need(8)
        size: int = U64.unpack_from(self.data, self.at)[0]
        if size > self.limit - self.offset - 8:
            raise self.damaged("a string longer than the whole")
        self.at += 8
        return size

    def string(self, limit: int, what: str) -> bytes:
        """Read a string of at most `limit` bytes."""
        size = self.length()
        if size > limit:
            raise self.damaged(f"a {what} of {size} bytes")
        padded = size + 7 & ~7
        if len(self.data) - self.at < padded:
            self.need(padded)
        return self.padded(size)

    def padded(self, size: int) -> bytes:
        """Take bytes that are at hand, and step over their padding."""
        start = self.at
        end = start + size
        self.at = end + (-size % 8)
        if self.at != end and self.data[end : self.at] != ZEROS[: self.at - end]:
            raise self.damaged("padding other than zeros")
        return self.data[start:end]

    def content(self, size: int) -> Iterator[bytes]:
        """Read a file's bytes and their padding."""
        left = size
        while left:
            if self.at == len(self.data) and not self.more():
                raise self.damaged("it ends too early,")
            start = self.at
            self.at += min(left, len(self.data) - start)
            left -= self.at - start
            yield self.data[start : self.at]
        self.need(-size % 8)
        self.padded_zeros(-size % 8)

    def padded_zeros(self, size: int) -> None:
        if self.data[self.at : self.at + size] != ZEROS[:size]:
            raise self.damaged("padding other than zeros")
        self.at += size


def read(source: Source, *, limit: int) -> Iterator[Event]:
    """Read a NAR as events, to the source's end.

    Args:
        source: gives the bytes.
        limit: how long the NAR may be at most, its NarSize.

    Raises:
        DamagedError: it is not a NAR in canonical form, ends early, goes on behind its end, or exceeds the limit;
            the message names the byte.
    """
    stream = _Input(source, limit)
    stream.expect(MAGIC)
    stream.expect(NODE)
    name = b""
    last: list[bytes] = []  # of each open directory the name that came last: no recursion
    while True:
        close = CLOSE_ENTRY if last else CLOSE
        if stream.accept(REGULAR):
            yield from _file(stream, name)
            stream.expect(close)
        elif stream.accept(SYMLINK):
            stream.expect(TARGET)
            yield Symlink(name, _target(stream))
            stream.expect(close)
        else:
            stream.expect(DIRECTORY)
            yield Directory(name)
            last.append(b"")
        while last and stream.accept(CLOSE):
            yield END
            last.pop()
            if last:
                stream.expect(CLOSE)
        if not last:
            break
        name = _entry(stream, last)
    if stream.at < len(stream.data) or stream.more():
        raise stream.damaged("bytes behind the end")


def _file(stream: _Input, name: bytes) -> Iterator[Event]:
    executable = not stream.accept(CONTENTS)
    if executable:
        stream.expect(EXECUTABLE)
        stream.expect(CONTENTS)
    size = stream.length()
    yield File(name, size, executable)
    if size + 8 <= len(stream.data) - stream.at:  # at hand with its padding: the usual case
        if size:
            yield stream.padded(size)
    else:
        yield from stream.content(size)


def _target(stream: _Input) -> bytes:
    target = stream.string(MAX_TARGET_BYTES, "symlink target")
    if not check_target(target):
        raise stream.damaged("a symlink target that is empty or has a NUL")
    return target


def _entry(stream: _Input, last: list[bytes]) -> bytes:
    """Read an entry of a directory, up to and with its node's `( type`; return its name."""
    stream.expect(ENTRY)
    name = stream.string(MAX_NAME_BYTES, "name")
    if not check_name(name):
        raise stream.damaged(f"the name {name!r}")
    if name <= last[-1]:
        raise stream.damaged(f"the name {name!r}, not in order after {last[-1]!r}")
    if len(last) > MAX_DEPTH:
        raise stream.damaged(f"{name!r}, more than {MAX_DEPTH} deep")
    last[-1] = name
    stream.expect(NODE_OF_ENTRY)
    return name
