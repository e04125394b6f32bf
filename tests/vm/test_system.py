"""The systems of the demo as NixOS would lay them out, in a store with a valid database."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def store(workshop):
    with workshop.store() as store:
        yield store


def test_the_webserver_s_toplevel_has_what_a_boot_needs(store, workshop):
    top = workshop.system(store, "webserver", 1)
    folder = store.real(top)
    names = {path.name for path in folder.iterdir()}
    assert {
        "init",
        "kernel",
        "initrd",
        "kernel-params",
        "boot.json",
        "nixos-version",
        "etc",
    } <= names
    spec = json.loads((folder / "boot.json").read_text())["org.nixos.bootspec.v1"]
    assert spec["toplevel"] == str(top)
    assert spec["init"] == f"{top}/init"
    for name in ("kernel", "initrd"):
        assert (folder / name).readlink().as_posix() == spec[name]
        assert store.contains(
            next(p for p in store.path_info(top).references if spec[name].startswith(str(p)))
        )


def test_release_2_differs_in_its_page_and_its_toplevel(store, workshop):
    closures = [
        {info.path for info in store.closure([workshop.system(store, "webserver", number)])}
        for number in (1, 2)
    ]
    changed = {path.name for path in closures[1] - closures[0]}
    assert changed == {"www-2", "nixos-system-webserver-2"}
    assert len(closures[0]) >= 100


def test_the_small_system_is_small(store, workshop):
    closure = store.closure([workshop.system(store, "tiny", 1)])
    assert sum(info.nar_size for info in closure) <= 20_000_000
