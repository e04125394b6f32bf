"""The one place that spawns processes.

`run` for a command that ends, `Process` for one that stays: both belong to whoever opened them and are gone when
the owner leaves, Ctrl-C included. Children never see the terminal's input and stand in a session of their own, so
that a Ctrl-C reaches them only through their owner.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from calve.errors import CalveError, CancelledError, NotFoundError
from calve.tasks import Cancel

__all__ = ["Process", "run", "which"]

NOBODY = 65534
_TAIL_LINES = 20


def which(name: str, *, package: str | None = None) -> str:
    """Return a program's path; NotFoundError names the Debian package that has it.

    /usr/sbin is searched too: Debian keeps mke2fs and haproxy there, out of a user's PATH.
    """
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if found is None:
        raise NotFoundError(
            f"the program {name} is not installed",
            hint=f"apt-get install {package or name}",
        )
    return found


def _tail(data: bytes) -> str:
    lines = data.decode("utf-8", "replace").strip().splitlines()[-_TAIL_LINES:]
    return "\n".join(lines)


def run(
    argv: Sequence[str | Path],
    *,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cancel: Cancel | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end and return its output.

    Args:
        argv: program and arguments; no shell.
        stdin: what it reads.
        cwd: where it runs.
        env: its whole environment; None is ours.
        check: raise CalveError, with the last lines of stderr, where it fails.
        cancel: kills the command and raises CancelledError when cancelled.
    """
    name = Path(str(argv[0])).name
    try:
        child = subprocess.Popen(
            [str(arg) for arg in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
    except OSError as error:
        raise NotFoundError(f"cannot run {name}: {error.strerror}") from error
    with child:
        # Its children hold the pipes too: all of its session goes.
        unhook = cancel.on_cancel(lambda: _kill(child.pid)) if cancel is not None else lambda: None
        try:
            out, err = child.communicate(stdin)
        except BaseException:
            _kill(child.pid)
            raise
        finally:
            unhook()
    if cancel is not None and cancel.cancelled:
        raise CancelledError
    done = subprocess.CompletedProcess(child.args, child.returncode, out, err)
    if check and done.returncode != 0:
        raise CalveError(f"{name} failed with {done.returncode}: {_tail(err or out)}")
    return done


def _kill(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


class Process:
    """A child process that stays until `stop`; use it as a context manager.

    Args:
        argv: program and arguments; no shell.
        stdin: a descriptor for its input, None for none.
        stdout: a file or descriptor for its output, "pipe" for `self.stdout`, None to drop it.
        stderr: likewise; "stdout" joins the two.
        pass_fds: descriptors that it inherits.
        unprivileged: run as nobody where we are root.
        env: its whole environment; None is ours.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: int | None = None,
        stdout: IO[bytes] | int | str | None = None,
        stderr: IO[bytes] | int | str | None = None,
        pass_fds: Sequence[int] = (),
        unprivileged: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        drop = unprivileged and os.geteuid() == 0
        self._child = subprocess.Popen(
            [str(arg) for arg in argv],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=_stream(stdout),
            stderr=_stream(stderr),
            pass_fds=tuple(pass_fds),
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
            user=NOBODY if drop else None,
            group=NOBODY if drop else None,
            extra_groups=[] if drop else None,
        )
        self.pid = self._child.pid
        self.stdout = self._child.stdout

    @property
    def returncode(self) -> int | None:
        """Return the exit status, None while it runs; minus the signal's number where one ended it."""
        return self._child.poll()

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end, at most so many seconds; return the exit status or None."""
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens where it has ended."""
        self._child.send_signal(number)

    def stop(self, grace_s: float = 3.0) -> None:
        """End it: TERM, after the grace KILL to all of its session; idempotent."""
        if self._child.poll() is None:
            self._child.terminate()
            if self.wait(grace_s) is None:
                _kill(self.pid)
                self._child.wait()
        if self.stdout is not None:
            self.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _stream(target: IO[bytes] | int | str | None) -> IO[bytes] | int:
    match target:
        case None:
            return subprocess.DEVNULL
        case "pipe":
            return subprocess.PIPE
        case "stdout":
            return subprocess.STDOUT
        case str():
            raise ValueError(target)
        case _:
            return target
