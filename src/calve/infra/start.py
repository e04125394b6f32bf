"""A project's first files: the fleet file, the signing key, the workflow, a line for git.

Nothing that exists is written over. The line, which keeps the key out of git, comes before the
key, so that the key is never in a commit; the key before the fleet file, which names its public
half. Run again after an interruption, it goes on.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from calve.errors import CalveError, UsageError
from calve.fleet import keys
from calve.fleet.config import FILE_NAME, FLEET_NAME, Config, File, parse
from calve.infra.workflow import Workflow
from calve.nix.signing import SecretKey

__all__ = ["KEY_FILE", "WORKFLOW_FILE", "Begun", "Did", "Project", "Start", "begin"]

KEY_FILE: Final = "cache.sec"
WORKFLOW_FILE: Final = ".github/workflows/calve.yml"
_IGNORE_FILE: Final = ".gitignore"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9\-]{1,40}")


class Did(StrEnum):
    """What became of a file."""

    WRITTEN = "written"
    ADDED = "a line was added"
    EXISTS = "exists"
    WOULD_WRITE = "would be written"
    WOULD_ADD = "a line would be added"


@dataclass(frozen=True, slots=True)
class Start:
    """What the first files say.

    Attributes:
        bucket: of the cache.
        region: of the bucket and of the fleet.
        fleet: its name.
        system: a flake attribute, a file or a store path.
        group: the Auto Scaling group's name.
    """

    bucket: str
    region: str
    fleet: str
    system: str
    group: str

    def __post_init__(self) -> None:
        """Refuse what cannot stand in the files; UsageError names it."""
        for value, pattern, what in (
            (self.bucket, _BUCKET, "a bucket's name"),
            (self.region, _REGION, "a region's name"),
            (
                self.fleet,
                FLEET_NAME,
                "a fleet's name: lower-case letters, digits and -, at most 63",
            ),
        ):
            if not pattern.fullmatch(value):
                raise UsageError(f"{value!r} is not {what}")
        for value, what in ((self.system, "a system"), (self.group, "a group's name")):
            if not value or not value.isprintable():
                raise UsageError(f"{value!r} is not {what}")

    def fleet_file(self, public: str) -> str:
        """Return the text of calve.toml; `public` is the signing key's public half."""
        url = f"s3://{self.bucket}?region={self.region}"
        return f"""\
# The fleet file: what `calve` reads in this directory. An argument goes before what is said here.

[cache]
url = {_text(url)} # the bucket; `calve cache init` makes it
key = {{ file = {_text(KEY_FILE)} }} # signs pushes; also env, command, ssm or secretsmanager
trusted = [{_text(public)}] # public keys: what none of them signed is refused

[fleet.{self.fleet}]
system = {_text(self.system)} # a flake attribute, a file or a store path
delivery = "initrd" # also image, ssh, user-data-build, user-data-pull
group = {_text(self.group)} # the Auto Scaling group
health = {{ http = "/healthz", within = "3m" }} # or tcp = 80; from a machine's launch
rollout = {{ min-healthy = 100, max-healthy = 200, bake = "2m" }} # percent of the group's size
"""


@dataclass(frozen=True, slots=True)
class Project:
    """What is in a directory already; None is nothing."""

    directory: Path
    config: Config | None
    key: SecretKey | None
    ignored: str | None
    has_workflow: bool

    @classmethod
    def read(cls, directory: Path) -> Project:
        """Look at a directory, which may not exist.

        Raises:
            UsageError, CalveError: the fleet file or the key that is there cannot be used.
        """
        fleet_file, key_file = directory / FILE_NAME, directory / KEY_FILE
        text, ignored = _read(fleet_file), _read(directory / _IGNORE_FILE)
        has_key = text is None and os.path.lexists(key_file)
        return cls(
            directory,
            None if text is None else parse(text, fleet_file),
            keys.read_file(key_file) if has_key else None,
            ignored,
            os.path.lexists(directory / WORKFLOW_FILE),
        )


@dataclass(frozen=True, slots=True)
class Begun:
    """What `begin` did: each file; the public key, None where none was made or read."""

    files: tuple[tuple[str, Did], ...]
    public: str | None


