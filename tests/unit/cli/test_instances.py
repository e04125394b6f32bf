"""What a machine's evidence comes to, in a cell."""

import pytest

from calve.cli.instances import last
from calve.contract.evidence import Evidence


def event(kind, **fields):
    return Evidence(kind, 1.0, fields)


PULL = event("phase", n="pull")
OLD = event("degraded", code="not-found", message="no manifest")


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "-"),
        ([event("start", agent="1")], "-"),
        ([event("phase", n="network"), PULL, event("progress", done=1)], "pull"),
        ([PULL, event("ready")], "ready"),
        ([PULL, event("ready"), event("phase", n="health"), event("healthy")], "healthy"),
        ([PULL, event("fail", code="signature", message="none")], "failed: signature: none"),
        ([PULL, event("fail")], "failed: None: None"),
        ([PULL, OLD, event("healthy")], "degraded: not-found: no manifest"),
        ([PULL, event("fail", code="x", message="y"), PULL], "pull"),
    ],
)
def test_the_last_that_counts_is_said(events, said):
    assert last(events) == said
