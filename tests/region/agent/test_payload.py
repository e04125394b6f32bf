"""The payload suffices: the agent, run from it by its own loader, pulls; and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
from pathlib import Path

import pytest

from calve.disk import payload

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the loader's path is x86_64's"
)

# As `-m calve.boot.main`, and then a list of all that was loaded.
WRAPPER = """
import sys
from calve.boot import main
try:
    code = main.main(sys.argv[1:])
finally:
    specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
    print("modules", *sorted({spec.name for spec in specs if str(getattr(spec, "origin", "")).startswith("/")}))
    print("maps", *sorted({line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line}))
    print("path", *sys.path)
raise SystemExit(code)
"""


@pytest.fixture(scope="module")
def built():
    return payload.build()


@pytest.fixture(scope="module")
def tree(built, tmp_path_factory):
    """Unpack the payload as the kernel would."""
    root = tmp_path_factory.mktemp("initrd")
    scratch = tmp_path_factory.mktemp("scratch")
    for entry in built.entries(scratch):
        place = root / entry.path
        if stat.S_ISDIR(entry.mode):
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        content = entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()
        place.write_bytes(content)
        place.chmod(stat.S_IMODE(entry.mode))
    return root


def run(tree, built, machine, *arguments):
    loader = next(tree / place for path, place in built.libraries if "ld-linux" in place)
    directories = {str((tree / place).parent) for _, place in built.libraries}
    return subprocess.run(
        [
            loader,
            "--library-path",
            ":".join(sorted(directories)),
            tree / "calve/bin/python3",
            *("-I", "-S", "-B"),
            *arguments,
            *machine.command(),
        ],
        env={
            "PATH": "/nonexistent",
            "LC_ALL": "C",
        },  # no locale's files, as there are none in an initrd
        cwd="/",
        capture_output=True,
        timeout=60,
    )


def test_a_real_pull_from_the_payload_alone(cloud, one, machine, built, tree):
    machine.wants(one)
    done = run(tree, built, machine, "-c", WRAPPER)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert done.stderr == b""
    machine.check_booted(one, generation=1)
    said = dict(
        line.split(" ", 1)
        for line in done.stdout.decode().splitlines()
        if line.startswith(("modules ", "maps ", "path "))
    )
    # Every file that was mapped, and every directory of modules, is the payload's.
    mapped = said["maps"].split()
    assert [path for path in mapped if not path.startswith((str(tree), "/dev/"))] == []
    assert all(path.startswith(str(tree)) for path in said["path"].split())
    libraries = {path for path in mapped if ".so" in path}
    carried = {str((tree / place).resolve()) for _, place in built.libraries}
    extensions = {path for path in libraries if path.endswith(".so")} - carried
    names = {module.origin.name for module in built.modules}
    assert {os.path.basename(path) for path in extensions} <= names
    loaded = set(said["modules"].split())
    assert loaded <= {module.name for module in built.modules}
    for name in ("calve.cache.s3", "backports.zstd", "nacl._sodium", "_ssl"):
        assert name in loaded


def test_it_starts_as_the_initrd_starts_it(cloud, one, machine, built, tree):
    machine.wants(one)
    done = run(tree, built, machine, "-m", "calve.boot.main")
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    machine.check_booted(one, generation=1)


def test_a_failure_s_traceback_needs_nothing_else(machine, built, tree):
    """The last line of defence is in the payload too: an error nobody thought of."""
    machine.user_data = b"{}"
    program = (
        "import sys\nfrom calve.boot import agent, main\n"
        "def bug(*_): raise LookupError('a bug')\n"
        "agent.UserData.parse = bug\nsys.exit(main.main(sys.argv[1:]))"
    )
    done = run(tree, built, machine, "-c", program)
    assert done.returncode == 1
    text = done.stdout.decode()
    assert "LookupError: a bug" in text
    assert '"code":"internal"' in text.splitlines()[-1]
    assert done.stderr == b""


def test_the_loader_is_where_the_interpreter_looks(built, tree):
    places = {place for _, place in built.libraries}
    assert "lib64/ld-linux-x86-64.so.2" in places
    assert Path(tree / "lib64/ld-linux-x86-64.so.2").stat().st_mode & 0o111
