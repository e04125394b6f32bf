"""What this user has seen of keyrings: their highest sequences, a small file for each cache.

`$XDG_STATE_HOME/calve/keyrings/<SHA-256 of the cache's URL>.json` (`~/.local/state/…` by default), for its owner
alone: `{"version": 1, "cache": URL, "sequence": N}`. The agent has a record of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from calve import record
from calve.cache import keyring
from calve.errors import CalveError, DamagedError, UsageError

if TYPE_CHECKING:
    from calve.cache.keyring import Trusted
    from calve.cache.objects import Objects
    from calve.nix.signing import Keyring

__all__ = ["Sequences", "directory", "remember", "trusted"]

VERSION = 1
_MAX_BYTES = 16 * 1024


def directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where this user's files are; a relative XDG_STATE_HOME is ignored, as its specification says."""
    given = environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(given) if given.startswith("/") else Path("~/.local/state").expanduser()
    except RuntimeError:  # nobody's home: nothing is there, and nothing can be
        base = Path("/dev/null")
    return base / "calve/keyrings"


class Sequences:
    """The highest sequences seen, in a directory."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def _file(self, url: str) -> Path:
        return self._place / f"{hashlib.sha256(url.encode('utf-8')).hexdigest()}.json"

    def load(self, url: str) -> int:
        """Return the highest sequence seen of a cache; 0 for none.

        Raises:
            UsageError: the file is damaged: whoever removes it gives up what it knew.
        """
        path = self._file(url)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=path) from error
        try:
            fields = record.parse(
                data,
                what="file of a keyring's sequence",
                version=VERSION,
                limit=_MAX_BYTES,
                place=str(path),
            )
            return fields.number("sequence")
        except DamagedError as error:
            raise UsageError(
                error.message,
                place=path,
                hint="look at calve keys list, and remove the file if the keyring is the newest",
            ) from error

    def save(self, url: str, sequence: int) -> None:
        """Remember a sequence unless a higher one is known; whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        if sequence <= self.load(url):
            return
        self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = os.open(self._place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX)  # another process may be remembering a higher one
            if sequence > self.load(url):
                self._replace(url, sequence)
        finally:
            os.close(owner)

    def _replace(self, url: str, sequence: int) -> None:
        body = record.dump({"version": VERSION, "cache": url, "sequence": sequence})
        descriptor, temporary = tempfile.mkstemp(dir=self._place, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._file(url))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def trusted(
    caches: Sequence[Objects], roots: Keyring, *, sequences: Sequences | None = None
) -> Trusted:
    """Read the keyrings of caches, as `keyring.trusted`, and remember their sequences for this user.

    Where they cannot be remembered (no home directory, a read-only one), the keyrings count all the same.

    Raises:
        CalveError: those of `keyring.trusted`; what was remembered cannot be read.
    """
    memory = Sequences(directory()) if sequences is None else sequences
    seen = {cache.url: memory.load(cache.url) for cache in caches}
    found = keyring.trusted(caches, roots, seen)
    remember(memory, found.sequences)
    return found


def remember(memory: Sequences, sequences: Mapping[str, int]) -> None:
    """Save sequences where that is possible."""
    with suppress(OSError):
        for url, sequence in sequences.items():
            memory.save(url, sequence)
