"""The web server: Debian's systemd and nginx with an administrator's tools, as a farm of links.

A release differs from the one before in its page and its toplevel; what it is made of stays: the packages' paths,
`system-path` (their /usr) and `etc` (their /etc and ours). What Debian's maintainer scripts would do at installation
stands in calve/demo/data/webserver: users, masks, links, the CA bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from calve.demo.farm import Farm
from calve.demo.imports import Importer, temporary
from calve.demo.index import Index
from calve.demo.packages import Packages
from calve.demo.paths import add_packages, one
from calve.demo.stage2 import HEALTH, UNIT, add_stage_2
from calve.demo.system import Boot, Flaw, System, add_toplevel, render, table
from calve.demo.www import add_www
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath

__all__ = ["build_webserver", "package_names"]

_BUNDLE = "ca-bundle.crt"


def build_webserver(
    store: LocalStore, packages: Packages, *, release: int, boot: Boot, flaw: Flaw | None = None
) -> StorePath:
    """Build a release of the web server into a store; return its toplevel, valid with its closure.

    It serves / and /healthz on port 80, on the address that the initrd has set.

    Args:
        store: where to.
        packages: where its packages come from.
        release: number of the release, in page, label and name.
        boot: its kernel and initrd.
        flaw: what is wrong with it.
    """
    importer = Importer(store)
    paths = add_packages(importer, packages, package_names(), omitted=_omitted())
    index = Index.beside(packages)
    stage_2 = None if boot.stage_2 is None else add_stage_2(importer, index, boot.stage_2)
    key = index.key(map(str, [*paths.values(), stage_2]))
    system = System(
        name="webserver",
        release=release,
        links={
            "etc": index.once(importer, f"etc {key}", lambda: _add_etc(importer, paths, stage_2)),
            "sw": index.once(importer, f"sw {key}", lambda: _add_system_path(importer, paths)),
            "www": add_www(importer, release, broken=flaw is Flaw.ERRORS),
        },
        references=(one(paths, "busybox-static"),),
        flaw=flaw,
    )
    init = render(
        "webserver/init.sh",
        busybox=one(paths, "busybox-static"),
        system=system.toplevel,
        label=system.label,
    )
    toplevel = add_toplevel(importer, system, init, boot)
    importer.flush()
    return toplevel


def package_names() -> list[str]:
    """Return the names of the packages that the web server is made of."""
    return [line[0] for line in table("webserver/packages.txt")]


def _omitted() -> set[str]:
    return {" ".join(words) for words in table("webserver/omitted.txt")}


def _add_system_path(importer: Importer, paths: Mapping[str, StorePath]) -> StorePath:
    with temporary(importer.store) as work:
        tree = work / "tree"
        _add_links(tree, "usr")
        references = _add_farm(importer.store, tree / "usr", paths, "usr")
        return importer.add(tree, "system-path", references)


def _add_etc(
    importer: Importer, paths: Mapping[str, StorePath], stage_2: StorePath | None
) -> StorePath:
    """Add /etc: our files, links and masks first, then what the packages have."""
    bundle = _add_bundle(importer, one(paths, "ca-certificates"))
    with temporary(importer.store) as work:
        tree = work / "etc"
        _copy(resources.files("calve.demo").joinpath("data", "webserver", "etc"), tree)
        _add_links(work, "etc")
        for (mask,) in table("webserver/masks.txt"):
            _link(tree / "systemd" / mask, "/dev/null")
        _link(tree / "ssl/certs/ca-certificates.crt", f"{bundle}/{_BUNDLE}")
        references = [*_add_farm(importer.store, tree, paths, "etc"), bundle]
        if stage_2 is not None:
            _enable(tree, stage_2)
            references.append(stage_2)
        return importer.add(tree, "etc-webserver", references)


def _enable(tree: Path, stage_2: StorePath) -> None:
    """Have stage 2 find out whether the system is healthy; see data/webserver/etc/systemd/system."""
    _link(tree / "calve/stage-2", str(stage_2))
    (tree / "calve/health.json").write_bytes(HEALTH.dump_file())
    _link(tree / f"systemd/system/multi-user.target.wants/{UNIT}", f"/etc/systemd/system/{UNIT}")


def _add_bundle(importer: Importer, certificates: StorePath) -> StorePath:
    """Add what update-ca-certificates makes: every certificate of Mozilla's in one file."""
    source = importer.store.real(certificates) / "usr/share/ca-certificates/mozilla"
    with temporary(importer.store) as work:
        (work / "tree").mkdir()
        with (work / "tree" / _BUNDLE).open("wb") as bundle:
            for file in sorted(source.glob("*.crt")):
                bundle.write(file.read_bytes().rstrip(b"\n") + b"\n")
        return importer.add(work / "tree", certificates.name.replace("ca-certificates", "cacert"))


def _add_farm(
    store: LocalStore, tree: Path, paths: Mapping[str, StorePath], part: str
) -> list[StorePath]:
    """Fill a farm; return the paths that it links to."""
    farm = Farm(tree)
    return [path for path in paths.values() if farm.add(store.real(path), path, part)]


def _add_links(root: Path, part: str) -> None:
    for place, target in table("webserver/links.txt"):
        if place.startswith(f"{part}/"):
            _link(root / place, target)


def _link(place: Path, target: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def _copy(source: Traversable, tree: Path) -> None:
    """Copy a tree of the wheel's data files."""
    tree.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy(entry, tree / entry.name)
        else:
            (tree / entry.name).write_bytes(entry.read_bytes())
