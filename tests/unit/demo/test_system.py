"""Systems in a store: the same build gives the same path, releases differ in little, everything is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from calve.demo import webserver as webserver_room
from calve.demo.imports import SELF, Importer, add_tree, modulo
from calve.demo.index import Index
from calve.demo.kernel import Kernel, kernel
from calve.demo.packages import Packages
from calve.demo.paths import DEPENDENCIES, add_packages, one
from calve.demo.system import Boot, System, add_toplevel, render, text
from calve.demo.tiny import build_tiny
from calve.demo.webserver import build_webserver, package_names
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix import nar
from calve.nix.hashes import Hash
from calve.nix.store import LocalStore
from calve.nix.storepath import fixed_output
from calve.progress import Note


@pytest.fixture
def store(tmp_path):
    with LocalStore(tmp_path / "root", create=True) as opened:
        yield opened


@pytest.fixture
def boot(tmp_path):
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"kernel" * 1000)
    return Boot(Kernel("6.1.0-1-cloud-amd64", image, tmp_path))


@pytest.fixture
def packages(make, apt, tmp_path, member):
    make("busybox-static", [(member("./bin/busybox", mode=0o755), b"busybox" * 100)], version="1:1")
    apt.publish()
    return Packages(tmp_path / "cache")


def tree_of(tmp_path, **files):
    tree = tmp_path / "some-tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for name, content in files.items():
        (tree / name).write_text(content)
    return tree


def scan(store, infos):
    """Return the references of each path as Nix finds them: by looking for digests."""
    digests = {info.path.digest: info.path for info in infos}
    pattern = re.compile("|".join(digests).encode())
    found = {}
    for info in infos:
        data = bytearray()
        nar.dump(store.real(info.path), data.extend)
        found[info.path] = tuple(
            sorted({digests[hit.decode()] for hit in pattern.findall(bytes(data))})
        )
    return found


def test_two_builds_give_the_same_path(packages, boot, tmp_path):
    tops = set()
    for name in ("one", "two"):
        with LocalStore(tmp_path / name, create=True) as store:
            tops.add(build_tiny(store, packages, release=1, boot=boot))
        (packages.cache_dir / "index.json").unlink()
    assert len(tops) == 1


def test_releases_differ_in_page_and_toplevel(store, packages, boot):
    first = build_tiny(store, packages, release=1, boot=boot)
    second = build_tiny(store, packages, release=2, boot=boot)
    one_set, two = ({info.path for info in store.closure([it])} for it in (first, second))
    assert {path.name for path in one_set - two} == {"nixos-system-tiny-1", "www-1"}
    assert {path.name for path in two - one_set} == {"nixos-system-tiny-2", "www-2"}
    assert len(one_set) == 5
    for number, top in ((1, first), (2, second)):
        www = store.real(top) / "www"
        for page in ("index.html", "healthz"):
            real = store.root / str(www.readlink()).lstrip("/") / page
            assert real.read_text() == f"calve demo release {number}\n"


def test_the_toplevel(store, packages, boot, tmp_path):
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(b"initrd")
    extension = {"initrdAbi": "1", "healthUnits": []}
    top = build_tiny(
        store,
        packages,
        release=7,
        boot=Boot(boot.kernel, initrd, ("console=ttyS0", "a=b"), extension),
    )
    real = store.real(top)
    links = {it.name: str(it.readlink()) for it in real.iterdir() if it.is_symlink()}
    assert sorted(links) == ["etc", "initrd", "kernel", "sw", "www"]
    for link in links.values():
        assert (store.root / link.lstrip("/")).exists()
    assert links["kernel"].endswith("-linux-6.1.0-1-cloud-amd64/vmlinuz")
    assert links["initrd"].endswith("/initrd")
    assert (real / "kernel-params").read_text() == "console=ttyS0 a=b"
    assert (real / "nixos-version").read_text() == "calve demo release 7"
    assert json.loads((real / "boot.json").read_text()) == {
        "org.nixos.bootspec.v1": {
            "system": "x86_64-linux",
            "init": f"{top}/init",
            "kernel": links["kernel"],
            "initrd": links["initrd"],
            "kernelParams": ["console=ttyS0", "a=b"],
            "label": "calve demo release 7",
            "toplevel": str(top),
        },
        "org.nixos.specialisation.v1": {},
        "org.calve.v1": extension,
    }


def test_init_starts_by_itself(store, packages, boot):
    top = build_tiny(store, packages, release=1, boot=boot)
    init = store.real(top) / "init"
    assert init.stat().st_mode & 0o111
    shebang, *rest = init.read_text().splitlines()
    program, _, argument = shebang.removeprefix("#!").partition(" ")
    assert argument == "sh"
    assert (store.root / program.lstrip("/")).stat().st_mode & 0o111
    assert f"system={top}" in rest


def test_without_initrd_and_extension(store, packages, boot):
    top = build_tiny(store, packages, release=1, boot=boot)
    document = json.loads((store.real(top) / "boot.json").read_text())
    assert sorted(document) == ["org.nixos.bootspec.v1", "org.nixos.specialisation.v1"]
    assert "initrd" not in document["org.nixos.bootspec.v1"]
    assert not (store.real(top) / "initrd").is_symlink()


def test_references_are_what_the_content_names(store, packages, boot):
    infos = store.closure([build_tiny(store, packages, release=1, boot=boot)])
    assert scan(store, infos) == {info.path: info.references for info in infos}


def test_hashes_hold_for_self_references_too(store, packages, boot):
    for info in store.closure([build_tiny(store, packages, release=1, boot=boot)]):
        data = bytearray()
        assert nar.dump(store.real(info.path), data.extend) == info.nar_size
        assert Hash.sha256(bytes(data)) == info.nar_hash
        content = modulo(bytes(data), info.path.digest.encode())
        assert info.ca == f"fixed:r:{content.nix32}"
        others = [it for it in info.references if it != info.path]
        assert info.path == fixed_output(
            info.path.name, content, others, self_reference=len(others) < len(info.references)
        )


def test_modulo_hashes_zeros_and_offsets():
    digest = b"d" * 32
    data = b"ab" + digest + b"c" + digest
    want = hashlib.sha256(b"ab" + bytes(32) + b"c" + bytes(32) + b"|2|35").digest()
    assert modulo(data, digest).digest == want
    assert modulo(b"abc", digest) == Hash.sha256(b"abc")
    assert len(SELF) == 32


def test_a_tree_that_does_not_refer_to_itself(store, tmp_path):
    with pytest.raises(UsageError, match="does not refer to itself"):
        Importer(store).add(tree_of(tmp_path, a="1"), "x", self_reference=True)


def test_a_tree_too_large_to_refer_to_itself(store, tmp_path):
    tree = tree_of(tmp_path, a=SELF, b="x" * (1 << 20))
    with pytest.raises(UsageError, match="keep such trees small"):
        Importer(store).add(tree, "x", self_reference=True)


def test_add_tree_is_valid_at_once_and_leaves_nothing(store, tmp_path):
    tree = tree_of(tmp_path, a="1")
    path = add_tree(store, tree, "x")
    assert store.contains(path)
    assert add_tree(store, tree, "x") == path
    assert add_tree(store, tree, "x", [path]) != path
    assert [it.name for it in tmp_path.iterdir() if "nar" in it.name] == []


def test_packages_become_paths_once(store, make, apt, tmp_path, monkeypatch):
    make("libc6", [("./lib/c.so", "c")], Depends="libgcc-s1")
    make("libgcc-s1", [("./lib/gcc.so", "g")], Depends="libc6, gcc-base")
    make("gcc-base")
    make("tool", [("./bin/tool", "t")], Depends="libc6")
    apt.publish()
    names = ["tool", "libc6", "gcc-base", "libgcc-s1"]
    found = add_packages(Importer(store), Packages(tmp_path / "cache"), names)
    assert list(found) == ["gcc-base", "libc6", "tool"]
    assert store.path_info(found["tool"]).references == (found["libc6"],)
    assert store.path_info(found["libc6"]).references == (found["gcc-base"],)
    assert (store.real(found["libc6"]) / "usr/lib/gcc.so").read_text() == "g"
    assert (store.real(found["tool"]) / DEPENDENCIES).read_text() == f"{found['libc6']}\n"
    monkeypatch.setattr("calve.demo.paths.Unpacker", None)  # nothing is unpacked again
    assert add_packages(Importer(store), Packages(tmp_path / "cache"), names) == found
    assert one(found, "tool") == found["tool"]
    with pytest.raises(NotFoundError, match="package other"):
        one(found, "other")


def test_what_is_left_out_by_mistake_is_noted(store, make, apt, tmp_path):
    make("tool", [("./bin/tool", "t")], Depends="lib1, debconf | debconf-2.0")
    apt.publish()
    told = []
    packages = Packages(tmp_path / "cache", told.append)
    add_packages(Importer(store), packages, ["tool"], omitted={"debconf | debconf-2.0"})
    notes = [it.text for it in told if isinstance(it, Note)]
    assert notes == ["tool depends on lib1, which is left out"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": "no path"}', '{"a": 1}', "\xff"])
def test_a_damaged_index_is_an_empty_one(content, store, packages, boot):
    top = build_tiny(store, packages, release=1, boot=boot)
    (packages.cache_dir / "index.json").write_text(content, encoding="latin-1")
    assert build_tiny(store, packages, release=1, boot=boot) == top


def test_the_index_is_no_proof(packages, boot, tmp_path):
    with LocalStore(tmp_path / "one", create=True) as store:
        top = build_tiny(store, packages, release=1, boot=boot)
    with LocalStore(tmp_path / "two", create=True) as store:
        assert build_tiny(store, packages, release=1, boot=boot) == top
        assert len(store.closure([top])) == 5


def test_keys_tell_inputs_apart(tmp_path):
    index = Index(tmp_path / "index.json")
    assert len({index.key(parts) for parts in (["a", "b"], ["ab"], ["a"], ["b", "a"], [])}) == 5


def test_templates_are_filled_completely():
    assert "@" not in render("tiny/inittab", busybox="/b")
    with pytest.raises(UsageError, match="busybox"):
        render("tiny/inittab")
    with pytest.raises(UsageError, match="more"):
        render("tiny/inittab", busybox="/b", more=1)


def test_a_kernel_is_unpacked_once(make, apt, tmp_path):
    version = "6.1.0-9-cloud-amd64"
    make("linux-image-cloud-amd64", Depends=f"linux-image-{version} (= 6.1)")
    make(
        f"linux-image-{version}",
        [
            (f"./boot/vmlinuz-{version}", "image"),
            (f"./boot/System.map-{version}", "map"),
            (f"./lib/modules/{version}/kernel/a.ko", "module"),
        ],
    )
    apt.publish()
    found = kernel(Packages(tmp_path / "cache"), tmp_path / "out")
    assert found.version == version
    assert found.image.read_text() == "image"
    assert (found.modules / "kernel/a.ko").read_text() == "module"
    stamp = found.image.stat().st_mtime_ns
    assert kernel(Packages(tmp_path / "cache"), tmp_path / "out") == found
    assert found.image.stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("depends", ["", "linux-image-amd64"])
def test_a_meta_package_without_kernel(depends, make, apt, tmp_path):
    make("linux-image-cloud-amd64", Depends=depends)
    apt.publish()
    with pytest.raises(DamagedError, match="no kernel image"):
        kernel(Packages(tmp_path / "cache"), tmp_path / "out")


def test_a_kernel_package_without_kernel(make, apt, tmp_path):
    make("linux-image-cloud-amd64", Depends="linux-image-6.1-cloud-amd64")
    make("linux-image-6.1-cloud-amd64", [("./boot/config", "")])
    apt.publish()
    with pytest.raises(DamagedError, match="no kernel 6"):
        kernel(Packages(tmp_path / "cache"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def small_webserver(make, apt, tmp_path, member, monkeypatch):
    """Stand-ins of the packages that the web server's own texts name."""
    make("busybox-static", [(member("./bin/busybox", mode=0o755), b"busybox")])
    make("libc6", [("./lib/x86_64-linux-gnu/libc.so.6", "c")])
    make("nginx", [("./usr/sbin/nginx", "n"), ("./etc/nginx/mime.types", "m")], Depends="libc6")
    make(
        "ca-certificates",
        [
            (f"./usr/share/ca-certificates/mozilla/{name}.crt", f"-- {name} --")
            for name in ("B", "A")
        ],
    )
    make("systemd", [("./etc/systemd/system.conf", "theirs"), ("./lib/systemd/systemd", "s")])
    apt.publish()
    monkeypatch.setattr(webserver_room, "package_names", lambda: list(make.fields))
    return Packages(tmp_path / "cache")


