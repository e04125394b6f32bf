"""The initrd: what is in it, the same bytes every time, and an init that a shell can read."""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from calve.boot.policy import Policy
from calve.contract import evidence
from calve.contract.codes import Code
from calve.disk import initrd, payload
from calve.errors import NotFoundError, UsageError

POLICY = Policy(("k-1:AAAA",)).dump()
DATA = importlib.resources.files("calve.disk") / "data"


@pytest.fixture(scope="module")
def agent():
    return payload.build()


@pytest.fixture
def parts(tmp_path, agent):
    tree = tmp_path / "modules/6.1"
    tree.mkdir(parents=True)
    for name in initrd.REQUIRED:
        (tree / f"{name}.ko").write_bytes(b"\0depends=\0" + name.encode())
    (tree / "ext4.ko").write_bytes(b"\0depends=mbcache\0")
    (tree / "mbcache.ko").write_bytes(b"\0depends=\0")
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"busybox")
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("certificates")
    return initrd.Initrd(busybox, tree, agent, POLICY, ca_file)


def unpacked(path):
    """Return entries by name: mode, device, content."""
    data = subprocess.check_output(["zstd", "-dcq", path]) if shutil.which("zstd") else None
    if data is None:
        pytest.skip("zstd is not installed")
    found = {}
    at = 0
    while True:
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, rdev, name_size = fields[1], fields[6], tuple(fields[9:11]), fields[11]
        name = data[at + 110 : at + 109 + name_size].decode()
        at = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found, len(data)
        found[name] = mode, rdev, data[at : at + size]
        at = (at + size + 3) // 4 * 4


def test_what_is_in_it(parts, tmp_path):
    written = initrd.write(parts, tmp_path / "out/initrd", level=1)
    found, size = unpacked(written.path)
    assert written.unpacked_bytes == size
    assert written.compressed_bytes == written.path.stat().st_size
    # The kernel opens /dev/console before there is a devtmpfs.
    assert found["dev/console"][:2] == (stat.S_IFCHR | 0o600, (5, 1))
    assert found["dev/null"][:2] == (stat.S_IFCHR | 0o600, (1, 3))
    assert found["init"][0] == stat.S_IFREG | 0o755
    for applet in initrd.APPLETS:
        assert found[f"bin/{applet}"] == (stat.S_IFLNK | 0o777, (0, 0), b"busybox")
    listed = found["etc/modules"][2].decode().split()
    assert listed.index("mbcache.ko") < listed.index("ext4.ko")
    assert {f"modules/{name}" for name in listed} == {n for n in found if n.startswith("modules/")}
    mode, _, policy = found["etc/calve/agent.json"]
    assert (mode & 0o777, policy) == (0o600, POLICY)
    assert found["etc/calve/ca.pem"][2] == b"certificates"
    assert b"dns" in found["etc/nsswitch.conf"][2]
    for name in ("proc", "sys", "run", "sysroot", "tmp"):
        assert stat.S_ISDIR(found[name][0])
    assert "calve/bin/python3" in found
    for _, place in parts.agent.libraries:
        assert place in found


def test_the_same_inputs_give_the_same_bytes(parts, tmp_path):
    one = initrd.write(parts, tmp_path / "one", level=1)
    two = initrd.write(parts, tmp_path / "two", level=1)
    assert one.path.read_bytes() == two.path.read_bytes()
    assert sorted(place.name for place in tmp_path.iterdir()) == [
        "busybox", "ca.pem", "modules", "one", "two",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["busybox", "kernel_modules", "ca_file"])
def test_a_part_that_is_not_there(parts, tmp_path, part):
    place = getattr(parts, part)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UsageError) as caught:
        initrd.write(parts, tmp_path / "out", level=1)
    assert caught.value.place == str(place)
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_not_there(parts, tmp_path):
    (parts.kernel_modules / "virtio_net.ko").unlink()
    (tmp_path / "out").write_bytes(b"older")
    with pytest.raises(NotFoundError, match="virtio_net"):
        initrd.write(parts, tmp_path / "out", level=1)
    assert (tmp_path / "out").read_bytes() == b"older"


@pytest.mark.parametrize("name", ["init", "udhcpc"])
def test_scripts_are_of_busybox_s_shell(name):
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    text = (DATA / name).read_text()
    assert text.startswith("#!/bin/busybox sh\n")
    subprocess.run([busybox, "sh", "-n"], input=text.encode(), check=True)


def test_scripts_call_no_applet_that_is_not_linked():
    known = {
        *initrd.APPLETS,
        *("set", "exec", "read", "export", "break", "exit", "while", "do", "done", "for", "if"),
        *("then", "fi", "case", "esac", "phase", "fail", "[", ":", "else", "umount", "kill"),
    }
    lines = (DATA / "init").read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#"))
    called = set(re.findall(r"(?:^|; |&& |\|\| |\$\()\s*([a-z_]+)(?= )", text, re.MULTILINE))
    assert called <= known, called - known


def test_init_s_own_evidence_is_evidence(tmp_path):
    """Its two functions, run by a real shell, say lines that the reader takes."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    lines = (DATA / "init").read_text().splitlines()
    functions = [line for line in lines if line.startswith(("phase() {", "fail() {"))]
    assert len(functions) == 2
    calls = set(re.findall(r'fail ([a-z-]+) "', "\n".join(lines)))
    assert calls
    assert calls <= set(Code)
    script = "sleep() { :; }\npoweroff() { :; }\n" + "\n".join(functions)
    script += '\nphase network\nfail disk-fault "the root disk /dev/vda did not appear"\n'
    out = subprocess.check_output([busybox, "sh", "-c", script], text=True)
    first, second = evidence.read(out)
    assert (first.kind, first.fields["n"]) == ("phase", "network")
    assert (second.kind, second.fields["code"]) == ("fail", "disk-fault")
    assert json.loads(out.splitlines()[1].removeprefix(evidence.PREFIX))["v"] == evidence.VERSION


def test_the_agent_is_started_as_its_payload_lies(agent):
    text = (DATA / "init").read_text()
    assert f"/{payload.PREFIX}/bin/python3 -I -S -B -m calve.boot.main" in text
    assert Path("/etc/calve/agent.json").as_posix() in text
