"""The tiny system: a static busybox as init and web server, in five store paths."""

from __future__ import annotations

from calve.demo.imports import Importer, temporary
from calve.demo.packages import Packages
from calve.demo.paths import add_packages, one
from calve.demo.system import Boot, Flaw, System, add_toplevel, render, text
from calve.demo.www import add_www
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath

__all__ = ["build_tiny"]

_BUSYBOX = "busybox-static"


def build_tiny(
    store: LocalStore, packages: Packages, *, release: int, boot: Boot, flaw: Flaw | None = None
) -> StorePath:
    """Build a release of the tiny system into a store; return its toplevel, valid with its closure.

    It serves / and /healthz on port 80, on the address that the initrd has set.

    Args:
        store: where to.
        packages: where busybox comes from.
        release: number of the release, in page, label and name.
        boot: its kernel and initrd.
        flaw: what is wrong with it; this one has no way to answer 500.
    """
    importer = Importer(store)
    busybox = one(add_packages(importer, packages, [_BUSYBOX]), _BUSYBOX)
    with temporary(store) as work:
        tree = work / "tree"
        tree.mkdir()
        (tree / "inittab").write_text(render("tiny/inittab", busybox=busybox), encoding="utf-8")
        (tree / "httpd.conf").write_text(text("tiny/httpd.conf"), encoding="utf-8")
        etc = importer.add(tree, "etc-tiny", [busybox])
    system = System(
        name="tiny",
        release=release,
        links={"etc": etc, "sw": busybox, "www": add_www(importer, release)},
        flaw=flaw,
    )
    init = render(
        "tiny/init.sh",
        busybox=busybox,
        system=system.toplevel,
        label=system.label,
    )
    toplevel = add_toplevel(importer, system, init, boot)
    importer.flush()
    return toplevel
