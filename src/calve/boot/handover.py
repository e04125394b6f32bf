"""What a boot leaves to its stage 2, in `/run/calve`: it survives switch root, and nothing else does.

`user-data` (the document as it came), `agent.json` (the policy, with the machine's root at /), `ca.pem` (the image's
authorities, where it has some), `boot.log` (the evidence so far), and `debug`, empty, where image and kernel command
line allow a login on the console. Private to root.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from calve.boot.policy import Policy

__all__ = ["AGENT", "BOOT_LOG", "CA", "DEBUG", "USER_DATA", "write"]

USER_DATA: Final = "user-data"
AGENT: Final = "agent.json"
BOOT_LOG: Final = "boot.log"
CA: Final = "ca.pem"
DEBUG: Final = "debug"


def write(policy: Policy, user_data: bytes, transcript: str) -> None:
    """Write all of it.

    Args:
        policy: the image's, with what the kernel command line set.
        user_data: as it came; empty where it did not.
        transcript: the evidence so far.

    Raises:
        OSError: the directory cannot be written.
    """
    run = policy.run
    run.mkdir(parents=True, exist_ok=True)
    theirs = replace(policy, root=Path("/"))
    if policy.ca_file is not None:
        shutil.copyfile(policy.ca_file, run / CA)
        theirs = replace(theirs, ca_file=str(run / CA))
    _write(run / AGENT, theirs.dump())
    _write(run / USER_DATA, user_data)
    _write(run / BOOT_LOG, transcript.encode("utf-8", "replace"))
    if policy.debug:
        _write(run / DEBUG, b"")


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)
