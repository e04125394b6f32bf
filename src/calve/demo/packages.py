"""Debian packages by name: the versions that apt would install, verified, kept in a cache directory.

apt's own lists (signed by Debian) say which version and which sha256; `apt-get download` brings the file. Nothing
here needs root, and nothing is fetched where the cache holds the file with that sha256.
Source: apt-cache(8), apt-get(8), deb822(5).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calve.errors import CalveError, DamagedError, NotFoundError
from calve.nix.unpack import storage_error
from calve.process import run, which
from calve.progress import Note, Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["Deb", "Packages", "Record", "paragraphs"]

_BATCH = 12  # packages per apt-get: progress moves, and a cancelled fetch keeps what it has
_CHUNK_BYTES = 256 * 1024
_UNKNOWN_TO_APT = "E: No packages found"


@dataclass(frozen=True, slots=True, order=True)
class Record:
    """What apt's lists say about one package file."""

    name: str
    version: str
    architecture: str
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        """Return the name under which `apt-get download` leaves the file."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


@dataclass(frozen=True, slots=True)
class Deb:
    """A package file on disk whose sha256 was checked."""

    name: str
    version: str
    sha256: str
    path: Path


def paragraphs(text: str, place: object) -> Iterator[dict[str, str]]:
    """Read deb822 paragraphs: fields by name, continuation lines joined.

    Raises:
        DamagedError: a line that is neither a field nor a continuation.
    """
    fields: dict[str, str] = {}
    last = ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0] in " \t":
            if not last:
                raise DamagedError("a continuation line without a field", place=f"{place}:{number}")
            fields[last] += "\n" + line.strip()
        else:
            last, colon, value = line.partition(":")
            if not colon or not last:
                raise DamagedError("a line that is no field", place=f"{place}:{number}")
            fields[last] = value.strip()


class Packages:
    """Package files by name, fetched into `cache_dir`.

    Args:
        cache_dir: where the files stay; made where it is missing.
        progress: told the bytes fetched.
        cancel: ends apt.
    """

    def __init__(
        self, cache_dir: Path, progress: Progress = silent, cancel: Cancel | None = None
    ) -> None:
        self.cache_dir = cache_dir
        self.progress = progress
        self.cancel = cancel if cancel is not None else Cancel()

    def fetch(self, names: Sequence[str]) -> list[Deb]:
        """Return the packages of these names, in their order; fetch those that the cache lacks.

        Raises:
            NotFoundError: apt does not know a name.
            DamagedError: what was fetched is not what apt's lists promise.
            SpaceError, CalveError: the cache directory cannot be written to, or apt failed.
        """
        try:
            return self._fetch(names)
        except OSError as error:
            raise storage_error(error, self.cache_dir) from error

    def _fetch(self, names: Sequence[str]) -> list[Deb]:
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        records = self._records(names)
        lacking = [record for record in records if not self._holds(record)]
        done, total = 0, sum(record.size_bytes for record in lacking)
        for start in range(0, len(lacking), _BATCH):
            self.cancel.check()
            batch = lacking[start : start + _BATCH]
            self.progress(Step("packages", done, total))
            self._download(batch)
            done += sum(record.size_bytes for record in batch)
        if lacking:
            self.progress(Step("packages", done, total))
        return [
            Deb(record.name, record.version, record.sha256, self.cache_dir / record.file_name)
            for record in records
        ]

    def _records(self, names: Sequence[str]) -> list[Record]:
        """Ask apt for the candidate versions."""
        argv = [which("apt-cache", package="apt"), "show", "--no-all-versions", "--", *names]
        shown = run(argv, env=_environment(), check=False, cancel=self.cancel)
        found: dict[str, Record] = {}
        for fields in paragraphs(shown.stdout.decode("utf-8", "replace"), "apt-cache show"):
            record = _record(fields)
            found.setdefault(record.name, record)
        unknown = [name for name in names if name not in found]
        said = shown.stderr.decode("utf-8", "replace")
        trouble = [
            line for line in said.splitlines() if line[:3] == "E: " and line != _UNKNOWN_TO_APT
        ]
        if unknown and trouble:
            raise CalveError(f"apt-cache failed: {trouble[0]}")
        if unknown:
            raise NotFoundError(
                f"apt knows no package {', '.join(unknown)}",
                hint="the demo is made of Debian 12 (amd64) packages; apt-get update renews apt's lists",
            )
        return [found[name] for name in names]

    def _holds(self, record: Record) -> bool:
        path = self.cache_dir / record.file_name
        try:
            if path.stat().st_size != record.size_bytes:
                return False
        except FileNotFoundError:
            return False
        if _sha256(path) == record.sha256:
            return True
        self.progress(Note(f"{path.name} in the cache is damaged, fetching it again"))
        return False

    def _download(self, batch: Sequence[Record]) -> None:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.cache_dir) as name:
            directory = Path(name)
            argv = [
                which("apt-get", package="apt"),
                "download",
                "-q",
                # The temporary directory is ours alone: apt's own user could not write there.
                *(("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()),
                "--",
                *(f"{record.name}={record.version}" for record in batch),
            ]
            run(argv, cwd=directory, env=_environment(), cancel=self.cancel)
            for record in batch:
                path = directory / record.file_name
                if not path.is_file():
                    raise CalveError(f"apt-get download left no {record.file_name}")
                if _sha256(path) != record.sha256:
                    raise DamagedError(
                        "the package is not the one in apt's lists",
                        place=record.file_name,
                        hint="apt-get update renews apt's lists",
                    )
                path.replace(self.cache_dir / record.file_name)


def _record(fields: dict[str, str]) -> Record:
    try:
        return Record(
            name=fields["Package"],
            version=fields["Version"],
            architecture=fields["Architecture"],
            sha256=fields["SHA256"].lower(),
            size_bytes=int(fields["Size"]),
        )
    except (KeyError, ValueError) as error:
        raise DamagedError(
            f"a package without {error}",
            place=f"apt-cache show {fields.get('Package', '')}".rstrip(),
            hint="apt-get update renews apt's lists",
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "C"}
