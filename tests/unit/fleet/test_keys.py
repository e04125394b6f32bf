"""Signing keys: from files, variables and commands; who else may read them; and that they are never shown."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from calve.errors import AccessError, CalveError, CancelledError, NotFoundError, UsageError
from calve.fleet import keys
from calve.fleet.config import Command, Environment, File
from calve.nix.signing import SecretKey
from calve.tasks import Cancel

KEY = SecretKey.generate("acme-1")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "key.sec"
    path.write_text(f"{KEY.dump()}\n")
    path.chmod(0o600)
    return path


def command(directory, script):
    return Command(("sh", "-c", script), directory)


def test_from_a_file_a_variable_and_a_command(file, tmp_path):
    assert keys.read(File(file)) == KEY
    assert keys.read(Environment("K"), environ={"K": KEY.dump()}) == KEY
    assert keys.read(command(tmp_path, "cat key.sec")) == KEY


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620, 0o602])
def test_a_file_that_others_may_use_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(UsageError, match=f"its mode is {mode:04o}") as caught:
        keys.read_file(file)
    assert caught.value.hint == f"chmod 600 {file}"


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_one_that_only_its_owner_may_use_is_taken(file, mode):
    file.chmod(mode)
    assert keys.read_file(file) == KEY


def test_a_pipe_will_do(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    writer = threading.Thread(target=pipe.write_text, args=(KEY.dump(),))
    writer.start()
    try:
        assert keys.read_file(pipe) == KEY
    finally:
        writer.join()


def test_files_that_are_no_keys(file, tmp_path):
    with pytest.raises(NotFoundError, match="no such key file"):
        keys.read_file(tmp_path / "none")
    with pytest.raises(CalveError, match="Is a directory"):
        keys.read_file(tmp_path)
    for data in (
        b"",
        b"\xff\xfe",
        KEY.public.dump().encode(),
        b"x" * 5000,
        KEY.dump().encode()[:-8],
    ):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=f"^{file}: not a secret key") as caught:
            keys.read_file(file)
        assert data.decode("latin-1")[-20:] not in str(caught.value) or not data


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(file):
    file.chmod(0o000)
    with pytest.raises(AccessError):
        keys.read_file(file)


def test_variables_that_hold_no_key():
    with pytest.raises(UsageError, match=r"environment variable K: .* not set"):
        keys.read(Environment("K"), environ={})
    with pytest.raises(UsageError, match="environment variable K: not a secret key"):
        keys.read(Environment("K"), environ={"K": "abc"})


def test_a_command_that_fails_shows_its_last_words_and_never_its_output(tmp_path):
    secret = KEY.dump()
    with pytest.raises(CalveError, match=r"sh: failed with 3: no entry$") as caught:
        keys.read(command(tmp_path, f"echo {secret}; echo first >&2; echo no entry >&2; exit 3"))
    with pytest.raises(CalveError, match="no reason given") as silent:
        keys.read(command(tmp_path, f"echo {secret}; exit 1"))
    with pytest.raises(UsageError, match="output of sh: not a secret key") as double:
        keys.read(command(tmp_path, f"echo {secret}; echo {secret}"))
    for one in (caught, silent, double):
        assert secret[7:40] not in repr(one.value) + str(one.value)


def test_a_command_that_is_not_there_or_is_cancelled(tmp_path):
    with pytest.raises(NotFoundError, match="nonsense-xyz: cannot run nonsense-xyz"):
        keys.read(Command(("nonsense-xyz",), tmp_path))
    cancel = Cancel()
    timer = threading.Timer(0.2, cancel.cancel)
    timer.start()
    with pytest.raises(CancelledError):
        keys.read(command(tmp_path, "exec sleep 600"), cancel=cancel)
    timer.join()


def test_a_new_file_is_its_owner_s_alone_and_no_file_is_overwritten(tmp_path):
    path = tmp_path / "new.sec"
    keys.check_new(path)
    before = os.umask(0)
    try:
        keys.write_file(KEY, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.read_file(path) == KEY
    for act in (keys.check_new, lambda path: keys.write_file(SecretKey.generate("x"), path)):
        with pytest.raises(UsageError, match="not overwritten"):
            act(path)
    assert keys.read_file(path) == KEY
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="not overwritten"):
        keys.write_file(KEY, link)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(CalveError, match="cannot be written"):
        keys.write_file(KEY, Path("/proc/none/key"))


def test_a_name_beyond_ascii(tmp_path):
    key = SecretKey.generate("schlüssel-1")
    keys.write_file(key, tmp_path / "k.sec")
    assert keys.read_file(tmp_path / "k.sec") == key


# Public keys


def test_a_public_key_as_people_give_it(file, tmp_path):
    text = KEY.public.dump()
    place = tmp_path / "key.pub"
    place.write_text(f"{text}\n")
    place.chmod(0o644)
    for given in (text, str(place), str(file)):
        assert keys.public(given) == KEY.public
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others may use this signing key"):
        keys.public(str(file))


def test_a_public_key_through_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    writer = threading.Thread(target=pipe.write_text, args=(KEY.dump(),))
    writer.start()
    try:
        assert keys.public(str(pipe)) == KEY.public
    finally:
        writer.join()


def test_what_is_no_public_key_is_not_shown(tmp_path):
    secret = KEY.dump()
    for text in (secret, secret[:-4], f"{secret}\0", "a:b", str(tmp_path)):
        with pytest.raises(UsageError, match="not a public key") as caught:
            keys.public(text)
        chain = f"{caught.value!r}{caught.value}{caught.value.__cause__!r}"
        assert secret[7:40] not in chain
    with pytest.raises(NotFoundError) as missing:
        keys.public(str(tmp_path / "none"))
    assert missing.value.place is None
