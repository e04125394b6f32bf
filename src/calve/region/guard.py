"""What ends a child where we cannot: after a `kill -9` of ours, machines must not stay on.

A shell waits on a pipe whose other end only we have open; when that closes without a word, because we are gone, it
kills the child's session. (Linux could tell the child itself, but of the end of the thread that started it.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from calve.process import Process

if TYPE_CHECKING:
    import contextlib

__all__ = ["keep"]


def keep(child: Process, owner: contextlib.ExitStack) -> None:
    """Let a child end with its owner, and should we be killed.

    Args:
        child: runs in a session of its own, as every `Process` does.
        owner: gets what stops it.
    """
    owner.callback(child.stop)
    read, write = os.pipe()
    owner.callback(os.close, write)
    try:
        # By its path: a shell's own `<&` knows descriptors of one digit alone.
        script = f"read -r _ </dev/fd/{read}; kill -s KILL -- -{child.pid}"
        guard = Process(["/bin/sh", "-c", script], pass_fds=[read])
    finally:
        os.close(read)
    owner.callback(guard.stop)
    owner.callback(child.stop)  # before the guard goes
