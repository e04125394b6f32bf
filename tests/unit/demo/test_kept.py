"""What the demo keeps: one maker at a time, killed runs swept, damaged parts made again."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading

import pytest

from calve.demo import kept
from calve.demo.workshop import Workshop
from calve.errors import CancelledError
from calve.progress import silent
from calve.tasks import Cancel


@pytest.fixture
def turn(tmp_path):
    return kept.Turn(tmp_path, silent, Cancel())


def other(folder, notes=None, cancel=None):
    return kept.Turn(folder, (notes or []).append, cancel or Cancel())


def test_a_turn_is_of_one_and_its_holder_may_enter_again(turn, tmp_path):
    cancel, notes = Cancel(), []
    second = kept.Turn(tmp_path, notes.append, cancel)
    with turn, turn:
        threading.Timer(0.3, cancel.cancel).start()
        with pytest.raises(CancelledError), second:
            pass
    assert [note.text for note in notes] == [
        "waiting for another calve demo, which makes its parts"
    ]
    with other(tmp_path):
        pass


def test_a_killed_holder_blocks_nobody(tmp_path):
    code = (
        "import os,signal,sys;from pathlib import Path;from calve.demo.kept import Turn;"
        "from calve.tasks import Cancel;from calve.progress import silent\n"
        "Turn(Path(sys.argv[1]),silent,Cancel()).__enter__();os.kill(os.getpid(),signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    with other(tmp_path):
        pass


def test_a_run_sweeps_what_killed_ones_left_and_nothing_that_lives(turn, tmp_path):
    dead = tmp_path / "run-dead" / "machines"
    dead.mkdir(parents=True)
    (dead / "disk.raw").write_bytes(b"x")
    dead.chmod(0o500)
    with kept.run_folder(tmp_path, turn) as first:
        with kept.run_folder(tmp_path, other(tmp_path)) as second:
            assert sorted(tmp_path.glob("run-*")) == sorted([first, second])
        assert first.is_dir()
        assert not second.exists()
    assert list(tmp_path.glob("run-*")) == []


def test_a_run_folder_goes_with_an_error_too(turn, tmp_path):
    with pytest.raises(ValueError, match="x"), kept.run_folder(tmp_path, turn):
        raise ValueError("x")
    assert list(tmp_path.glob("run-*")) == []


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"X" + data[1:]])
def test_a_seal_tells_damage(change, tmp_path):
    file = tmp_path / "initrd.img"
    assert not kept.sealed(file)
    file.write_bytes(b"content")
    assert not kept.sealed(file)
    kept.seal(file)
    assert kept.sealed(file)
    file.write_bytes(change(b"content"))
    assert not kept.sealed(file)


# The workshop's parts


@pytest.mark.parametrize("text", [b"", b"garbage\n", b"calve-demo-1:AAAA\n", b"\xff\xfe"])
def test_a_damaged_key_is_made_anew(text, tmp_path):
    notes = []
    workshop = Workshop(tmp_path, progress=notes.append)
    first = workshop.key()
    assert workshop.key() == first
    assert notes == []
    (tmp_path / "key.sec").write_bytes(text)
    again = workshop.key()
    assert again.public != first.public
    assert Workshop(tmp_path).key() == again
    assert len(notes) == 1


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_key_is_for_its_owner_alone(umask, tmp_path):
    old = os.umask(umask)
    try:
        Workshop(tmp_path).key()
    finally:
        os.umask(old)
    path = tmp_path / "key.sec"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    Workshop(tmp_path).key()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_truncated_disk_is_made_again(tmp_path):
    workshop = Workshop(tmp_path)
    disk = workshop.disk(8 << 20)
    content = disk.read_bytes()
    os.truncate(disk, 4096)
    assert workshop.disk(8 << 20) == disk
    assert disk.read_bytes() == content


def test_a_disk_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    def make(path, *_args, **_more):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calve.disk.ext4.make", make)
    with pytest.raises(OSError, match="space"):
        Workshop(tmp_path).disk(8 << 20)
    assert list((tmp_path / "images").iterdir()) == []


def test_a_run_sweeps_half_made_parts_and_keeps_whole_ones(tmp_path):
    half = [
        "packages/.fetch-x/a.deb",
        "kernel/.linux-x/tree/vmlinuz",
        "images/.tree-x/nix",
        "images/.initrd-x.img.new",
        "images/root-8m.new",
        "store/.calve-demo-x/tree",
    ]
    whole = ["packages/a.deb", "kernel/linux-x/vmlinuz", "images/root-8m.raw", "store/nix/x"]
    for name in [*half, *whole]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with Workshop(tmp_path).run() as folder:
        assert folder.parent == tmp_path
        assert not any((tmp_path / name).exists() for name in half)
        assert all((tmp_path / name).exists() for name in whole)


def test_two_workshops_do_not_make_at_the_same_time(tmp_path, monkeypatch):
    inside, most = [], []

    def make(path, size_bytes, **_more):
        inside.append(path)
        most.append(len(inside))
        threading.Event().wait(0.2)
        assert not path.exists()
        path.write_bytes(bytes(size_bytes))
        inside.remove(path)

    monkeypatch.setattr("calve.disk.ext4.make", make)
    threads = [threading.Thread(target=Workshop(tmp_path).disk, args=(4096,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]  # the second finds what the first made


def test_a_turn_lets_go_of_its_file(turn, tmp_path):
    with turn:
        pass
    with (tmp_path / "lock").open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
