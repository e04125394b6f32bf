"""The initrd with systemd, out of a root of straw: what is in it, where its units hang, and its shell steps."""

from __future__ import annotations

import importlib.resources
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from calve.boot.policy import Policy
from calve.contract import evidence
from calve.contract.codes import Code
from calve.disk import cpio, elf, initrd, initrd_systemd, payload
from calve.disk.initrd_systemd import SystemdInitrd
from calve.errors import NotFoundError, UsageError

ROOT = Path(__file__).parents[3]
DATA = importlib.resources.files("calve.disk") / "data"
STEPS = (DATA / "systemd/steps").read_text()
POLICY = Policy(("k-1:AAAA",)).dump()
OURS = "etc/systemd/system"
needs_busybox = pytest.mark.skipif(shutil.which("busybox") is None, reason="no busybox")


@pytest.fixture(scope="module")
def agent():
    return payload.build()


@pytest.fixture
def parts(tmp_path, agent):
    tree = tmp_path / "modules/6.1"
    tree.mkdir(parents=True)
    for name in initrd.REQUIRED:
        (tree / f"{name}.ko").write_bytes(b"\0depends=\0" + name.encode())
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("certificates")
    return SystemdInitrd(straw(tmp_path / "root"), tree, agent, POLICY, ca_file)


def straw(root):
    """Make a root whose programs are no ELF files, and need no library."""
    names = [
        *initrd_systemd.PROGRAMS,
        *(f"usr/lib/systemd/system/{name}" for name in initrd_systemd.UNITS),
        *(f"usr/lib/udev/rules.d/{name}.rules" for name in initrd_systemd.RULES),
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"straw: {name}\n")
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    return root


