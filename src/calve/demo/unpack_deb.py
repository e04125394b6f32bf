"""Debian packages unpacked without dpkg and without root.

A .deb is an ar archive of `debian-binary`, `control.tar.*` and `data.tar.*` (xz, gzip or zstd). Members are streamed
straight to files; nothing but directories, files, hard links and symbolic links is accepted, and nothing is written
outside the tree. /bin, /sbin and /lib* go below /usr; what a machine does not need is left out.
Source: deb(5), ar(5), Debian policy 10.
"""

from __future__ import annotations

import gzip
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from calve.demo.packages import paragraphs
from calve.errors import DamagedError
from calve.nix.zstd import ZstdDecompressor, ZstdError
from calve.tasks import Cancel

__all__ = ["Unpacker", "control", "data", "merged", "target", "wanted"]

_CHUNK_BYTES = 128 * 1024
_CONTROL_LIMIT_BYTES = 1 << 20

_MERGED = frozenset({"bin", "sbin", "lib", "lib32", "lib64", "libx32"})
_DROPPED = tuple(
    f"{name}/"
    for name in (
        "etc/cron.d",
        "etc/cron.daily",
        "etc/init.d",
        "etc/ufw",
        "usr/games",
        "usr/include",
        "usr/lib/modules",
        "usr/lib/udev/hwdb.d",
        "usr/lib/x86_64-linux-gnu/gconv",
        "usr/local",
        "usr/share/apport",
        "usr/share/bash-completion",
        "usr/share/bug",
        "usr/share/doc",
        "usr/share/doc-base",
        "usr/share/fish",
        "usr/share/info",
        "usr/share/initramfs-tools",
        "usr/share/lintian",
        "usr/share/locale",
        "usr/share/man",
        "usr/share/menu",
        "usr/share/zsh",
    )
)
"""What a server never reads, and what works only with a cache that maintainer scripts make (gconv, hwdb)."""


def merged(path: str) -> str:
    """Move bin, sbin and lib* of the root below usr; `path` is relative to the root."""
    return f"usr/{path}" if path.split("/", 1)[0] in _MERGED else path


def wanted(path: str) -> bool:
    """Say whether a merged path belongs into a store path: usr and etc, without what a server never reads."""
    return path.startswith(("usr/", "etc/")) and not f"{path}/".startswith(_DROPPED)


def target(path: str, link: str) -> str:
    """Return a symbolic link's target for its merged place; `path` is where the package has the link.

    Verbatim wherever that stays right. A relative target that leaves usr or etc becomes absolute: the two
    become different store paths.
    """
    if link.startswith("/"):
        return "/" + merged(link.lstrip("/"))
    resolved = posixpath.normpath(posixpath.join("/", posixpath.dirname(path), link)).lstrip("/")
    here, there = merged(path), merged(resolved)
    if here.split("/", 1)[0] != there.split("/", 1)[0]:
        return f"/{there}"
    if here == path and there == resolved:
        return link
    return posixpath.relpath(there, posixpath.dirname(here))


class _Window:
    """So many bytes of a file, from where it stands."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, none at the end of the window."""
        if size < 0 or size > self._left:
            size = self._left
        data = self._file.read(size)
        self._left -= len(data)
        return data


def _open_member(file: IO[bytes], wanted_stem: str, place: Path) -> tuple[str, _Window]:
    """Find the ar member `<stem>*`; return the rest of its name and its bytes."""
    if file.read(8) != b"!<arch>\n":
        raise DamagedError("not a Debian package", place=place)
    while header := file.read(60):
        digits = header[48:58].strip()
        if len(header) != 60 or header[58:] != b"`\n" or not digits.isdigit():
            raise DamagedError("a damaged ar header", place=place)
        name = header[:16].decode("ascii", "replace").rstrip(" ").rstrip("/")
        size = int(digits)
        if name.startswith(wanted_stem):
            return name.removeprefix(wanted_stem), _Window(file, size)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise DamagedError(f"a package without {wanted_stem}", place=place)


