"""Lines that nobody named, and what prune says of variants and of what is young."""

from __future__ import annotations

import pytest

from calve.aws.images import Ami
from calve.errors import UsageError
from calve.image import ami
from calve.nix.storepath import StorePath


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nixos-system-web-25.11.20251101.abc", "web"),
        ("nixos-system-web-db-1", "web-db"),
        ("nixos-system-Web_1.x-24.05", "web-1-x"),
        ("page", "page"),
        ("nixos-system-" + "w" * 90, "w" * 63),
        ("+-", "system"),
    ],
)
def test_a_system_s_line(name, line):
    found = ami.line_of(StorePath("0" * 32, name))
    assert found == line
    assert ami.check_line(found) == line


def test_what_is_no_line():
    for text in ("", "Web", "-web", "a b", "w" * 64):
        with pytest.raises(UsageError, match="no name for a line"):
            ami.check_line(text)


def image(number, created, **tags):
    named = {"calve:line": "web"} | {f"calve:{key}": value for key, value in tags.items()}
    return Ami(f"ami-{number}", f"web-{number}", "available", "x86_64", (), created, tags=named)


def test_a_variant_is_no_parent_and_what_is_young_stays():
    images = [
        image(1, "2026-01-01T00:00:00.000Z"),
        image(2, "2026-01-02T00:00:00.000Z"),
        image(3, "2026-01-03T00:00:00.000Z", variant="debug"),
    ]
    found = {one.image.id: one.why for one in ami.prune(images, {}, set())}
    assert found == {"ami-3": "", "ami-2": "it is the newest of its line", "ami-1": ""}
    found = {
        one.image.id: one.why for one in ami.prune(images, {}, set(), before="2026-01-01T12:00:00")
    }
    assert (found["ami-3"], found["ami-1"]) == ("it is young", "")