def test_the_web_server(store, small_webserver, boot):
    first = build_webserver(store, small_webserver, release=1, boot=boot)
    infos = store.closure([first])
    assert scan(store, infos) == {info.path: info.references for info in infos}
    named = {info.path.name: store.real(info.path) for info in infos}
    sw, etc = named["system-path"], named["etc-webserver"]
    assert str((sw / "usr/sbin/nginx").readlink()).endswith("-nginx-1.0-1/usr/sbin/nginx")
    assert str((sw / "usr/bin/vi").readlink()) == "vim.tiny"
    assert (etc / "systemd/system.conf").read_text() == text("webserver/etc/systemd/system.conf")
    assert str((etc / "systemd/system/getty.target").readlink()) == "/dev/null"
    bundle = store.root / str((etc / "ssl/certs/ca-certificates.crt").readlink()).lstrip("/")
    assert bundle.read_text() == "-- A --\n-- B --\n"


def test_releases_of_the_web_server(store, small_webserver, boot):
    first = build_webserver(store, small_webserver, release=1, boot=boot)
    second = build_webserver(store, small_webserver, release=2, boot=boot)
    one_set, two = ({info.path for info in store.closure([it])} for it in (first, second))
    assert {path.name for path in two - one_set} == {"nixos-system-webserver-2", "www-2"}
    assert len(one_set) == len(two)


