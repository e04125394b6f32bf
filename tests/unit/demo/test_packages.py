"""Packages from apt: the cache, the hash, what apt does not know."""

from __future__ import annotations

import pytest

from calve.demo.packages import Packages, paragraphs
from calve.errors import CalveError, CancelledError, DamagedError, NotFoundError
from calve.progress import Note, Step
from calve.tasks import Cancel


def test_fetches_by_name_in_order(make, apt, tmp_path):
    want = [make("b", version="1:2~x"), make("a")]
    apt.publish()
    events = []
    found = Packages(tmp_path / "cache", events.append).fetch(["b", "a"])
    assert [(it.name, it.version, it.sha256) for it in found] == [
        (it.name, it.version, it.sha256) for it in want
    ]
    assert [it.path.read_bytes() for it in found] == [it.path.read_bytes() for it in want]
    total = sum(it.path.stat().st_size for it in want)
    assert [it for it in events if isinstance(it, Step)][-1] == Step("packages", total, total)
    assert sorted(it.name for it in (tmp_path / "cache").iterdir()) == [
        "a_1.0-1_amd64.deb",
        "b_1%3a2~x_amd64.deb",
    ]


def test_the_cache_is_used_again(make, apt, tmp_path):
    make("a")
    make("b")
    apt.publish()
    packages = Packages(tmp_path / "cache")
    packages.fetch(["a"])
    packages.fetch(["a", "b"])
    assert apt.downloads == ["a=1.0-1", "b=1.0-1"]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"X" + data[1:]])
def test_a_damaged_cache_is_fetched_again(change, make, apt, tmp_path):
    deb = make("a")
    apt.publish()
    notes = []
    packages = Packages(tmp_path / "cache", notes.append)
    cached = packages.fetch(["a"])[0].path
    cached.write_bytes(change(deb.path.read_bytes()))
    assert packages.fetch(["a"])[0].path.read_bytes() == deb.path.read_bytes()
    assert apt.downloads == ["a=1.0-1"] * 2


def test_a_damaged_cache_is_noted(make, apt, tmp_path):
    deb = make("a")
    apt.publish()
    notes = []
    packages = Packages(tmp_path / "cache", notes.append)
    packages.fetch(["a"])[0].path.write_bytes(b"X" + deb.path.read_bytes()[1:])
    packages.fetch(["a"])
    assert [it for it in notes if isinstance(it, Note)] != []


def test_unknown_names_are_all_told(make, apt, tmp_path):
    make("a")
    apt.publish()
    with pytest.raises(NotFoundError, match="nix, nox"):
        Packages(tmp_path / "cache").fetch(["nix", "a", "nox"])
    assert apt.downloads == []


def test_another_file_than_promised_is_refused_and_not_kept(make, apt, tmp_path):
    make("a")
    apt.publish(SHA256="0" * 64)
    with pytest.raises(DamagedError, match="not the one"):
        Packages(tmp_path / "cache").fetch(["a"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_apt_that_fails_is_an_error(make, apt, tmp_path):
    deb = make("a")
    apt.publish()
    deb.path.unlink()
    with pytest.raises(CalveError, match="apt-get failed"):
        Packages(tmp_path / "cache").fetch(["a"])


@pytest.mark.parametrize("change", [{"Size": "many"}, {"Size": ""}])
def test_lists_without_a_size_are_damaged(change, make, apt, tmp_path):
    make("a")
    apt.publish(**change)
    with pytest.raises(DamagedError, match="a package without"):
        Packages(tmp_path / "cache").fetch(["a"])


def test_no_apt_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda *_args, **_more: None)
    with pytest.raises(NotFoundError) as told:
        Packages(tmp_path).fetch(["a"])
    assert told.value.hint == "apt-get install apt"


def test_cancelled(make, apt, tmp_path):
    make("a")
    apt.publish()
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        Packages(tmp_path / "cache", cancel=cancel).fetch(["a"])


def test_paragraphs():
    text = "A: 1\nB: x\n y\n .\n\n\nA: 2\n"
    assert list(paragraphs(text, "t")) == [{"A": "1", "B": "x\ny\n."}, {"A": "2"}]


@pytest.mark.parametrize("text", [" a\n", "A\n", ": x\n", "A: 1\n\n b\n"])
def test_damaged_paragraphs_name_the_line(text):
    with pytest.raises(DamagedError, match=r"^t:\d"):
        list(paragraphs(text, "t"))


def test_apt_that_cannot_work_is_not_taken_for_one_that_knows_nothing(make, apt, tmp_path):
    script = tmp_path / "bin" / "apt-cache"
    script.write_text("#!/bin/sh\necho 'E: Unable to mkstemp /x' >&2; exit 100\n")
    with pytest.raises(CalveError, match="apt-cache failed: E: Unable to mkstemp") as told:
        Packages(tmp_path / "cache").fetch(["a"])
    assert not isinstance(told.value, NotFoundError)
