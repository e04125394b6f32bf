"""A project's first files, and the workflow among them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from calve.errors import CalveError, UsageError
from calve.fleet import keys
from calve.fleet.config import Command, Environment, File, load
from calve.infra import start as module
from calve.infra.start import KEY_FILE, WORKFLOW_FILE, Did, Project, Start, begin
from calve.infra.workflow import KEY_NAME, ROLE_NAME, Workflow

START = Start("acme-nix", "eu-central-1", "web", ".#nixosConfigurations.web", "acme-web")
FILES = [".gitignore", KEY_FILE, "calve.toml", WORKFLOW_FILE]


def run(directory, start=START, fleet=None, **more):
    return begin(Project.read(directory), start, fleet, **more)


def contents(directory):
    return {
        str(one.relative_to(directory)): one.read_bytes()
        for one in directory.rglob("*")
        if one.is_file()
    }


# The files


def test_four_files_are_written_into_a_directory_that_is_made(tmp_path):
    begun = run(tmp_path / "new")
    assert begun.files == tuple((name, Did.WRITTEN) for name in FILES)
    assert set(contents(tmp_path / "new")) == set(FILES)


def test_the_fleet_file_says_what_was_asked_and_trusts_the_key(tmp_path):
    begun = run(tmp_path)
    config = load(tmp_path / "calve.toml")
    assert config.cache.url == "s3://acme-nix?region=eu-central-1"
    assert config.cache.trusted == (begun.public,)
    assert keys.read(config.cache.key).public.dump() == begun.public
    fleet = config.fleets["web"]
    assert (fleet.system, fleet.group) == (".#nixosConfigurations.web", "acme-web")
    assert (fleet.health.http, fleet.health.within_s) == ("/healthz", 180)
    assert config.cache.key == File(tmp_path / KEY_FILE)


def test_the_key_is_its_owner_s_and_its_secret_is_nowhere_else(tmp_path):
    begun = run(tmp_path)
    secret = (tmp_path / KEY_FILE).read_text().strip()
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    others = {name: data for name, data in contents(tmp_path).items() if name != KEY_FILE}
    assert all(secret.encode() not in data for data in others.values())
    assert secret not in repr(begun)
    assert secret not in repr(Project.read(tmp_path))


def test_a_second_run_changes_nothing_and_says_what_exists(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    assert run(tmp_path).files == (("calve.toml", Did.EXISTS), (WORKFLOW_FILE, Did.EXISTS))
    assert contents(tmp_path) == before


def test_a_dry_run_writes_nothing(tmp_path):
    begun = run(tmp_path / "new", dry_run=True)
    assert begun.files == tuple((name, Did.WOULD_WRITE) for name in FILES)
    assert begun.public is None
    assert not (tmp_path / "new").exists()


def test_a_dry_run_beside_a_key_shows_its_public_half_and_writes_nothing(tmp_path):
    first = run(tmp_path)
    (tmp_path / "calve.toml").unlink()
    before = contents(tmp_path)
    begun = run(tmp_path, dry_run=True)
    assert begun.public == first.public
    assert dict(begun.files)["calve.toml"] is Did.WOULD_WRITE
    assert dict(begun.files)[KEY_FILE] is Did.EXISTS
    assert contents(tmp_path) == before


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_run_that_was_killed_is_gone_on_with(missing, tmp_path):
    first = run(tmp_path)
    for name in FILES[-missing:]:
        (tmp_path / name).unlink()
    begun = run(tmp_path)
    assert set(contents(tmp_path)) == set(FILES)
    if missing in {1, 2}:
        assert keys.read_file(tmp_path / KEY_FILE).public.dump() == first.public
    assert load(tmp_path / "calve.toml").cache.trusted == (begun.public or first.public,)


def test_the_line_for_git_comes_before_the_key(tmp_path, monkeypatch):
    def full(key, path):
        assert (tmp_path / ".gitignore").read_text() == f"/{KEY_FILE}\n"
        raise CalveError("no space left")

    monkeypatch.setattr(module.keys, "write_file", full)
    with pytest.raises(CalveError, match="no space"):
        run(tmp_path)
    assert set(contents(tmp_path)) == {".gitignore"}


@pytest.mark.parametrize("before", ["result\n", "result", ""])
def test_a_gitignore_that_exists_gains_one_line(before, tmp_path):
    (tmp_path / ".gitignore").write_text(before)
    assert dict(run(tmp_path, dry_run=True).files)[".gitignore"] is Did.WOULD_ADD
    assert dict(run(tmp_path).files)[".gitignore"] is Did.ADDED
    lines = (tmp_path / ".gitignore").read_text()
    assert lines.split() == [*before.split(), f"/{KEY_FILE}"]
    assert lines.endswith("\n")


@pytest.mark.parametrize("line", [f"/{KEY_FILE}", KEY_FILE])
def test_a_line_that_is_there_is_enough(line, tmp_path):
    (tmp_path / ".gitignore").write_text(f"a\n{line}\nb\n")
    assert dict(run(tmp_path).files)[".gitignore"] is Did.EXISTS
    assert (tmp_path / ".gitignore").read_text() == f"a\n{line}\nb\n"


def test_git_itself_ignores_the_key(tmp_path):
    run(tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True, timeout=60)
    done = subprocess.run(
        ["git", "-C", tmp_path, "status", "--porcelain", "-uall"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert {line[3:] for line in done.stdout.splitlines()} == {*FILES} - {KEY_FILE}


def test_a_key_that_is_no_key_is_left_as_it_is(tmp_path):
    (tmp_path / KEY_FILE).write_text("hello\n")
    (tmp_path / KEY_FILE).chmod(0o600)
    with pytest.raises(UsageError):
        run(tmp_path)
    assert contents(tmp_path) == {KEY_FILE: b"hello\n"}


def test_texts_are_quoted_for_toml(tmp_path):
    run(tmp_path, Start("acme-nix", "eu-west-1", "web", './a "b"\\#x', 'g"r'))
    fleet = load(tmp_path / "calve.toml").fleets["web"]
    assert (fleet.system, fleet.group) == ('./a "b"\\#x', 'g"r')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bucket", "Acme"),
        ("bucket", "a&region=x"),
        ("region", "eu west"),
        ("fleet", "Web"),
        ("fleet", "web\nx"),
        ("system", ""),
        ("system", "a\nb"),
        ("group", ""),
    ],
)
def test_what_cannot_stand_in_the_files_is_refused(field, value):
    fields = {name: getattr(START, name) for name in START.__slots__}
    with pytest.raises(UsageError, match="is not"):
        Start(**{**fields, field: value})


# Beside a fleet file that is there

OWN = """\
[cache]
url = "s3://own?region=eu-west-3"
key = { env = "SIGN" }
[fleet.a]
system = "./a"
[fleet.b]
system = "f#b"
"""


def test_a_fleet_file_that_exists_gets_a_workflow_and_stays(tmp_path):
    (tmp_path / "calve.toml").write_text(OWN)
    begun = run(tmp_path, None, "b")
    assert begun.files == (("calve.toml", Did.EXISTS), (WORKFLOW_FILE, Did.WRITTEN))
    assert set(contents(tmp_path)) == {"calve.toml", WORKFLOW_FILE}
    assert (tmp_path / "calve.toml").read_text() == OWN
    text = (tmp_path / WORKFLOW_FILE).read_text()
    assert "calve deploy b --yes --json" in text
    assert "aws-region: eu-west-3" in text
    assert "SIGN: ${{ secrets.SIGN }}" in text


def test_its_first_fleet_is_meant_where_none_is_named(tmp_path):
    (tmp_path / "calve.toml").write_text(OWN)
    run(tmp_path, None)
    assert "calve deploy a " in (tmp_path / WORKFLOW_FILE).read_text()


@pytest.mark.parametrize(
    ("text", "fleet", "words"),
    [
        (OWN, "c", r"\[fleet.c\]"),
        ('[cache]\nurl = "s3://own?region=eu-west-3"\n', None, r"\[fleet.NAME\]"),
        ('[fleet.a]\nsystem = "./a"\n', None, "a cache in a bucket"),
        ("[cache", None, "not TOML"),
    ],
)
def test_one_that_does_not_say_enough_is_told_so(text, fleet, words, tmp_path):
    (tmp_path / "calve.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        run(tmp_path, None, fleet)
    assert contents(tmp_path) == {"calve.toml": text.encode()}


# The workflow


def workflow(system=".#nixosConfigurations.web", key=None):
    return Workflow("web", system, "eu-central-1", key, Path("/p")).text()


def commands(text):
    """Return the lines of all steps."""
    return re.findall(r"^ +run: (?:\|\n +)?(.*)$", text, re.MULTILINE)


def test_a_workflow_has_a_token_and_no_keys_of_aws():
    text = workflow()
    assert "permissions:\n  contents: read\n  id-token: write" in text
    assert f"role-to-assume: ${{{{ vars.{ROLE_NAME} }}}}" in text
    assert "aws-access-key" not in text


def test_runs_for_one_fleet_wait_for_each_other():
    assert "concurrency:\n  group: calve-web\n  cancel-in-progress: false\n" in workflow()


def test_every_action_is_pinned_to_a_major_version():
    used = re.findall(r"uses: (\S+)", workflow())
    assert len(used) == 3
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v[0-9]+", one) for one in used)


def test_of_a_flake_the_toplevel_is_built_and_pushed_before_it_is_deployed():
    text = workflow()
    toplevel = ".#nixosConfigurations.web.config.system.build.toplevel"
    built = f"nix build --print-build-logs --out-link result '{toplevel}'"
    at = [
        text.index(one) for one in (built, "calve push ./result", "calve deploy web --yes --json")
    ]
    assert at == sorted(at)
    vm = ".#nixosConfigurations.web.config.system.build.vm"
    assert f"--out-link result '{vm}'\n" in workflow(vm)
    assert "--out-link result '.#packages.x86_64-linux.web'\n" in workflow(
        ".#packages.x86_64-linux.web"
    )


def test_what_is_no_flake_is_left_to_the_deploy():
    assert commands(workflow("./system.nix"))[-1] == "calve deploy web --yes --json"
    assert "nix build" not in workflow("./system.nix")


def test_the_key_comes_out_of_a_secret_for_its_owner_alone(tmp_path):
    text = workflow(key=File(Path("/p/keys/a b.sec")))
    (line,) = [one for one in commands(text) if KEY_NAME in one]
    (tmp_path / "keys").mkdir()
    subprocess.run(
        ["bash", "-ec", line],
        cwd=tmp_path,
        env={KEY_NAME: "s", "PATH": "/bin:/usr/bin"},
        check=True,
    )
    assert (tmp_path / "keys/a b.sec").read_text() == "s\n"
    assert (tmp_path / "keys/a b.sec").stat().st_mode & 0o777 == 0o600


def test_a_key_elsewhere_needs_no_secret_of_the_repository():
    for key in (None, Command(("pass", "show"), Path("/p"))):
        assert "secrets." not in workflow(key=key)
    assert "SIGN: ${{ secrets.SIGN }}" in workflow(key=Environment("SIGN"))
