"""Console logs of any bytes: nothing is an error, and evidence is found wherever it stands."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from hypothesis import example, given, settings
from hypothesis import strategies as st

from calve.contract.console import Mark, scan
from calve.contract.evidence import PHASES, Evidence
from calve.contract.timeline import boots

noise = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from(
            [
                b"@@calve ",
                b"@@calve {",
                b"@@calv",
                b'{"v":1,',
                b'"t":3,',
                b'"e":"phase"}',
                b"\x1b[0m",
                b"\x1b[",
                b"\r",
                b"\n",
                b"\0",
                b"\xff",
                b'"',
                b"\\",
                b"}",
                b"[    0.000000] Linux version ",
                b"y" * 1100,
            ]
        ),
        max_size=12,
    ).map(b"".join),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
events = st.builds(
    Evidence,
    st.sampled_from(["phase", "start", "progress", "ready", "fail", "other"]),
    st.floats(0, 1e8).map(lambda at_s: round(at_s, 2)),
    st.dictionaries(
        st.sampled_from(
            [
                "n",
                "code",
                "phase",
                "message",
                "done",
                "total",
                "unit",
                "agent",
                "system",
                "paths",
                "nar_bytes",
                "fetched_bytes",
                "agent_peak_mb",
                "lowest_available_mb",
                "available_mb",
            ]
        ),
        st.sampled_from([*PHASES, "bytes", "@@calve {}"]) | values,
        max_size=5,
    ),
)


def pieces(data, log):
    """Cut a log into pieces somewhere."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=6)))
    return [log[a:b] for a, b in zip([0, *cuts], [*cuts, len(log)], strict=True)]


def check(found):
    for number, boot in enumerate(found, 1):
        assert boot.number == number
        at_s = 0.0
        for phase in boot.phases:
            assert phase.begin_s == at_s
            at_s = phase.end_s
            assert phase.begin_s <= phase.end_s
            assert 0 <= boot.share(phase) <= 1
        assert at_s == (boot.end_s if boot.phases else 0.0)
        assert len(boot.last_lines) <= 3


@given(st.lists(noise, max_size=8).map(b"".join), st.data())
@example(b"[    0.000000] Linux version " + b"y" * 1100, None)
@settings(deadline=None, max_examples=300)
def test_no_bytes_are_an_error(log, data):
    items = list(scan([log]))
    assert [item.mark is Mark.END for item in items] == [False] * (len(items) - 1) + [True]
    found = list(boots([log]))
    check(found)
    cut = pieces(data, log) if data else [log[at : at + 1] for at in range(len(log))]
    assert list(boots(cut)) == found


@given(st.lists(st.tuples(noise, events), max_size=6), noise, st.data())
@example([(b"@@calve @@calve \x1b[", Evidence("phase", 1.0, {"n": "pull"}))], b"}\xff", None)
@example([(b"", Evidence("phase", 1.0, {"n": "kernel"}))], b"", None)
@settings(deadline=None, max_examples=300)
def test_evidence_is_found_wherever_it_stands(parts, end, data):
    log = b"".join(before + event.dump().encode() for before, event in parts) + end
    cut = [log] if data is None else pieces(data, log)
    found = [item.event for item in scan(cut) if item.mark is Mark.EVENT]
    for _, event in parts:
        wanted = Evidence.parse(event.dump())
        assert repr(wanted) in map(repr, found)  # NaN is not equal to itself
    check(list(boots(cut)))


@given(st.lists(events, max_size=12))
@settings(deadline=None, max_examples=200)
def test_whatever_was_read_can_be_drawn(said):
    from calve.cli import timeline
    from calve.ui.svg import timeline as drawn

    log = b"\n".join(event.dump().encode() for event in said)
    found = list(boots([log]))
    picture = drawn([timeline._chart(boot) for boot in found], title="x")
    assert ElementTree.fromstring(picture.encode()).tag.endswith("svg")
    for boot in found:
        document = json.dumps(timeline._document(boot), allow_nan=False, ensure_ascii=False)
        assert document.encode()
        for phase in boot.phases:
            assert 0 < len(timeline._bar(phase, boot.end_s)) <= timeline._BAR + 1
