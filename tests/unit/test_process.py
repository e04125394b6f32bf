"""Processes: errors with their last lines, cancellation, and an end that leaves nothing."""

import os
import signal
import sys
import threading

import pytest

from calve.errors import CalveError, CancelledError, NotFoundError
from calve.process import Process, run, which
from calve.tasks import Cancel


def test_a_failure_names_the_program_and_its_last_words():
    with pytest.raises(CalveError, match=r"sh failed with 3: .*why"):
        run(["sh", "-c", "echo why >&2; exit 3"])


def test_input_reaches_it_and_output_comes_back():
    assert run(["cat"], stdin=b"x" * 100_000).stdout == b"x" * 100_000


def test_a_process_reads_what_it_is_told():
    read, write = os.pipe()
    try:
        with Process(["cat"], stdin=read, stdout="pipe") as child:
            os.write(write, b"one\n")
            assert child.stdout.readline() == b"one\n"
    finally:
        os.close(read)
        os.close(write)


def test_a_missing_program_names_its_package():
    with pytest.raises(NotFoundError) as caught:
        which("no-such-program", package="some-package")
    assert caught.value.hint == "apt-get install some-package"


def test_cancelling_kills_it():
    cancel = Cancel()
    threading.Timer(0.2, cancel.cancel).start()
    with pytest.raises(CancelledError):
        run(["sleep", "60"], cancel=cancel)


def test_a_process_that_ignores_term_is_killed_with_its_children():
    code = "import signal,subprocess,time;signal.signal(15,1);p=subprocess.Popen(['sleep','61']);print(p.pid,flush=True);time.sleep(60)"
    with Process([sys.executable, "-c", code], stdout="pipe") as child:
        grandchild = int(child.stdout.readline())
        child.stop(grace_s=0.1)
        assert child.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        for _ in range(200):
            os.kill(grandchild, 0)
            threading.Event().wait(0.01)
