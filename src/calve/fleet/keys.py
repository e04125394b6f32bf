"""Keys: the secret signing key, read from where the fleet file says and never shown; public ones as people give them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from calve import process
from calve.errors import AccessError, CalveError, NotFoundError, UsageError
from calve.fleet.config import Command, Environment, File, KeySource, Parameter, Secret
from calve.nix.signing import PublicKey, SecretKey
from calve.tasks import Cancel

__all__ = ["check_new", "public", "read", "read_file", "write_file"]

_MAX_BYTES = 4096
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read(
    source: KeySource, *, environ: Mapping[str, str] = os.environ, cancel: Cancel | None = None
) -> SecretKey:
    """Read a secret key.

    Args:
        source: where it is.
        environ: the environment; a command gets our own.
        cancel: ends a command.

    Raises:
        UsageError: what is there is not a secret key, or others than its owner may read the file.
        NotFoundError: there is no such file, program, parameter or secret.
        AccessError: the file may not be read, or AWS denies it.
        CalveError: the command or AWS failed.
    """
    match source:
        case File():
            return read_file(source.path)
        case Environment():
            text = environ.get(source.name, "")
            if not text:
                raise UsageError(
                    "there is no signing key: the variable is not set",
                    place=f"environment variable {source.name}",
                )
            return _parse(text.encode("utf-8", "replace"), f"environment variable {source.name}")
        case Command():
            return _parse(_output(source, cancel), f"output of {source.argv[0]}")
        case Parameter() | Secret():
            return _of_aws(source)


def read_file(path: Path) -> SecretKey:
    """Read a secret key from a file that only its owner may read; a pipe will do.

    Raises:
        UsageError, NotFoundError, AccessError: see `read`.
    """
    try:
        with path.open("rb") as file:
            return _secret(file, path)
    except FileNotFoundError as error:
        raise NotFoundError(
            "there is no such key file",
            place=path,
            hint="calve keys generate NAME makes a signing key",
        ) from error
    except PermissionError as error:
        raise AccessError("the key file may not be read", place=path) from error
    except OSError as error:
        raise CalveError(f"the key file cannot be read: {error.strerror}", place=path) from error


def _secret(file: BinaryIO, path: Path) -> SecretKey:
    """Read a secret key from an open file, of which nothing was read."""
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_mode & _OTHERS:
        raise UsageError(
            f"others may use this signing key: its mode is {status.st_mode & 0o777:04o}",
            place=path,
            hint=f"chmod 600 {path}",
        )
    return _parse(file.read(_MAX_BYTES + 1), path)


def _of_aws(source: Parameter | Secret) -> SecretKey:
    """Ask Systems Manager or Secrets Manager."""
    from calve.aws.secrets import ParameterStore, SecretsManager
    from calve.aws.session import Session

    session = Session(region=source.region, profile=source.profile)
    if isinstance(source, Parameter):
        with ParameterStore(session) as parameters:
            return _parse(parameters.secure_string(source.name).encode(), f"ssm {source.name}")
    with SecretsManager(session) as secrets:
        return _parse(secrets.secret_string(source.id).encode(), f"secretsmanager {source.id}")


def public(text: str) -> PublicKey:
    """Read a public key as people give it: NAME:BASE64, or a file with a public or a secret key.

    The text is not shown in errors: it may be a secret that was put into the wrong place.

    Raises:
        UsageError: it is neither; or others than its owner may read the file of a secret key.
        NotFoundError: there is no such file.
    """
    try:
        return PublicKey.parse(text)
    except UsageError as error:
        problem = error
    path = Path(text)
    try:
        with path.open("rb") as file:
            if file.seekable():
                with contextlib.suppress(UsageError):
                    return PublicKey.parse(file.read(_MAX_BYTES + 1).decode("utf-8", "replace"))
                file.seek(0)
            return _secret(file, path).public
    except (OSError, ValueError) as error:
        if ":" in text or not isinstance(error, FileNotFoundError):
            raise problem from None
        raise NotFoundError(
            "there is no such key file", hint="a key is NAME:BASE64, or a file that has one"
        ) from None


def _exists(path: Path) -> UsageError:
    return UsageError(
        "the file exists and is not overwritten", place=path, hint="give another --out"
    )


def check_new(path: Path) -> None:
    """Raise UsageError where `write_file` would, because the file exists."""
    if os.path.lexists(path):
        raise _exists(path)


def write_file(key: SecretKey, path: Path) -> None:
    """Write a secret key to a new file that only its owner may read.

    Raises:
        UsageError: the file exists; it is left as it is.
        CalveError: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise CalveError(f"cannot be written: {error.strerror}", place=path) from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            file.write(f"{key.dump()}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CalveError(f"cannot be written: {error.strerror}", place=path) from error


def _output(source: Command, cancel: Cancel | None) -> bytes:
    """Run the command; of its output nothing is ever shown, of its errors the last line."""
    place = f"cache.key.command {source.argv[0]}"
    try:
        done = process.run(source.argv, cwd=source.directory, check=False, cancel=cancel)
    except NotFoundError as error:
        raise NotFoundError(error.message, place=place) from error
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        raise CalveError(f"failed with {done.returncode}: {last[:300]}", place=place)
    return done.stdout


def _parse(data: bytes, place: object) -> SecretKey:
    if len(data) > _MAX_BYTES:
        raise UsageError("not a secret key: it is too long", place=place)
    try:
        return SecretKey.parse(data.decode("utf-8", "replace"))
    except UsageError as error:
        raise UsageError(error.message, place=place, hint=error.hint) from None
