"""Boots out of console logs: two real ones, and all that a console does to evidence."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from calve.contract.evidence import Evidence
from calve.contract.timeline import Outcome, boots

DATA = Path(__file__).parent / "data"
BANNER = b"[    0.000000] Linux version 6.1.0-56-cloud-amd64 (gcc)\r\n"


def phase(at_s, name):
    return Evidence("phase", at_s, {"n": name}).dump().encode() + b"\r\n"


def line(at_s, kind, **fields):
    return Evidence(kind, at_s, fields).dump().encode() + b"\r\n"


def start(at_s=2.0):
    return phase(at_s, "network") + phase(at_s + 1, "agent") + phase(at_s + 2, "imds")


def read(*parts):
    return list(boots(parts))


def shown(boot):
    """Return phases as (name, begin, end), `?` after an open one's name and `…` after a gap's."""
    return [
        (one.name + "?" * one.is_open + "…" * one.is_gap, one.begin_s, one.end_s)
        for one in boot.phases
    ]


# Real consoles


def test_a_real_boot():
    (boot,) = read((DATA / "webserver.log").read_bytes())
    assert boot.outcome is Outcome.READY
    assert shown(boot) == [
        ("kernel", 0.0, 3.81),
        ("network", 3.81, 4.82),
        ("agent", 4.82, 7.76),
        ("imds", 7.76, 8.03),
        ("manifest", 8.03, 8.45),
        ("pull", 8.45, 30.67),
        ("commit", 30.67, 30.81),
        ("switch-root?", 30.81, 30.81),
    ]
    assert sum(map(boot.share, boot.phases)) == pytest.approx(1)
    figures = boot.figures
    assert (figures.agent, figures.release, figures.generation, figures.paths) == (
        "0.1.0",
        1,
        1,
        146,
    )
    assert figures.system.endswith("-nixos-system-webserver-1")
    assert (figures.nar_bytes, figures.total_bytes) == (116063512, 116063512)
    assert boot.fetched_bytes_per_s == pytest.approx(50596432 / 22.22)
    assert (figures.agent_peak_mb, figures.lowest_available_mb) == (34.0, 403.9)
    assert (boot.failure, boot.damaged_lines) == (None, 0)


def test_a_real_boot_whose_agent_crashed():
    (boot,) = read((DATA / "crash.log").read_bytes())
    assert boot.outcome is Outcome.UNFINISHED
    assert shown(boot)[-1] == ("agent?", 3.0, 3.0)
    assert boot.last_lines[1].startswith("ImportError: cannot import name 'memory'")
    assert boot.last_lines[2].endswith("reboot: Power down")


def test_two_real_boots_in_one_log_cut_anywhere():
    log = (DATA / "webserver.log").read_bytes() + (DATA / "crash.log").read_bytes()
    whole = read(log)
    assert [boot.outcome for boot in whole] == [Outcome.READY, Outcome.UNFINISHED]
    for size in (1, 7, 511, 4096):
        assert read(*(log[at : at + size] for at in range(0, len(log), size))) == whole
    for at in range(0, len(log) - 600, 97):  # what is left of a console is its end
        assert read(log[at:])[-1].phases[-1].name == "agent"


# Ends


def test_a_failure_closes_its_phase():
    log = start() + line(9.5, "fail", code="key-unknown", phase="imds", message="the key")
    (boot,) = read(log)
    assert boot.outcome is Outcome.FAILED
    assert shown(boot)[-1] == ("imds", 4.0, 9.5)
    assert (boot.failure.code, boot.failure.phase, boot.failure.message) == (
        "key-unknown",
        "imds",
        "the key",
    )


def test_a_failure_may_lack_everything():
    (boot,) = read(line(3.0, "fail"))
    assert (boot.failure.code, boot.failure.phase, boot.failure.message) == ("", "", "")
    assert shown(boot) == [("kernel to ?…", 0.0, 3.0)]


def ready():
    return start() + phase(5.0, "commit") + line(5.5, "ready") + phase(5.5, "switch-root")


def test_stage_2_says_how_it_ended():
    log = ready() + phase(6.0, "answer") + phase(9.0, "health")
    (boot,) = read(log + line(9.5, "healthy", system="x", as_wanted=True))
    assert boot.outcome is Outcome.HEALTHY
    assert shown(boot)[-2:] == [("answer", 6.0, 9.0), ("health", 9.0, 9.5)]
    (boot,) = read(log + line(9.5, "fail", code="unhealthy", phase="health", message="404"))
    assert boot.outcome is Outcome.FAILED
    assert boot.failure.code == "unhealthy"
    (boot,) = read(log)
    assert boot.outcome is Outcome.READY
    assert boot.phases[-1].is_open


def test_why_another_system_goes_on():
    log = start() + line(5.0, "degraded", system="x", code="deadline", message="late")
    (boot,) = read(log + phase(5.1, "commit") + line(5.5, "ready"))
    assert (boot.outcome, boot.failure) == (Outcome.READY, None)
    assert (boot.degraded.code, boot.degraded.message) == ("deadline", "late")


def test_progress_is_the_figure_of_a_boot_that_is_not_ready():
    more = {"unit": "bytes", "total": 900}
    log = (
        start()
        + phase(5.0, "manifest")
        + phase(6.0, "pull")
        + line(7.0, "progress", n="pull", done=100, available_mb=310.0, **more)
        + line(9.0, "progress", n="pull", done=300, available_mb=350.5, **more)
    )
    (boot,) = read(log)
    assert shown(boot)[-1] == ("pull?", 6.0, 9.0)
    assert (boot.figures.nar_bytes, boot.figures.total_bytes) == (300, 900)
    assert boot.figures.lowest_available_mb == 310.0
    assert boot.fetched_bytes_per_s is None


def test_phases_that_are_left_out_are_no_gap():
    log = start() + phase(5.0, "commit") + line(5.5, "ready") + phase(5.5, "switch-root")
    (boot,) = read(log + phase(6.0, "answer"))
    assert [one.name for one in boot.phases][-4:] == ["imds", "commit", "switch-root", "answer"]
    assert not any(one.is_gap for one in boot.phases)
    assert boot.outcome is Outcome.READY


def test_phases_of_a_later_version_are_taken_as_they_come():
    (boot,) = read(start() + phase(5.0, "kexec") + phase(6.0, "imds"))
    assert [one.name for one in boot.phases][-3:] == ["imds", "kexec", "imds"]
    assert not any(one.is_gap for one in boot.phases)


# Gaps


@pytest.mark.parametrize(
    ("log", "phases"),
    [
        (phase(5.0, "pull"), [("kernel to manifest…", 0.0, 5.0), ("pull?", 5.0, 5.0)]),
        (phase(5.0, "agent"), [("kernel to network…", 0.0, 5.0), ("agent?", 5.0, 5.0)]),
        (phase(5.0, "new"), [("kernel to ?…", 0.0, 5.0), ("new?", 5.0, 5.0)]),
        (
            phase(2.0, "network") + phase(5.0, "imds"),
            [("kernel", 0.0, 2.0), ("network to agent…", 2.0, 5.0), ("imds?", 5.0, 5.0)],
        ),
        (
            phase(2.0, "network") + line(5.0, "start", agent="1"),
            [("kernel", 0.0, 2.0), ("network to agent…", 2.0, 5.0), ("agent?", 5.0, 5.0)],
        ),
        (
            start(0.0) + line(5.0, "progress", n="pull") + line(6.0, "progress", n="pull"),
            [
                ("kernel", 0.0, 0.0),
                ("network", 0.0, 1.0),
                ("agent", 1.0, 2.0),
                ("imds to pull…", 2.0, 5.0),
                ("pull?", 5.0, 6.0),
            ],
        ),
        (
            phase(5.0, "pull") + line(6.0, "progress", n="pull") + line(9.0, "ready"),
            [
                ("kernel to manifest…", 0.0, 5.0),
                ("pull", 5.0, 6.0),
                ("pull to commit…", 6.0, 9.0),
                ("commit?", 9.0, 9.0),
            ],
        ),
        (
            phase(5.0, "imds") + line(6.0, "fail", phase="pull"),
            [("kernel to agent…", 0.0, 5.0), ("imds to pull…", 5.0, 6.0), ("pull", 6.0, 6.0)],
        ),
        (
            phase(2.0, "network") + phase(2.0, "imds"),  # nothing is lost of no time
            [("kernel", 0.0, 2.0), ("imds?", 2.0, 2.0)],
        ),
        (line(5.0, "progress", n="pull"), [("kernel to manifest…", 0.0, 5.0), ("pull?", 5.0, 5.0)]),
    ],
)
def test_time_of_which_nothing_is_known_is_a_gap(log, phases):
    (boot,) = read(log)
    assert shown(boot) == phases
    assert all(a.end_s == b.begin_s for a, b in zip(boot.phases, boot.phases[1:], strict=False))


# Several boots


def test_a_clock_that_goes_back_is_another_boot():
    log = start(7.0) + start(2.0).replace(b"network", b"agent")
    assert [boot.number for boot in read(log)] == [1, 2]


def test_threads_may_write_a_little_late():
    log = start() + line(9.0, "progress", n="imds") + line(8.9, "progress", n="imds")
    (boot,) = read(log)
    assert boot.end_s == 9.0


def test_the_network_again_is_another_boot_though_the_clock_went_on():
    fail = line(5.0, "fail", code="imds-denied", phase="imds")
    found = read(start(2.0) + fail + start(6.0) + fail)
    assert [boot.outcome for boot in found] == [Outcome.FAILED, Outcome.UNFINISHED, Outcome.FAILED]
    assert [boot.number for boot in read(start(2.0) + fail + line(6.0, "start"))] == [1, 2]


def test_kernels_that_say_nothing_are_boots_too():
    log = (
        BANNER
        + b"Kernel panic - not syncing\r\n\r\n"
        + BANNER
        + start()
        + BANNER.replace(b"] ", b"][    T0] ")
    )
    found = read(b"SeaBIOS\r\n" + log)
    assert [boot.outcome for boot in found] == [Outcome.SILENT, Outcome.UNFINISHED, Outcome.SILENT]
    assert [boot.last_lines for boot in found] == [("Kernel panic - not syncing",), (), ()]


def test_no_evidence_is_no_boot():
    assert read(b"") == []
    assert read(b"login: \r\n@@calve is a word\r\nLinux version 6\r\n@@calve ") == []


# What consoles do to lines


@pytest.mark.parametrize(
    "line",
    [
        b'[    3.1] init: @@calve {"v":1,"t":3,"e":"phase","n":"agent"}[    3.2] random: crng init done',
        b'\x1b[0;32m@@calve {"v":1,"t":3,"e":"phase","n":"agent"}\x1b[0m\x1b[K',
        b'@@calve {"v":1,\x1b[7m"t":3,"e":"phase","n":"agent"}',
        b'@@calve \x1b[1m{"v":1,"t":3,"e":"phase","n":"agent"}',
        b'@@calve {"v":1,\0"t":3,"e":"phase","n":"agent"}',
        b'\xff\xfe@@calve {"v":1,"t":3,"e":"phase","n":"agent","x":"\xff\xc3"}\xff',
        b"y" * (3 << 20) + b'@@calve {"v":1,"t":3,"e":"phase","n":"agent"}' + b"z" * (1 << 20),
        b'@@calve {"v":1,"t":3,"e":"phase","n":"agent","x":"@@calve {\\"v\\":1}"}',
    ],
)
def test_evidence_is_found_in_a_line(line):
    (boot,) = read(phase(2.0, "network"), line, b"\n", phase(4.0, "imds"))
    assert [one.name for one in boot.phases] == ["kernel", "network", "agent", "imds"]
    assert boot.damaged_lines == 0


@pytest.mark.parametrize(
    "line",
    [
        b'@@calve {"v":1,"t":3,"e":"ph[    3.2] random: crng init done',
        b'@@calve {"v":1,"t":3,"e":"ph',
        b'@@calve {"v":1,"t":NaN,"e":"phase","n":"agent"}',
        b'@@calve {"v":1,"t":1e999,"e":"phase","n":"agent"}',
        b'@@calve {"v":1,"t":1' + b"0" * 400 + b',"e":"phase","n":"agent"}',
        b'@@calve {"v":1,"t":-3,"e":"phase","n":"agent"}',
        b'@@calve {"v":1,"t":true,"e":"phase","n":"agent"}',
        b'@@calve {"v":1,"t":3,"e":null}',
        b'@@calve {"v":1,"t":3,"e":"x","y":"' + b"y" * 600 + b'"}',
        b"@@calve " + b'{"x":' * 80 + b"}" * 80,
    ],
)
def test_evidence_that_cannot_be_read_is_counted(line):
    (boot,) = read(phase(2.0, "network"), line, b"\n", phase(3.0, "agent"), phase(4.0, "imds"))
    assert [one.name for one in boot.phases] == ["kernel", "network", "agent", "imds"]
    assert boot.damaged_lines == 1


def test_two_writers_on_one_line():
    cut = b'@@calve {"v":1,"t":3,"e":"pha'
    (boot,) = read(phase(2.0, "network") + cut + phase(3.0, "agent"))
    assert ([one.name for one in boot.phases][-1], boot.damaged_lines) == ("agent", 1)


def test_other_versions_kinds_and_members_are_passed_over():
    other = (
        b'@@calve {"v":2,"t":9,"e":"phase","n":"agent"}\n@@calve {"v":1,"t":3,"e":"dance","n":[]}\n'
    )
    (boot,) = read(phase(2.0, "network") + other)
    assert (len(boot.phases), boot.damaged_lines, boot.end_s) == (2, 0, 3.0)


@pytest.mark.parametrize("value", [None, True, "7", -1, 1e400, float("nan"), 10**300, [], {}])
def test_figures_of_another_kind_are_not_known(value):
    names = (
        "paths",
        "nar_bytes",
        "fetched_bytes",
        "agent_peak_mb",
        "lowest_available_mb",
        "release",
    )
    fields = dict.fromkeys(names, value) | {"system": 7}
    text = "@@calve " + json.dumps({"v": 1, "t": 9, "e": "ready"} | fields)
    assert len(text) < 512 or value == 10**300
    (boot,) = read(start() + phase(5.0, "pull") + phase(8.0, "commit"), text.encode())
    figures = boot.figures
    assert [getattr(figures, name) for name in names] == [None] * len(names)
    assert figures.system is None


def test_half_characters_are_replaced():
    (boot,) = read(
        rb'@@calve {"v":1,"t":3,"e":"fail","code":"\ud800","phase":7,"message":"a\udc80"}'
    )
    assert (boot.failure.code, boot.failure.phase, boot.failure.message) == ("?", "", "a?")


def test_a_boot_has_a_bounded_number_of_phases():
    (boot,) = read(*(phase(3.0 + at, f"phase-{at}") for at in range(500)))
    assert len(boot.phases) <= 66
    assert boot.end_s == 502.0


def test_little_is_held_of_a_long_log():
    text = b"@@calve {" * 512 + b"x" * 65536
    tracemalloc.start()
    try:
        (boot,) = boots(text for _ in range(40))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert boot.damaged_lines == 40 * 512
    assert peak < 1 << 20