def begin(
    project: Project, start: Start | None, fleet: str | None = None, *, dry_run: bool = False
) -> Begun:
    """Write the files that are missing.

    Args:
        project: what is there.
        start: what they say; needed where there is no fleet file.
        fleet: of the fleet file that is there, the one to deploy; by default its first.
        dry_run: write nothing, and say what would be.

    Raises:
        UsageError: what is there does not say enough.
        CalveError: a file cannot be written.
    """
    begun = Begun(((FILE_NAME, Did.EXISTS),), None)
    if project.config is not None:
        workflow = _workflow_of(project.config, fleet)
    elif start is None:
        raise UsageError("there is no fleet file, and nothing to make it of")
    else:
        base = project.directory.absolute()
        key = File(base / KEY_FILE)
        workflow = Workflow(start.fleet, start.system, start.region, key, base)
        begun = _write_fleet_file(project, start, dry_run=dry_run)
    if not project.has_workflow and not dry_run:
        _write(project.directory / WORKFLOW_FILE, workflow.text())
    last = (WORKFLOW_FILE, _did(new=not project.has_workflow, dry_run=dry_run))
    return Begun((*begun.files, last), begun.public)


def _write_fleet_file(project: Project, start: Start, *, dry_run: bool) -> Begun:
    """Write the fleet file, and before it the key that it names."""
    ignored = _ignore(project, dry_run=dry_run)
    key = project.key
    if key is None and not dry_run:
        path = project.directory / KEY_FILE
        key = SecretKey.generate(f"{start.bucket}-1")
        keys.write_file(key, path)
    public = None if key is None else key.public.dump()
    if public is not None and not dry_run:
        _write(project.directory / FILE_NAME, start.fleet_file(public))
    return Begun(
        (
            (_IGNORE_FILE, ignored),
            (KEY_FILE, _did(new=project.key is None, dry_run=dry_run)),
            (FILE_NAME, _did(new=True, dry_run=dry_run)),
        ),
        public,
    )


def _workflow_of(config: Config, name: str | None) -> Workflow:
    """Return the workflow of a fleet file's fleet."""
    from calve.cache import url as urls

    fleet = config.fleets.get(name) if name else next(iter(config.fleets.values()), None)
    place = urls.parse(config.cache.url) if config.cache is not None else None
    if fleet is None or config.cache is None or not isinstance(place, urls.S3):
        what = f"[fleet.{name or 'NAME'}]" if fleet is None else "a cache in a bucket"
        raise UsageError(
            f"the fleet file has no {what}", place=config.path, hint="it is not changed: add it"
        )
    base = config.path.absolute().parent
    return Workflow(fleet.name, fleet.system, place.region, config.cache.key, base)


def _did(*, new: bool, dry_run: bool) -> Did:
    if not new:
        return Did.EXISTS
    return Did.WOULD_WRITE if dry_run else Did.WRITTEN


def _ignore(project: Project, *, dry_run: bool) -> Did:
    """Have git ignore the key."""
    there = project.ignored or ""
    if {f"/{KEY_FILE}", KEY_FILE} & {line.strip() for line in there.splitlines()}:
        return Did.EXISTS
    if dry_run:
        return Did.WOULD_WRITE if project.ignored is None else Did.WOULD_ADD
    begun = "\n" if there and not there.endswith("\n") else ""
    line = f"{begun}/{KEY_FILE}\n"
    path = project.directory / _IGNORE_FILE
    if project.ignored is None:
        _write(path, line)
        return Did.WRITTEN
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise CalveError(f"cannot be written: {error.strerror}", place=path) from error
    return Did.ADDED


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8", place=path) from error
    except OSError as error:
        raise CalveError(f"cannot be read: {error.strerror}", place=path) from error


def _write(path: Path, text: str) -> None:
    """Write a new file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError as error:
        raise UsageError("the file exists and is not overwritten", place=path) from error
    except OSError as error:
        raise CalveError(f"cannot be written: {error.strerror}", place=path) from error


def _text(text: str) -> str:
    """Return a text as TOML writes it; JSON's form is one of TOML's."""
    return json.dumps(text, ensure_ascii=False)
