"""Evidence: one line, at most 512 bytes, and a reader that foreign text cannot confuse."""

import pytest

from calve.contract.evidence import LINE_BYTES, PREFIX, Evidence, read


def test_round_trip():
    event = Evidence("phase", 12.34, {"n": "pull"})
    assert Evidence.parse(event.dump()) == event


@pytest.mark.parametrize("text", ["x" * 5000, "ä" * 600, '"\\' * 400, "\n\n" * 300])
def test_a_line_is_never_too_long_and_never_two(text):
    line = Evidence("fail", 1.0, {"code": "internal", "message": text}).dump()
    assert len(line.encode()) < LINE_BYTES
    assert "\n" not in line
    parsed = Evidence.parse(line)
    assert parsed is not None
    assert parsed.fields["code"] == "internal"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "login:",
        PREFIX,
        PREFIX + "{",
        PREFIX + "[]",
        PREFIX + '{"v":2,"t":1,"e":"phase"}',
        PREFIX + '{"v":1,"t":"1","e":"phase"}',
        PREFIX + '{"v":1,"t":true,"e":"phase"}',
        PREFIX + '{"v":1,"t":1,"e":3}',
        PREFIX + '{"v":1,"t":1,"e":"x","a":"' + "x" * 600 + '"}',
    ],
)
def test_what_is_not_evidence_is_passed_over(line):
    assert Evidence.parse(line) is None


def test_a_console_is_read_in_order_among_other_lines():
    console = 'boot\r\n[ 1.0] x @@calve {"v":1,"t":1,"e":"a"}\r\n@@calve {"v":1,"t":2.5,"e":"b","n":"x"}\nend'
    assert [event.kind for event in read(console)] == ["a", "b"]
