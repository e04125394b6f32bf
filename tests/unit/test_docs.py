"""The documentation says what the code says: links, commands, exit codes, dependencies."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from calve import errors
from calve.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs/reference"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """Return a page's text without its code: fenced, indented, and between backticks."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page):
    """Return the anchors of a page's headings, as forges make them."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def broken(page):
    """Return the relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def rows(page, *, under=None):
    """Return the first cell of every row of a page's tables, without heads; `under` names one section."""
    text = page.read_text(encoding="utf-8")
    if under is not None:
        text = text.partition(f"\n## {under}\n")[2].partition("\n## ")[0]
    rules = r"^\|.*\|\n\|(?:---\|)+$"  # a head and the line below it
    lines = re.sub(rules, "", text, flags=re.MULTILINE).splitlines()
    return [line.split("|")[1].strip().strip("`") for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    assert broken(page) == []


def test_the_check_of_links_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: one\n[x](page.md#a-heading-one) [y](page.md#two) [z](gone.md) [w](https://x)\n`[c](no)`\n"
    )
    assert broken(page) == ["page.md#two", "gone.md"]


def test_every_page_is_on_the_map():
    index = ROOT / "docs/index.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(index))
    }
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index}
    assert pages - linked == set()


def test_every_command_is_described_and_the_reverse():
    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    headings = "\n".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    assert set(re.findall(r"`calve ([a-z]+)", headings)) == {name for name, _, _ in COMMANDS}


def test_no_page_names_a_command_that_is_not_there():
    names = {name for name, _, _ in COMMANDS}
    for page in PAGES:
        if page.name != "README.md":  # it names what is planned, as such
            named = set(
                re.findall(r"(?:`|^\$ |^    )calve ([a-z]+)\b", page.read_text(), re.MULTILINE)
            )
            assert named - names == set(), page


def test_every_exit_code_is_listed():
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.CalveError)
    ]
    assert len(classes) > 10
    listed = [int(cell) for cell in rows(REFERENCE / "exit-codes.md")]
    assert {each.exit_code for each in classes} <= set(listed)
    assert listed == sorted(set(listed))


def names(requirements):
    return [re.match(r"[A-Za-z0-9._-]+", each)[0] for each in requirements]


def test_every_dependency_has_its_line():
    page = REFERENCE / "dependencies.md"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "tools/packages.txt").read_text().splitlines()
    debian = [line.partition("#")[0].strip() for line in lines]
    assert rows(page, under="At run time") == sorted(names(project["project"]["dependencies"]))
    assert rows(page, under="For development") == sorted(names(project["dependency-groups"]["dev"]))
    assert rows(page, under="From Debian 12") == sorted(filter(None, debian))