def listed(spec):
    """Return the entries by path, as the archive has them: the last of a name."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {entry.path: entry for entry in spec.entries(Path(scratch))}
        return {path: (entry.mode, content(entry)) for path, entry in found.items()}


def content(entry):
    return entry.content if isinstance(entry.content, bytes) else entry.content.read_bytes()


def text(found, path):
    return found[path][1].decode()


def test_what_is_in_it(parts):
    found = listed(parts)
    assert text(found, "init") == "usr/lib/systemd/systemd"
    for path in initrd_systemd.PROGRAMS:
        assert found[path] == (stat.S_IFREG | 0o755, f"straw: {path}\n".encode())
    for applet in initrd_systemd.APPLETS:
        assert found[f"usr/bin/{applet}"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert "etc/initrd-release" in found  # else systemd takes it for the machine itself
    assert {f"{name}.ko" for name in initrd.REQUIRED} == set(text(found, "etc/modules").split())
    assert (found["etc/calve/agent.json"][0] & 0o777, found["etc/calve/agent.json"][1]) == (
        0o600,
        POLICY,
    )
    assert found["etc/calve/ca.pem"][1] == b"certificates"
    assert "169.254.169.253" in text(found, "etc/resolv.conf")
    assert "calve/bin/python3" in found


def test_nothing_is_below_a_link(parts):
    """The kernel unpacks in order, and a file below a link that leads nowhere yet is lost."""
    found = listed(parts)
    links = {path for path, (mode, _) in found.items() if stat.S_ISLNK(mode)}
    assert {"bin", "lib", "lib64", "sbin"} <= links
    assert not [path for path in found for up in Path(path).parents if str(up) in links]


def test_every_link_of_a_unit_leads_to_one(parts):
    found = listed(parts)
    links = [path for path in found if re.search(r"\.(wants|requires)/", path)]
    assert len(links) > len(initrd_systemd.WANTS)
    for path in links:
        target = text(found, path)
        place = target if target.startswith("/") else f"/{Path(path).parent}/{target}"
        resolved = Path(re.sub(r"/[^/]+/\.\./", "/", place)).as_posix().lstrip("/")
        assert resolved in found, path


def test_units_stand_where_nixos_has_them(parts):
    found = listed(parts)
    for name in ("initrd.target", "initrd-find-nixos-closure.service"):
        assert f"{OURS}/{name}.requires/calve-agent.service" in found
    assert f"{OURS}/initrd.target.requires/initrd-find-nixos-closure.service" in found
    assert f"{OURS}/emergency.target.wants/calve-emergency.service" in found
    assert f"{OURS}/sysinit.target.wants/systemd-modules-load.service" in found
    assert text(found, f"{OURS}/calve-agent.service") == (DATA / "calve-agent.service").read_text()
    finder = text(found, f"{OURS}/initrd-find-nixos-closure.service")
    assert "RequiresMountsFor=/sysroot/nix/store\nBefore=initrd.target" in finder
    switch = text(found, f"{OURS}/initrd-switch-root.service.d/switch-root.conf")
    assert 'ExecStart=\nExecStart=systemctl --no-block switch-root /sysroot "${NEW_INIT}"' in switch


def test_the_network_is_nixos_s(parts):
    nix = (ROOT / "nixos/modules/network.nix").read_text()
    ours = text(listed(parts), "etc/systemd/network/10-calve.network").splitlines()
    settings = re.findall(
        r"^\s*(?:linkConfig\.)?(\w+) = (?:\"(.*)\"|(false|true));", nix, re.MULTILINE
    )
    assert len(settings) == 7
    for key, value, flag in settings:
        assert f"{key}={value or {'false': 'no', 'true': 'yes'}[flag]}" in ours


def test_the_emergency_is_nixos_s():
    nix = (ROOT / "nixos/modules/agent.nix").read_text()
    for pair in re.findall(r'code=([a-z-]+) message="([^"]+)"', nix):
        assert 'fail {} "{}"'.format(*pair) in STEPS
    unit = (DATA / "systemd/calve-emergency.service").read_text()
    assert "SuccessAction=poweroff-force\nFailureAction=poweroff-force" in unit


def test_users_that_units_and_rules_name_are_there(parts):
    found = listed(parts)
    assert re.search(r"^systemd-network:x:\d+:\d+:", text(found, "etc/passwd"), re.MULTILINE)
    groups = {line.split(":")[0] for line in text(found, "etc/group").splitlines()}
    assert {"root", "tty", "disk", "systemd-network"} <= groups


def test_the_same_inputs_give_the_same_bytes(parts, tmp_path, agent):
    one = initrd.write(parts, tmp_path / "one", level=1)
    elsewhere = SystemdInitrd(
        straw(tmp_path / "other/root"), parts.kernel_modules, agent, POLICY, parts.ca_file
    )
    two = initrd.write(elsewhere, tmp_path / "two", level=1)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.unpacked_bytes == two.unpacked_bytes > one.compressed_bytes


@pytest.mark.parametrize("part", ["root", "kernel_modules", "ca_file"])
def test_a_part_that_is_not_there(parts, tmp_path, part):
    place = getattr(parts, part)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UsageError) as caught:
        initrd.write(parts, tmp_path / "out", level=1)
    assert caught.value.place == str(place)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "usr/bin/busybox",
        "usr/lib/systemd/systemd-networkd",
        "usr/lib/systemd/system/initrd.target",
        "usr/lib/udev/rules.d/99-systemd.rules",
    ],
)
def test_what_the_root_lacks_is_named(parts, tmp_path, name):
    (parts.root / name).unlink()
    with pytest.raises(NotFoundError, match=name) as caught:
        initrd.write(parts, tmp_path / "out", level=1)
    assert caught.value.place == str(parts.root)
    assert not (tmp_path / "out").exists()


def test_a_link_of_the_root_stays_one(parts):
    (parts.root / "usr/lib/systemd/systemd-udevd").unlink()
    (parts.root / "usr/lib/systemd/systemd-udevd").symlink_to("/usr/bin/udevadm")
    found = listed(parts)
    assert found["usr/lib/systemd/systemd-udevd"] == (stat.S_IFLNK | 0o777, b"/usr/bin/udevadm")
    assert found["usr/bin/udevadm"][0] == stat.S_IFREG | 0o755


def test_what_a_later_systemd_needs_is_taken_where_it_is(parts):
    (name,) = initrd_systemd.NEWER_PROGRAMS
    assert name not in listed(parts)
    (parts.root / name).write_text("straw")
    assert name in listed(parts)


def test_libraries_are_the_root_s_for_the_agent_too(parts, agent):
    """There is one libc: the root's, with the programs that need it."""
    libraries = elf.closure([Path(sys.executable).resolve()])
    (parts.root / "etc").mkdir()
    folders = sorted({str(library.parent) for library in libraries})
    (parts.root / "etc/ld.so.conf").write_text("\n".join(folders))
    for library in libraries:
        place = parts.root / str(library).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library.resolve(), place)
        with place.open("ab") as file:
            file.write(b"the root's")
    shutil.copyfile(Path(sys.executable).resolve(), parts.root / "usr/bin/udevadm")
    first, *others = [
        place
        for _, place in agent.libraries
        if place.startswith(("lib/", "usr/")) and Path(f"/{place}") not in libraries
    ]
    (parts.root / first).parent.mkdir(parents=True, exist_ok=True)
    (parts.root / first).write_text("the root's, and only the agent needs it")
    found = listed(parts)
    libc = [path for path in found if path.endswith("/libc.so.6")]
    assert len(libc) == 1
    assert libc[0].startswith("usr/lib/")
    assert found[libc[0]][1].endswith(b"the root's")
    assert text(found, below_usr(first)).startswith("the root's")
    assert others
    for place in others:  # the root has none: it is the agent's own
        assert found[below_usr(place)][1] == Path(f"/{place}").read_bytes()


