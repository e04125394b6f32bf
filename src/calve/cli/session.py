"""One call of the command line: its streams, its cancellation, its progress.

The command runs in a thread of its own and the main thread only waits: a signal cancels the token, and whatever is
being cleaned up is never interrupted half-way.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from calve.errors import CalveError, CancelledError, UsageError
from calve.tasks import Cancel, limit_arenas

__all__ = ["Session"]

_WAIT_S = 0.2


class Session:
    """Streams and cancellation of one command.

    Args:
        out: results; the process's stdout by default.
        err: prose; stderr by default.
    """

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.cancel = Cancel()
        self._out = out
        self._err = err

    @property
    def out(self) -> IO[str]:
        """Return where results go."""
        return self._out or sys.stdout

    @property
    def err(self) -> IO[str]:
        """Return where prose goes."""
        return self._err or sys.stderr

    def prose(self, text: str) -> None:
        """Print a line for people; nothing fails because they went away."""
        with contextlib.suppress(OSError):
            print(text, file=self.err, flush=True)

    def result(self, text: str) -> None:
        """Print a line of the result."""
        print(text, file=self.out, flush=True)

    def document(self, body: Any) -> None:
        """Print the result as one JSON document."""
        encoding = getattr(self.out, "encoding", None) or ""
        plain = not encoding.lower().startswith("utf")
        self.result(json.dumps(body, indent=2, ensure_ascii=plain))

    def asked(self, question: str) -> bool:
        """Ask on the terminal; say whether the answer is yes.

        Raises:
            UsageError: nobody is there to be asked.
            CancelledError: somebody pressed Ctrl-C.
        """
        if not sys.stdin.isatty():
            raise UsageError(
                "nobody is there to be asked", hint="--yes goes ahead without a question"
            )
        print(f"{question} [y/N] ", end="", file=self.err, flush=True)
        while not select.select([sys.stdin], [], [], _WAIT_S)[0]:
            self.cancel.check()
        answer = os.read(sys.stdin.fileno(), 1024).decode("utf-8", "replace")
        self.cancel.check()
        return answer.strip().lower() in {"y", "yes"}

    def interrupt(self) -> None:
        """Cancel: what runs comes to an orderly end."""
        # A signal handler must not take a lock that the interrupted thread may hold.
        threading.Thread(target=self.cancel.cancel, name="interrupt").start()

    def run(self, command: Callable[[], int]) -> int:
        """Run a command to its end, however often one presses Ctrl-C."""
        outcome: list[int | BaseException] = []

        def body() -> None:
            try:
                outcome.append(command())
            except BaseException as error:  # noqa: BLE001  (raised again by the main thread)
                outcome.append(error)

        limit_arenas()
        thread = threading.Thread(target=body, name="command")
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
        (result,) = outcome
        if isinstance(result, BaseException):
            if self.cancel.cancelled and not isinstance(result, CalveError):
                raise CancelledError from result
            raise result
        return result
