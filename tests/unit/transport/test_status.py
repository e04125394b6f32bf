from __future__ import annotations

import pytest

from calve.errors import (
    AccessError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    TransientError,
    UsageError,
)
from calve.transport.status import ERROR_BYTES, Problem, error_from, parse_error, raise_for_status

XML = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SignatureDoesNotMatch</Code><Message>The &lt;request&gt; &amp;amp; signature
\x1b[31mis wrong</Message><AWSAccessKeyId>AKIASECRET</AWSAccessKeyId>
<StringToSign>AWS4 secret</StringToSign><Token-0>tokensecret</Token-0>
<RequestId>4442587FB7D0A2F9</RequestId></Error>"""


def test_s3_xml():
    problem = parse_error(XML, {})
    assert problem == Problem(
        code="SignatureDoesNotMatch",
        message="The <request> &amp; signature [31mis wrong",
        request_id="4442587FB7D0A2F9",
    )
    error = error_from(403, problem, {}, place="https://b/k")
    assert isinstance(error, AccessError)
    assert "secret" not in repr(error).lower() + str(error).lower()
    assert str(error).startswith("https://b/k: the server answered 403 SignatureDoesNotMatch: The")
    assert str(error).endswith("(request 4442587FB7D0A2F9)")


@pytest.mark.parametrize(
    ("body", "headers", "code", "message"),
    [
        (b'{"message": "slow"}', {"x-amzn-errortype": "ThrottlingException:http://x/"}, "ThrottlingException", "slow"),
        (b'{"__type": "a.b#AccessDeniedException", "Message": "no"}', {}, "AccessDeniedException", "no"),
        (b' {"message": 5}', {}, "", "5"),
        (b'{"message": ', {}, "", ""),
        (b"{" * 9000, {}, "", ""),
        (b"", {}, "", ""),
        (b"<html>oops", {}, "", ""),
        (b"\xff\xfe<Code>\xff</Code>", {}, "\ufffd", ""),
        (b"<Code>" + b"x" * 9999 + b"</Code>", {}, "", ""),
        (b" " * ERROR_BYTES + b"<Code>Late</Code>", {}, "", ""),
    ],
)  # fmt: skip
def test_other_bodies(body, headers, code, message):
    problem = parse_error(body, headers)
    assert (problem.code, problem.message) == (code, message)


def test_a_deep_json_body():
    assert parse_error(b'{"a":' + b"[" * 9000, {}).code == ""


def test_request_id_and_region_of_headers():
    problem = parse_error(b"", {"x-amz-request-id": "R", "x-amz-bucket-region": "eu-west-1"})
    assert (problem.request_id, problem.region) == ("R", "eu-west-1")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (500, "InternalError", TransientError),
        (502, "", TransientError),
        (503, "SlowDown", TransientError),
        (504, "", TransientError),
        (429, "", TransientError),
        (408, "", TransientError),
        (400, "RequestTimeout", TransientError),
        (400, "ThrottlingException", TransientError),
        (200, "InternalError", TransientError),
        (409, "ConditionalRequestConflict", TransientError),
        (409, "OperationAborted", TransientError),
        (501, "NotImplemented", RefusedError),
        (403, "AccessDenied", AccessError),
        (403, "", AccessError),
        (401, "", AccessError),
        (403, "SignatureDoesNotMatch", AccessError),
        (403, "InvalidAccessKeyId", AccessError),
        (403, "RequestTimeTooSkewed", AccessError),
        (400, "ExpiredToken", AccessError),
        (400, "InvalidToken", AccessError),
        (400, "UnrecognizedClientException", AccessError),
        (404, "NoSuchKey", NotFoundError),
        (410, "", NotFoundError),
        (409, "BucketNotEmpty", ConflictError),
        (412, "PreconditionFailed", ConflictError),
        (416, "InvalidRange", DamagedError),
        (301, "PermanentRedirect", UsageError),
        (400, "AuthorizationHeaderMalformed", UsageError),
        (302, "", RefusedError),
        (400, "InvalidRequest", RefusedError),
        (405, "", RefusedError),
    ],
)
def test_categories(status, code, kind):
    assert type(error_from(status, Problem(code=code), {})) is kind


def test_the_right_region_is_in_the_hint():
    error = error_from(301, Problem(region="eu-west-1"), {})
    assert isinstance(error, UsageError)
    assert "eu-west-1" in error.hint


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "9" * 50}, None),
        (
            {
                "retry-after": "Tue, 03 Nov 2026 04:05:16 +99999999999999999999",
                "date": "Tue, 03 Nov 99999999999 04:05:06 GMT",
            },
            None,
        ),
        ({"retry-after": "Tue, 03 Nov 2026 04:05:16 GMT"}, None),
        (
            {
                "retry-after": "Tue, 03 Nov 2026 04:05:16 GMT",
                "date": "Tue, 03 Nov 2026 04:05:06 GMT",
            },
            10,
        ),
        (
            {
                "retry-after": "Tue, 03 Nov 2026 04:05:00 -0000",
                "date": "Tue, 03 Nov 2026 04:05:06 GMT",
            },
            0,
        ),
    ],
)
def test_retry_after(headers, seconds):
    error = error_from(503, Problem(), headers)
    assert isinstance(error, TransientError)
    assert error.retry_after_s == seconds


def test_raise_for_status(serve, client):
    def handler(wire, request):
        if request.path == "/ok":
            wire.answer(b"fine", status="206 Partial Content")
        elif request.path == "/huge":
            wire.answer(
                b"<Code>SlowDown</Code>" + b"x" * 1_000_000, status="503 x", Retry_After="3"
            )
        else:
            wire.answer(XML, status="403 Forbidden")

    server = serve(handler)
    with client.request("GET", f"{server.url}/ok") as response:
        raise_for_status(response)
        assert response.read_all(10) == b"fine"
    for _ in range(2):
        with pytest.raises(AccessError) as error:
            raise_for_status(client.request("GET", f"{server.url}/k?X-Amz-Signature=secret"))
        assert error.value.place == f"{server.url}/k"
    assert server.connections == 1
    with pytest.raises(TransientError, match="SlowDown") as late:
        raise_for_status(client.request("GET", f"{server.url}/huge"))
    assert late.value.retry_after_s == 3
