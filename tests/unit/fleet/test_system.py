"""From what the fleet file says to a store path; Nix is a script that plays it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from calve.errors import CalveError, CancelledError, NotFoundError, UsageError
from calve.fleet.system import Installable, build, parse
from calve.nix.storepath import StorePath
from calve.progress import Note, Step
from calve.tasks import Cancel

PATH = StorePath("a" * 32, "nixos-system-web-1")
TOPLEVEL = ".config.system.build.toplevel"


@pytest.fixture
def nix(tmp_path, monkeypatch):
    """Return a function that has a script play Nix."""
    place = tmp_path / "bin"
    place.mkdir()

    def play(script):
        (place / "nix").write_text(f"#!/bin/sh\n{script}\n")
        (place / "nix").chmod(0o755)

    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    return play


def answer(path, output="out"):
    return f'echo \'[{{"drvPath": "/nix/store/x.drv", "outputs": {{"{output}": "{path}"}}}}]\''


# What the text means


@pytest.mark.parametrize("text", [str(PATH), f"{PATH}/", f"{PATH}/init"])
def test_a_store_path_is_itself(tmp_path, text):
    assert parse(text, tmp_path) == PATH


def test_another_root_s_store_is_one(tmp_path):
    assert parse(f"{tmp_path}{PATH}", tmp_path, tmp_path) == PATH
    with pytest.raises(UsageError):
        parse(f"{tmp_path}{PATH}", tmp_path)


def test_links_are_followed_from_the_files_directory(tmp_path):
    (tmp_path / "very/deep").mkdir(parents=True)
    (tmp_path / "very/deep/result").symlink_to("../../other")
    (tmp_path / "other").symlink_to(str(PATH))
    (tmp_path / "way").symlink_to("very/deep")
    for text in ("other", "./very/deep/result", "way/result", "other/init"):
        assert parse(text, tmp_path) == PATH


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".#nixosConfigurations.web", ".#nixosConfigurations.web" + TOPLEVEL),
        (
            'github:a/b#nixosConfigurations."web.one"',
            'github:a/b#nixosConfigurations."web.one"' + TOPLEVEL,
        ),
        (
            ".#nixosConfigurations.web.config.system.build.toplevel",
            ".#nixosConfigurations.web" + TOPLEVEL,
        ),
        (".#web", ".#web"),
        ("git+https://example.org/x", "git+https://example.org/x"),
    ],
)
def test_a_configuration_stands_for_its_toplevel(tmp_path, text, expected):
    assert parse(text, tmp_path) == Installable(expected)


def test_nix_files_and_directories_with_a_flake(tmp_path):
    (tmp_path / "web.nix").write_text("{}")
    assert parse("./web.nix", tmp_path) == Installable(str(tmp_path / "web.nix"), is_file=True)
    (tmp_path / "flake.nix").write_text("{}")
    assert parse(".", tmp_path) == Installable(".")


@pytest.mark.parametrize("text", ["nothing", "./loop", "gone.nix", "/nix/store/x", "a\nb"])
def test_what_leads_to_no_system_is_refused_with_advice(tmp_path, text):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError) as caught:
        parse(text, tmp_path)
    assert caught.value.hint


# Building


def test_a_store_path_needs_no_nix(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert build(str(PATH), tmp_path) == PATH


def test_without_nix_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("calve.process.shutil.which", lambda *_args, **_more: None)
    with pytest.raises(NotFoundError) as caught:
        build(".#web", tmp_path)
    assert "./result" in caught.value.hint


def test_nix_runs_in_the_files_directory_and_its_sentences_are_told(tmp_path, nix):
    nix(
        f'echo "$PWD" "$@" >{tmp_path}/said\n'
        "echo \"evaluating file '/x'\" >&2\n"
        "echo \"building '/nix/store/a.drv'...\" >&2\n"
        "echo \"copying path '/nix/store/b' from 'https://c'...\" >&2\n"
        "echo \"building '/nix/store/d.drv'...\" >&2\n"
        f"echo 'warning: dirty' >&2\n{answer(PATH)}"
    )
    events = []
    store = tmp_path / "root"
    found = build(".#nixosConfigurations.web", tmp_path, store=store, progress=events.append)
    assert found == PATH
    assert events == [
        Step("build", 1, None, "derivations"),
        Step("fetch", 1, None, "paths"),
        Step("build", 2, None, "derivations"),
        Note("nix: warning: dirty"),
    ]
    words = (tmp_path / "said").read_text().split()
    assert words[0] == str(tmp_path)
    assert words[-3:] == ["--store", f"local?root={store}", ".#nixosConfigurations.web" + TOPLEVEL]


def test_a_build_that_fails_says_why(tmp_path, nix):
    nix("seq 1 5000 >&2; echo 'error: no such attribute' >&2; exit 3")
    with pytest.raises(CalveError, match="no such attribute") as caught:
        build(".#web", tmp_path)
    assert "failed with 3" in caught.value.message
    assert caught.value.message.count("\n") == 19
    assert caught.value.place == ".#web"


@pytest.mark.parametrize(
    "script",
    [
        "echo nonsense",
        "true",
        "echo '[]'",
        "echo '[1]'",
        "echo '{}'",
        answer(PATH, "dev"),
        "echo '[{\"outputs\": null}]'",
        answer("/tmp/x"),
    ],
)
def test_an_answer_that_is_no_system_is_an_error(tmp_path, nix, script):
    nix(script)
    with pytest.raises(CalveError):
        build(".#web", tmp_path)


def test_a_cancelled_build_ends_and_so_does_nix(tmp_path, nix):
    nix(f"echo $$ >{tmp_path}/pid; echo 'warning: up' >&2; sleep 300; true")
    cancel = Cancel()
    up = threading.Event()

    def stop():
        up.wait(30)
        cancel.cancel()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(CancelledError):
            build(".#web", tmp_path, progress=lambda _event: up.set(), cancel=cancel)
    finally:
        up.set()
        thread.join()
    proc = Path("/proc", (tmp_path / "pid").read_text().strip())
    assert not proc.exists()