def below_usr(place):
    return f"usr/{place.removeprefix('usr/')}"


# The steps


@needs_busybox
def test_the_steps_are_of_busybox_s_shell():
    assert STEPS.startswith("#!/bin/busybox sh\n")
    subprocess.run(["busybox", "sh", "-n"], input=STEPS.encode(), check=True)


def test_every_step_that_a_unit_takes_is_one():
    taken = set()
    for file in (DATA / "systemd").iterdir():
        taken |= set(
            re.findall(
                r"^ExecStart\w*=/bin/sh /etc/calve/steps (\w+)$", file.read_text(), re.MULTILINE
            )
        )
    assert taken == set(re.findall(r"^  (\w+)\)$", STEPS, re.MULTILINE))


@pytest.fixture
def step(tmp_path):
    """Run a step of a machine that is a directory; return what it said, and how it ended."""
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "sysroot").mkdir()
    (tmp_path / "proc/uptime").write_text("7.25 1.00\n")
    (tmp_path / "proc/mounts").write_text("rootfs / rootfs rw 0 0\n")

    def run(name, line=""):
        (tmp_path / "proc/cmdline").write_text(f"{line}\n")
        script = re.sub(
            r"(?<=[\s\"<>])/(?=proc/|sysroot|etc/|nixos-closure)", f"{tmp_path}/", STEPS
        )
        script = script.replace("export PATH=/bin\n", 'sleep() { echo "held $1"; }\n')
        command = ["busybox", "sh", "-s", name]
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout, done.returncode

    return run


@needs_busybox
def test_the_phase_before_the_agent_is_evidence(step):
    (event,) = evidence.read(step("agent")[0])
    assert (event.kind, event.at_s, event.fields) == ("phase", 7.25, {"n": "agent"})


@needs_busybox
def test_the_emergency_says_why_and_holds(step, tmp_path):
    said, status = step("emergency", "quiet calve.hold=3")
    assert status == 0
    (event,) = evidence.read(said)
    assert (event.kind, event.fields["code"]) == ("fail", Code.DISK_FAULT)
    assert said.endswith("held 3\n")
    (tmp_path / "proc/mounts").write_text(f"/dev/vda {tmp_path}/sysroot ext4 rw 0 0\n")
    said, _ = step("emergency")
    assert next(evidence.read(said)).fields["code"] == Code.INTERNAL
    assert said.endswith("held 60\n")


@needs_busybox
def test_the_system_is_found_by_its_links_inside_the_root_disk(step, tmp_path):
    root = tmp_path / "sysroot"
    system = root / "nix/store/abc-system"
    profiles = root / "nix/var/nix/profiles"
    system.mkdir(parents=True)
    profiles.mkdir(parents=True)
    (system / "init").write_text("#!/bin/sh\n")
    (profiles / "system-2-link").symlink_to("/nix/store/abc-system")
    up = "../" * (len(profiles.parts) + 1)  # the root disk's own root is the highest there is
    (profiles / "system").symlink_to(f"{up}nix/var/nix/profiles/./system-2-link")
    init = "/nix/var/nix/profiles/system/init"
    assert step("find", f"init=/bin/other quiet init={init}") == ("", 0)
    assert (tmp_path / "nixos-closure").readlink() == Path("/nix/store/abc-system")
    assert (tmp_path / "etc/switch-root.conf").read_text() == f"NEW_INIT={init}\n"


@needs_busybox
@pytest.mark.parametrize("line", ["", "init=", "init=/nix/none/init", "init=/circle/init"])
def test_no_system_is_an_error(step, tmp_path, line):
    (tmp_path / "sysroot/circle").symlink_to("/circle")
    said, status = step("find", line)
    assert status == 1
    assert said.startswith("no init=")
    assert not (tmp_path / "nixos-closure").is_symlink()


def test_its_archive_unpacks_as_it_is_listed(parts):
    """Every parent is there before what is in it."""
    with tempfile.TemporaryDirectory() as scratch:
        data = b"".join(cpio.archive(parts.entries(Path(scratch))))
    names = [name.decode() for name in re.findall(rb"070701[0-9A-F]{104}([^\0]+)\0", data)]
    seen = set()
    for name in names[:-1]:
        parent = Path(name).parent.as_posix()
        assert parent == "." or parent in seen
        seen.add(name)
    assert "usr/lib/systemd/systemd" in seen
