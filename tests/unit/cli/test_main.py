"""The command line's frame: help, exit codes, errors printed once, Ctrl-C."""

import json
import os
import subprocess
import sys

import pytest


def calve(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "calve", *args], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_help_lists_every_command():
    done = calve("--help")
    assert done.returncode == 0
    for name in ("demo", "push", "pull", "keys", "image", "version"):
        assert name in done.stdout


def test_version_as_text_and_json():
    assert calve("version").stdout.startswith("calve 0.")
    assert json.loads(calve("version", "--json").stdout)["formats"]["user-data"] == 1


@pytest.mark.parametrize("args", [[], ["nonsense"], ["version", "--nonsense"]])
def test_wrong_usage_is_exit_2_and_says_nothing_on_stdout(args):
    done = calve(*args)
    assert done.returncode == 2
    assert not done.stdout
    assert "usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    child = subprocess.Popen(
        [sys.executable, "-m", "calve", "version"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    _, err = child.communicate(timeout=60)
    assert b"Traceback" not in err
    assert child.returncode in {0, 1, 120}
