"""Every failure code has a page, and the reference lists it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calve.cli.main import COMMANDS
from calve.contract.codes import Code
from calve.contract.explain import AFTER, EXPLANATIONS, explain, known

PAGE = Path(__file__).parents[3] / "docs/reference/evidence.md"


def test_every_code_has_a_page_in_the_order_of_the_codes():
    assert list(EXPLANATIONS) == list(Code)


@pytest.mark.parametrize("code", Code, ids=str)
def test_a_page_is_prose(code):
    found = explain(code.value)
    for text in (found.happened, found.agent, found.remedy, AFTER):
        assert text[0].isupper()
        assert text.endswith(".")
        assert "  " not in text
        assert "\n" not in text


@pytest.mark.parametrize("code", Code, ids=str)
def test_the_reference_lists_it(code):
    assert f"| `{code.value}` | {code.text} |" in PAGE.read_text(encoding="utf-8")


def test_pages_name_commands_that_exist():
    text = " ".join(f"{one.happened} {one.agent} {one.remedy}" for one in EXPLANATIONS.values())
    named = set(re.findall(r"`calve ([a-z]+)", text))
    assert named
    assert named <= {name for name, _, _ in COMMANDS}


@pytest.mark.parametrize("code", ["", "no-such", "INTERNAL", "internal "])
def test_other_codes_are_not_known(code):
    assert explain(code) is None
    assert known(code) is None
