"""Real Nix takes the demo's paths for what they are: content-addressed, with references, themselves included."""

from __future__ import annotations

import json
import shutil

import pytest

from calve.demo import imports
from calve.demo.kernel import Kernel, kernel
from calve.demo.packages import Packages
from calve.demo.system import Boot, System, add_toplevel
from calve.demo.tiny import build_tiny
from calve.demo.www import add_www
from calve.nix.hashes import Hash
from calve.nix.store import LocalStore


def build(nix, tmp_path):
    """Build a toplevel whose closure has every kind of path: plain, referring, referring to itself."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"kernel" * 10_000)
    with LocalStore(nix.root, create=True) as store:
        importer = imports.Importer(store)
        www = add_www(importer, 1)
        tree = tmp_path / "farm"
        (tree / "usr").mkdir(parents=True)
        (tree / "usr" / "page").symlink_to(f"{www}/index.html")
        farm = importer.add(tree, "system-path", [www])
        described = System("x", 1, links={"www": www, "sw": farm})
        init = f"#!/bin/sh\n# {described.toplevel} {described.toplevel}\n"
        boot = Boot(Kernel("6.1", image, tmp_path), initrd=image)
        top = add_toplevel(importer, described, init, boot)
        importer.flush()
        return str(top), [str(info.path) for info in store.closure([top])]


@pytest.fixture
def system(nix, tmp_path):
    return build(nix, tmp_path)


def test_nix_verifies_contents_and_addresses(nix, system):
    top, closure = system
    assert len(closure) == 5
    nix.run("nix-store", "--verify", "--check-contents")
    # Without a signature a path is only trusted where its content gives its address.
    nix.run("nix", "store", "verify", "--recursive", "--sigs-needed", "1", top)
    assert sorted(nix.lines("nix-store", "--query", "--requisites", top)) == sorted(closure)


def test_nix_sees_the_references(nix, system):
    top, closure = system
    info = json.loads(nix.run("nix", "path-info", "--json", "--recursive", top))
    assert all(it["ca"].startswith("fixed:r:sha256:") for it in info)
    own = next(it for it in info if it["path"] == top)
    assert sorted(own["references"]) == sorted(closure)


def test_nix_copies_without_signatures(nix, system, tmp_path):
    top, closure = system
    # Content-addressed paths need no signature: no --no-check-sigs here.
    other = f"local?root={tmp_path / 'other'}"
    nix.run("nix", "copy", "--to", other, top)
    nix.run("nix", "store", "verify", "--store", other, "--recursive", top, store=False)
    found = nix.lines("nix", "path-info", "--store", other, "--recursive", top, store=False)
    assert sorted(found) == sorted(closure)


def test_nix_refuses_an_address_that_zeroes_nothing(nix, tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "modulo", lambda data, _digest: Hash.sha256(data))
    top, _closure = build(nix, tmp_path)
    with pytest.raises(AssertionError, match=r"got: +sha256"):
        nix.run("nix", "copy", "--to", f"local?root={tmp_path / 'other'}", top)


def test_nix_refuses_a_page_that_was_changed(nix, system):
    _top, closure = system
    page = nix.real(next(path for path in closure if path.endswith("-www-1"))) / "index.html"
    page.chmod(0o644)
    page.write_text("calve demo release 9\n")
    with pytest.raises(AssertionError, match="got 'sha256"):
        nix.run("nix-store", "--verify", "--check-contents")


@pytest.mark.full
def test_the_tiny_system_of_debians_packages(nix, tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("no apt here")
    packages = Packages(tmp_path / "cache")
    boot = Boot(kernel(packages, tmp_path / "kernel"))
    with LocalStore(nix.root, create=True) as store:
        top = build_tiny(store, packages, release=1, boot=boot)
        infos = store.closure([top])
    assert len(infos) == 5
    assert sum(info.nar_size for info in infos) < 20_000_000
    nix.run("nix", "store", "verify", "--recursive", "--sigs-needed", "1", str(top))
