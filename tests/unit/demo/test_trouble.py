"""Trouble is told early, with what to do about it."""

from __future__ import annotations

import pytest

from calve.demo import trouble
from calve.errors import CalveError, DamagedError, NotFoundError


class Machines:
    """Machines with consoles, of which some ended."""

    def __init__(self, consoles, ended=None):
        self._consoles, self._ended = consoles, ended or {}

    def instances(self):
        return list(self._consoles)

    def ended(self):
        return self._ended

    def console(self, name):
        return self._consoles[name]


def test_all_missing_programs_are_told_at_once(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, **_: None if name[0] in "qmd" else name)
    with pytest.raises(NotFoundError) as told:
        trouble.check_programs()
    assert told.value.exit_code == 5
    lacking = "mke2fs, debugfs, qemu-system-x86_64, mcopy, mkfs.vfat"
    assert told.value.message == f"not installed: {lacking}"
    assert told.value.hint == "apt-get install e2fsprogs qemu-system-x86 mtools dosfstools"


@pytest.mark.parametrize(
    ("code", "words"), [(-9, "was killed by signal 9"), (0, "ended with 0"), (1, "ended with 1")]
)
def test_a_machine_that_is_gone_ends_the_show(code, words):
    with pytest.raises(CalveError, match=f"i-2: QEMU {words}.*: last \ufffd\\[31mwords$"):
        trouble.check_machines(
            Machines({"i-1": b"", "i-2": b"one\r\nlast \x1b[31mwords\r\n"}, {"i-2": code})
        )


def test_a_machines_own_words_go_before_its_end():
    line = b'@@calve {"v":1,"t":1.5,"e":"fail","code":"disk-fault","message":"no"}\n'
    with pytest.raises(CalveError, match="i-1: disk-fault: no"):
        trouble.check_machines(Machines({"i-1": line}, {"i-1": 0}))


def test_machines_that_run_are_no_trouble():
    trouble.check_machines(Machines({"i-1": b"booting"}))
    assert trouble.consoles(Machines({"i-1": b"a\nb\n\n", "i-2": b""})) == "i-1: b; i-2: nothing"
    assert trouble.consoles(Machines({})) == "no machine runs"


def test_damaged_parts_can_be_thrown_away(tmp_path):
    with pytest.raises(DamagedError) as told, trouble.throwaway(tmp_path):
        raise DamagedError("x", hint="nix-store --repair-path")
    assert f"rm -r {tmp_path}," in told.value.hint