class _Zstd:
    """Decompresses as it is read."""

    def __init__(self, source: _Window) -> None:
        self._source = source
        self._decoder = ZstdDecompressor()

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most so many, none at the end."""
        while not self._decoder.eof:
            chunk = b""
            if self._decoder.needs_input:
                chunk = self._source.read(_CHUNK_BYTES)
                if not chunk:
                    raise EOFError("it ends early")
            data = self._decoder.decompress(chunk, size)
            if data:
                return data
        return b""


def _decompressed(suffix: str, window: _Window, place: Path) -> Any:
    source = cast("IO[bytes]", window)
    match suffix:
        case "":
            return window
        case ".xz":
            return lzma.LZMAFile(source)
        case ".gz":
            return gzip.GzipFile(fileobj=source)
        case ".zst":
            return _Zstd(window)
    raise DamagedError(f"a tar archive compressed as {suffix}", place=place)


@contextmanager
def _archive(deb: Path, stem: str) -> Iterator[tarfile.TarFile]:
    """Open control.tar or data.tar as a stream; whatever is wrong with its bytes is a DamagedError."""
    with deb.open("rb") as file:
        suffix, window = _open_member(file, stem, deb)
        try:
            with tarfile.open(fileobj=_decompressed(suffix, window, deb), mode="r|") as archive:
                yield archive
        except (
            tarfile.TarError,
            lzma.LZMAError,
            zlib.error,
            ZstdError,
            gzip.BadGzipFile,
            EOFError,
            ValueError,
        ) as error:
            raise DamagedError(f"{stem} is damaged: {error}", place=deb) from error


@contextmanager
def data(deb: Path) -> Iterator[Iterator[tuple[str, tarfile.TarInfo, IO[bytes] | None]]]:
    """Stream a package's members as (path relative to the root, header, content of a regular file).

    Raises:
        DamagedError: bad bytes; a path that is absolute or has `..`; a device or a pipe.
    """
    with _archive(deb, "data.tar") as archive:
        yield _members(archive, deb)


def _members(
    archive: tarfile.TarFile, deb: Path
) -> Iterator[tuple[str, tarfile.TarInfo, IO[bytes] | None]]:
    for member in archive:
        path = _relative(member.name, deb)
        if not (member.isdir() or member.isreg() or member.issym() or member.islnk()):
            raise DamagedError("neither file, directory nor link", place=f"{deb}: {member.name}")
        if path:
            yield path, member, archive.extractfile(member) if member.isreg() else None


def _relative(name: str, deb: Path) -> str:
    """Return a member's path without `./`; the root is empty."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise DamagedError("a path that leaves the package", place=f"{deb}: {name}")
    return "/".join(parts)


def control(deb: Path) -> dict[str, str]:
    """Return the fields of a package's control file."""
    with _archive(deb, "control.tar") as archive:
        for member in archive:
            if _relative(member.name, deb) == "control" and member.isreg():
                content = archive.extractfile(member)
                if content is None or member.size > _CONTROL_LIMIT_BYTES:
                    break
                text = content.read().decode("utf-8")
                for fields in paragraphs(text, f"{deb}: control"):
                    return fields
    raise DamagedError("a package without a control file", place=deb)


class Unpacker:
    """Unpacks packages into one tree, each file once.

    A symbolic link of a package is never followed: what lies below one is an error.

    Args:
        tree: an empty directory.
        keep: which merged paths to keep.
        cancel: looked at between members.
    """

    def __init__(
        self,
        tree: Path,
        keep: Callable[[str], bool] = wanted,
        cancel: Cancel | None = None,
    ) -> None:
        self._tree = tree
        self._keep = keep
        self._cancel = cancel if cancel is not None else Cancel()
        self._directories = {""}

    def add(self, deb: Path) -> int:
        """Unpack one package; return the bytes written.

        Raises:
            DamagedError: a malformed package, or a path that another package has.
        """
        written = 0
        with data(deb) as members:
            for original, member, content in members:
                self._cancel.check()
                path = merged(original)
                if not self._keep(path):
                    continue
                place = f"{deb}: {original}"
                if member.isdir():
                    self._directory(path, place)
                    continue
                self._directory(posixpath.dirname(path), place)
                try:
                    written += self._write(path, original, member, content, place)
                except FileExistsError as error:
                    raise DamagedError("a path that exists already", place=place) from error
        return written

    def _write(
        self,
        path: str,
        original: str,
        member: tarfile.TarInfo,
        content: IO[bytes] | None,
        place: str,
    ) -> int:
        out = self._tree / path
        if member.issym():
            if not member.linkname or "\0" in member.linkname:
                raise DamagedError("a symbolic link to nowhere", place=place)
            out.symlink_to(target(original, member.linkname))
            return 0
        if content is None:
            self._link(path, merged(_relative(member.linkname, Path(place))), place)
            return 0
        return _copy(content, out, member, place)

    def _link(self, path: str, source: str, place: str) -> None:
        if posixpath.dirname(source) not in self._directories:
            raise DamagedError(f"a hard link to {source}, which is not here", place=place)
        try:
            os.link(self._tree / source, self._tree / path, follow_symlinks=False)
        except FileNotFoundError as error:
            raise DamagedError(
                f"a hard link to {source}, which is not here", place=place
            ) from error

    def _directory(self, path: str, place: str) -> None:
        """Make a directory and its parents, unless we made them."""
        if path in self._directories:
            return
        self._directory(posixpath.dirname(path), place)
        try:
            (self._tree / path).mkdir(mode=0o755)
        except FileExistsError as error:
            raise DamagedError(f"{path} is no directory", place=place) from error
        self._directories.add(path)


def _copy(content: IO[bytes], out: Path, member: tarfile.TarInfo, place: str) -> int:
    """Write a regular file; setuid and the rest of the mode are dropped, executable stays."""
    mode = 0o755 if member.mode & 0o111 else 0o644
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    written = 0
    with os.fdopen(os.open(out, flags, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask is
        while chunk := content.read(_CHUNK_BYTES):
            written += file.write(chunk)
    if written != member.size:
        raise DamagedError(f"{written} of {member.size} bytes", place=place)
    return written
