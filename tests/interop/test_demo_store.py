"""Real Nix takes the demo's paths for what they are: content-addressed, with references, themselves included."""

from __future__ import annotations

import json
import shutil

import pytest

from calve.demo.imports import Importer
from calve.demo.kernel import Kernel, kernel
from calve.demo.packages import Packages
from calve.demo.system import Boot, System, add_toplevel
from calve.demo.tiny import build_tiny
from calve.demo.www import add_www
from calve.nix.store import LocalStore


@pytest.fixture
def system(nix, tmp_path):
    """A toplevel in Nix's store whose closure has every kind of path: plain, referring, referring to itself."""
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"kernel" * 10_000)
    with LocalStore(nix.root, create=True) as store:
        importer = Importer(store)
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
        yield str(top), [str(info.path) for info in store.closure([top])]


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


def test_nix_finds_the_same_references_by_scanning(nix, system):
    top, closure = system
    line = nix.lines("nix", "store", "make-content-addressed", top, "--json")
    rewrites = json.loads("".join(line))["rewrites"]
    # Nix scans and rewrites a closure to content addresses: ours are those already.
    assert rewrites == {path: path for path in closure}


def test_nix_refuses_an_address_that_is_wrong(nix, system):
    top, _closure = system
    with LocalStore(nix.root) as store:
        www = next(info for info in store.closure([store_path(top)]) if info.path.name == "www-1")
    page = nix.real(str(www.path)) / "index.html"
    page.chmod(0o644)
    page.write_text("calve demo release 9\n")
    with pytest.raises(AssertionError, match="modified"):
        nix.run("nix-store", "--verify", "--check-contents")


def store_path(text):
    from calve.nix.storepath import StorePath

    return StorePath.parse(text)


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
