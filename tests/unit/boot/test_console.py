"""Lines on the console, and the two figures of memory."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

from calve.boot import memory
from calve.boot.console import Console, uptime_s
from calve.contract import evidence


class Writes(io.StringIO):
    def __init__(self):
        super().__init__()
        self.pieces = []
        self.flushes = 0

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)

    def flush(self):
        self.flushes += 1


def test_a_line_is_one_write_and_goes_out_at_once():
    out = Writes()
    console = Console(out, uptime=lambda: 12.345)
    console.phase("pull")
    console.emit("fail", code="internal", message="a\nb")
    assert out.pieces == [
        '@@calve {"v":1,"t":12.35,"e":"phase","n":"pull"}\n',
        '@@calve {"v":1,"t":12.35,"e":"fail","code":"internal","message":"a\\nb"}\n',
    ]
    assert out.flushes == 2
    console.write("text")
    assert (out.pieces[-1], out.flushes) == ("text", 3)


def test_threads_do_not_mix_their_lines():
    out = io.StringIO()
    console = Console(out)
    threads = [
        threading.Thread(target=lambda n=n: [console.emit("x", n=n, i=i) for i in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(evidence.read(out.getvalue()))) == 800


def test_uptime():
    first = uptime_s()
    assert 0 < first <= uptime_s()


def test_memory_s_figures():
    text = Path("/proc/meminfo").read_text()
    total = int(text.split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < memory.available_bytes() <= total
    assert 1 << 20 < memory.peak_bytes() <= total


def test_arenas_are_limited_in_a_process_of_its_own():
    """Eight threads that allocate: with the limit they share one arena, else each gets 64 MB of address space."""
    program = (
        "import sys, threading, ctypes\nfrom pathlib import Path\nfrom calve import tasks\n"
        "if sys.argv[1] == 'limit': tasks.limit_arenas()\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "barrier = threading.Barrier(8)\n"
        "def work():\n    libc.malloc(1000); barrier.wait()\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "lines = Path('/proc/self/maps').read_text().splitlines()\n"
        "sizes = [int(b, 16) - int(a, 16) for a, b in (l.split()[0].split('-') for l in lines)]\n"
        "arenas = sum(n % (64 << 20) == 0 or 60 << 20 < n < 68 << 20 for n in sizes)\n"
        "print(arenas)\n"
    )
    counts = [
        int(subprocess.check_output([sys.executable, "-c", program, mode], env=_env()))
        for mode in ("limit", "free")
    ]
    assert counts[0] < counts[1]


def _env():
    return {"PYTHONPATH": str(Path(memory.__file__).parents[2])}
