import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calve.region.query import AUTOSCALING, EC2, Params, page, parse
from calve.region.signature import Refusal


def refused(function, *args):
    with pytest.raises(Refusal) as caught:
        function(*args)
    return caught.value.code


def test_both_dialects_of_lists_are_read():
    body = b"A.member.1=x&A.member.2=y&B.2=q&B.10=r&B.1=p&C.D=1&E=&F.1.K=k&F.1.V.1=v"
    assert parse(body) == {
        "A": ["x", "y"],
        "B": ["p", "q", "r"],
        "C": {"D": "1"},
        "E": "",
        "F": [{"K": "k", "V": ["v"]}],
    }


@pytest.mark.parametrize(
    "body",
    [
        b"A=1&A=2",
        b"A=1&A.B=2",
        b"A.B=1&A=2",
        b".=1",
        b"A.=1",
        b"\xff=1",
        b"A=%ff",
        b".".join([b"a"] * 13) + b"=1",
        b"&".join(b"a%d=1" % number for number in range(5000)),
    ],
)
def test_malformed_forms(body):
    assert refused(parse, body) == "MalformedQueryString"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_form_or_refused(body):
    try:
        parse(body)
    except Refusal as refusal:
        assert refusal.code == "MalformedQueryString"


def test_types_are_checked():
    params = Params(parse(b"N=x&M=101&T=maybe&S.A=1&L=one&W.1=a&W.2=b"))
    assert refused(params.integer, "N", 0, 9) == "ValidationError"
    assert refused(params.integer, "M", 0, 100) == "ValidationError"
    assert params.integer("M", 0, 101) == 101
    assert refused(params.boolean, "T") == "ValidationError"
    assert refused(params.text, "S") == "ValidationError"
    assert refused(params.strings, "L") == "ValidationError"
    assert refused(params.structs, "W") == "ValidationError"
    assert refused(params.raw, "L") == "ValidationError"
    assert refused(params.need, "X") == "MissingParameter"
    assert params.strings("W") == ["a", "b"]
    assert params.strings("X") is None
    assert Params({"L": ""}).strings("L") == []


def test_what_nobody_reads_is_refused_at_any_depth():
    params = Params(parse(b"A=1&S.B=1&S.C=2"))
    params.text("A")
    inner = params.struct("S")
    inner.text("B")
    with pytest.raises(Refusal, match=r"S\.C") as caught:
        params.done()
    assert caught.value.code == "UnknownParameter"
    inner.text("C")
    params.done()


def test_pages():
    items = list("abcde")
    assert page(items, Params({"M": "2"}), "M", mark="T", most=100) == (["a", "b"], "2")
    assert page(items, Params({"M": "2", "T": "4"}), "M", mark="T", most=100) == (["e"], None)
    bad = Params({"T": "-1"})
    with pytest.raises(Refusal, match="invalid"):
        page(items, bad, "M", mark="T", most=100)


def test_answers_are_xml_whatever_is_in_them():
    result = {"A": "<&\x00\ud800>", "B": [1, 2], "C": {"D": True}, "E": None}
    body = EC2.answer("Do", result, "r1").body
    root = ET.fromstring(body)
    space = "{http://ec2.amazonaws.com/doc/2016-11-15/}"
    assert root.tag == f"{space}DoResponse"
    assert root.find(f"{space}A").text == "<&\ufffd\ufffd>"
    assert [one.text for one in root.find(f"{space}B")] == ["1", "2"]
    assert root.find(f"{space}C/{space}D").text == "true"
    assert root.find(f"{space}E") is None


def test_errors_have_each_dialects_shape():
    refusal = Refusal(400, "Code<", "text & more")
    ec2 = ET.fromstring(EC2.error(refusal, "r1").body)
    assert ec2.findtext("Errors/Error/Code") == "Code<"
    assert ec2.findtext("RequestID") == "r1"
    answer = AUTOSCALING.error(Refusal(500, "InternalFailure", "x"), "r1")
    space = "{http://autoscaling.amazonaws.com/doc/2011-01-01/}"
    other = ET.fromstring(answer.body)
    assert answer.status == 500
    assert other.findtext(f"{space}Error/{space}Type") == "Receiver"
    assert other.findtext(f"{space}RequestId") == "r1"