def test_the_packages_are_listed_once_and_sorted():
    names = package_names()
    assert names == sorted(set(names))
    assert {"systemd", "nginx", "busybox-static", "dash", "libc-bin"} <= set(names)
    assert not {"udev", "dbus", "systemd-sysv"} & set(names)


def test_users_have_groups_and_no_passwords():
    rows = {
        name: [line.split(":") for line in text(f"webserver/etc/{name}").splitlines()]
        for name in ("passwd", "group", "shadow")
    }
    groups = {row[2] for row in rows["group"]}
    assert all(row[3] in groups for row in rows["passwd"])
    assert [row[0] for row in rows["shadow"]] == [row[0] for row in rows["passwd"]]
    assert {row[1] for row in rows["shadow"]} == {"*"}
    assert len({row[2] for row in rows["passwd"]}) == len(rows["passwd"])


def test_a_toplevel_lands_with_its_kernel_only_when_flushed(store, boot):
    importer = Importer(store)
    system = System("x", 1)
    top = add_toplevel(importer, system, f"#!/x\n{system.toplevel}\n", boot)
    assert not store.contains(top)
    importer.flush()
    assert [info.path.name for info in store.closure([top])] == [
        "linux-6.1.0-1-cloud-amd64",
        "nixos-system-x-1",
    ]


def test_nothing_temporary_stays(store, packages, boot):
    build_tiny(store, packages, release=1, boot=boot)
    assert sorted(it.name for it in store.root.iterdir()) == ["nix"]
    assert [it for it in Path(packages.cache_dir).iterdir() if it.name.startswith(".")] == []
