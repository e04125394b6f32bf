"""A root shell on the serial console: where image and kernel command line both allow it, and nowhere else."""

from __future__ import annotations

import re
import time

import pytest


def typed(boot, what, over, within_s=200):
    """Type a command until it is answered or `over` holds; return the answers."""
    pattern = re.compile(rf"(?:^|\r)42-{what}-(\S+)\s*$", re.MULTILINE)
    end_s = time.monotonic() + within_s
    while not pattern.search(boot.console) and not over():
        assert time.monotonic() < end_s, boot.console[-3000:]
        # What is typed is echoed: the sum tells an answer from that.
        line = f"echo $((6*7))-{what}-$(readlink /proc/$$/exe)\n"
        boot.rig.world.machines.type(boot.name, line.encode())
        time.sleep(1)
    return pattern.findall(boot.console)


def has_started(boot):
    return lambda: "healthy" in [event.kind for event in boot.events]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_shell_where_image_and_command_line_allow_it(rig):
    options = {"debug": True, "command_line": "calve.debug=1", "disk": rig.seeded_disk()}
    with rig.boot(rig.user_data(rig.release("webserver", 1)), **options) as boot:
        assert set(typed(boot, "initrd", has_started(boot))) == {"/bin/busybox"}
        boot.told("healthy")
        assert boot.console.index("\n42-initrd-") < boot.console.index('"n":"switch-root"')
        # The initrd's own has gone with it: two would share what is typed.
        for number in range(5):
            answers = typed(boot, f"stage-2-{number}", lambda: False)
            assert {answer.rpartition("/")[2] for answer in answers} == {"bash"}
        assert boot.get()[0] == 200


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("image", "line"), [(True, "0"), (False, "1")])
def test_no_shell_where_one_of_them_does_not(rig, image, line):
    options = {"debug": image, "command_line": f"calve.debug={line}", "disk": rig.seeded_disk()}
    with rig.boot(rig.user_data(rig.release("webserver", 1)), **options) as boot:
        assert typed(boot, "initrd", has_started(boot)) == []
        stop_s = time.monotonic() + 10
        assert typed(boot, "stage-2", lambda: time.monotonic() > stop_s) == []
        assert boot.get()[0] == 200
