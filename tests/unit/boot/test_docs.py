"""The reference pages say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from calve.contract import evidence, userdata
from calve.contract.codes import Code
from calve.contract.userdata import UserData

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def page():
    return (DOCS / "reference/evidence.md").read_text()


def test_every_code_stands_in_the_table_with_its_explanation(page):
    rows = [
        f"| `{code.value}` | {code.text} | {'a little later it may pass' if code.transient else 'no'} |"
        for code in Code
    ]
    table = page[page.index("| code | why |") : page.index("What to do")].strip().splitlines()
    assert table[2:] == rows


def test_every_phase_and_the_bounds_are_named(page):
    assert ", ".join(f"`{name}`" for name in evidence.PHASES) in page
    assert f"at most {evidence.LINE_BYTES} bytes" in page
    assert evidence.PREFIX.strip() in page


def test_the_example_is_evidence(page):
    example = next(line.strip() for line in page.splitlines() if line.startswith("    @@calve"))
    event = evidence.Evidence.parse(example)
    assert event is not None
    assert event.dump() == example


def test_every_member_of_user_data_is_listed():
    text = (DOCS / "reference/user-data.md").read_text()
    example = json.loads(re.search(r"^    (\{.*?\n    \}\})", text, re.DOTALL | re.MULTILINE)[1])
    assert list(example) == ["calve"]
    members = {"version", *UserData.__dataclass_fields__}
    assert set(example["calve"]) == members
    assert set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE)) == members
    for code in Code:
        if code.startswith("userdata-"):
            assert f"`{code}`" in text
    assert f"{userdata.LIMIT_BYTES // 1024} KiB" in text


def test_pages_lead_to_pages_that_exist():
    for place in (
        DOCS / "reference/evidence.md",
        DOCS / "reference/user-data.md",
        DOCS / "explanation/commit.md",
    ):
        text = place.read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (place.parent / target).exists(), target
        for code in re.findall(r"`tests/[^`]+`", text):
            assert (DOCS.parent / code.strip("`")).exists(), code
