"""The payload: all that the agent reaches, and nothing that the design forbids."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from calve.contract import evidence
from calve.disk import payload
from calve.errors import CalveError, DamagedError

FORBIDDEN = {
    "argparse", "asyncio", "boto3", "botocore", "cffi", "logging", "msgspec", "multiprocessing",
    "rich", "sqlite3", "subprocess", "tempfile", "unittest", "xml", "xml.etree",
    "calve.process", "calve.cli", "calve.cache.push", "calve.nix.database", "calve.nix.store",
    "calve.region", "calve.disk", "site",
}  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return payload.build()


def test_what_it_has(built):
    names = {module.name for module in built.modules}
    assert {
        "calve.boot.main",
        "calve.boot.agent",
        "calve.cache.s3",
        "calve.cache.web",
        "calve.cache.directory",
        "calve.transport.imds",
        "encodings.utf_8",
        "encodings.idna",
        "nacl._sodium",
        "os",
        "runpy",
        "traceback",
    } <= names
    assert any(name.startswith(("backports.zstd", "compression.zstd")) for name in names)
    assert built.version == "%d.%d" % sys.version_info[:2]


def test_what_it_must_not_have(built):
    names = {module.name for module in built.modules}
    assert names & FORBIDDEN == set()
    assert not {name for name in names if name.split(".")[0] in {"pip", "pytest", "hypothesis"}}


def test_it_stays_small(built):
    """It is read by every machine at every boot: more than these is a change to be made on purpose."""
    assert len(built.modules) < 220
    files = [module.origin for module in built.modules] + [path for path, _ in built.libraries]
    assert sum(path.stat().st_size for path in set(files)) < 30e6


def test_every_file_exists_and_has_one_place(built):
    assert all(module.origin.is_file() for module in built.modules)
    assert all(path.is_file() and not path.is_symlink() for path, _ in built.libraries)
    places = [place for _, place in built.libraries]
    assert len(places) == len(set(places))
    names = {place.rpartition("/")[2] for place in places}
    assert {"libc.so.6", "libssl.so.3", "libcrypto.so.3", "libgcc_s.so.1"} <= names


def test_its_entries_are_a_python_home(built, tmp_path):
    entries = {entry.path: entry for entry in built.entries(tmp_path)}
    base = f"calve/lib/python{built.version}"
    for name in ("os.pyc", "calve/boot/main.pyc", "calve/__init__.pyc", "encodings/__init__.pyc"):
        assert f"{base}/{name}" in entries
    assert not [path for path in entries if path.endswith(".py")]
    assert stat.S_ISDIR(entries[f"{base}/lib-dynload"].mode)
    assert entries["calve/bin/python3"].mode & 0o111
    assert all(entry.mode & 0o111 for path, entry in entries.items() if ".so" in Path(path).name)


def test_compiled_modules_name_no_path_of_the_build(built, tmp_path):
    for entry in built.entries(tmp_path):
        if entry.path.endswith(".pyc"):
            data = entry.content.read_bytes()
            # Unchecked, by hash: no source is looked for, no time is compared.
            assert data[4:8] == b"\x01\0\0\0"
            assert str(tmp_path).encode() not in data
            assert str(Path(payload.__file__).parents[2]).encode() not in data


def test_two_builds_are_equal(built, tmp_path):
    again = payload.build()
    assert again == built
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        contents.append(
            {
                entry.path: entry.content.read_bytes()
                for entry in built.entries(tmp_path / name)
                if isinstance(entry.content, Path)
            }
        )
    assert contents[0] == contents[1]


def test_an_interpreter_that_says_nothing(tmp_path):
    place = tmp_path / "python"
    place.write_text("#!/bin/sh\necho hello\n")
    place.chmod(0o755)
    with pytest.raises(DamagedError) as caught:
        payload.build(python=place)
    assert caught.value.place == str(place)


def test_an_agent_that_cannot_be_imported(tmp_path):
    with pytest.raises(CalveError, match="ModuleNotFoundError"):
        payload.build(search=[str(tmp_path)])


def test_stage_2_adds_little_to_a_closure(tmp_path):
    payload.build(payload.HEALTH).write(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 5_000_000 < size <= 15_000_000
    done = subprocess.run(
        [
            tmp_path / "calve/bin/python3",
            "-I",
            "-S",
            "-B",
            "-m",
            "calve.health.main",
            tmp_path,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        env={},
        cwd="/",
    )
    event = evidence.Evidence.parse(done.stdout.strip())
    assert (done.returncode, event.kind, event.fields["code"]) == (1, "fail", "internal")
