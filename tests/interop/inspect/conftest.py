"""Disks made by the field's own tools: sfdisk, mkfs.vfat and mtools, mkfs.erofs, mke2fs, veritysetup, objcopy."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from calve.disk.inspect.findings import Findings
from calve.disk.inspect.report import Expected
from calve.errors import DamagedError
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
OS_RELEASE = '# comment\nID=nixos\nPRETTY_NAME="NixOS 26.11 (Yarara)"\nVERSION_ID="26.11"\n'
MIB = 1 << 20


@dataclass
class Memory:
    """A source that can be damaged, and counts what is read of it."""

    data: bytearray
    reads: int = 0

    @property
    def size(self):
        return len(self.data)

    def read(self, at, count):
        self.reads += 1
        if at < 0 or count < 0 or at + count > len(self.data):
            raise DamagedError(f"{count} bytes at {at} are outside")
        return bytes(self.data[at : at + count])


def _run(*argv, **options):
    env = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"}
    done = subprocess.run([str(arg) for arg in argv], capture_output=True, env=env, **options)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout


def store_path(letter, name):
    return StorePath(letter * 32, name)


def fill(store):
    """Fill a store with every kind of node, and sizes around the borders of blocks."""
    rng = random.Random(1)
    hello = store / store_path("a", "hello-2.12").basename
    (hello / "bin").mkdir(parents=True)
    (hello / "bin/hello").write_bytes(rng.randbytes(700_001))
    (hello / "bin/hello").chmod(0o555)
    for size in (0, 1, 60, 4000, 4095, 4096, 4097, 8192, 12_288, 100_000):
        (hello / f"size-{size}").write_bytes(rng.randbytes(size))
    (hello / "zeros").write_bytes(b"x" + bytes(200_000) + b"y")
    with (hello / "sparse").open("wb") as sparse:  # more extents than fit into an inode
        for number in range(40):
            sparse.seek(number * 16384)
            sparse.write(rng.randbytes(4096))
        sparse.truncate(40 * 16384)
    (hello / "empty").mkdir()
    (hello / "short").symlink_to("bin/hello")
    (hello / "long").symlink_to("/nix/store/" + "x" * 150)
    (hello / "-first").write_text("before the dots")
    (hello / os.fsdecode(b"\xff\xfe latin")).write_text("not UTF-8")
    many = hello / "many"
    many.mkdir()
    for number in range(700):
        (many / f"{'n' * (number % 40)}{number}").write_text(f"{number}")
    os.link(many / "0", hello / "zero again")
    alone = store / store_path("b", "script.sh").basename
    alone.write_text("#!/bin/sh\n")
    alone.chmod(0o755)
    (store / store_path("c", "link").basename).symlink_to(hello.name)
    return hello


@dataclass
class Disk:
    """A disk image, and what is expected of it."""

    path: Path
    expected: Expected
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: start, size

    def memory(self):
        return Memory(bytearray(self.path.read_bytes()))


@dataclass
class Verity:
    image: Path
    root_hash: bytes


@dataclass
class Tools:
    """Makes images below a directory."""

    ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
    ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
    VERITY = "2C7357ED-EBD2-46D9-AEC1-23D437EC2BF5"
    CMDLINE = "init=/nix/var/nix/profiles/system/init console=ttyS0"

    base: Path
    root: Path
    closure: dict[StorePath, Hash]

    @staticmethod
    def run(*argv, **options):
        return _run(*argv, **options)

    @staticmethod
    def nix_hash(path):
        return _nix_hash(path)

    @staticmethod
    def memory(data):
        return Memory(bytearray(data))

    def verity(self, data, *options):
        """Make the tree of a file with veritysetup."""
        image = self.base / f"verity{len(list(self.base.iterdir()))}"
        text = _run("veritysetup", "format", *options, data, image).decode()
        match = re.search(r"Root hash:\s+([0-9a-f]+)", text)
        return Verity(image, bytes.fromhex(match[1]))

    def erofs(self, *options):
        image = self.base / f"erofs{abs(hash(options))}"
        if not image.exists():
            _run("mkfs.erofs", "--quiet", "-T1", "-x-1", *options, image, self.root)
        return image

    def ext4(self, *options, size=24 * MIB):
        image = self.base / f"ext4{abs(hash(options))}"
        if not image.exists():
            _run("mke2fs", "-q", "-t", "ext4", "-d", self.root, *options, image, f"{size >> 10}k")
        return image

    def program(self, cmdline=CMDLINE, *, kernel=None, names=(), addresses=None):
        """Put sections behind systemd's stub, as its documentation does it with objcopy."""
        contents = {
            ".osrel": OS_RELEASE.encode(),
            ".cmdline": cmdline.encode(),
            ".uname": b"6.12.0",
            ".linux": fake_kernel() if kernel is None else kernel,
            ".initrd": random.Random(2).randbytes(50_000),
        }
        at = {
            ".osrel": 0x20000,
            ".cmdline": 0x30000,
            ".uname": 0x40000,
            ".linux": 0x2000000,
            ".initrd": 0x3000000,
        } | (addresses or {})
        out = self.base / "uki.efi"
        argv = ["objcopy"]
        for name in names or contents:
            place = self.base / f"section{name}"
            place.write_bytes(contents[name])
            argv += ["--add-section", f"{name}={place}", "--change-section-vma"]
            argv += [f"{name}={at[name]:#x}"]
        _run(*argv, STUB, out)
        return out.read_bytes()

    def esp(self, files, *, bits=32, size=40 * MIB, options=()):
        """Make a FAT file system with some files: path → content."""
        image = self.base / "esp"
        image.unlink(missing_ok=True)
        with image.open("wb") as out:
            out.truncate(size)
        _run("mkfs.vfat", "-F", bits, "-n", "ESP", "-i", "ca1fe001", *options, image)
        made = set()
        for path, content in files.items():
            for parent in reversed(Path(path).parents[:-1]):
                if parent not in made:
                    _run("mmd", "-i", image, f"::{parent}")
                    made.add(parent)
            place = self.base / "content"
            place.write_bytes(content)
            _run("mcopy", "-i", image, place, f"::{path}")
        return image

    def disk(self, name, parts, *, expected=None):
        """Join partitions (type, image) with sfdisk, each from a MiB on."""
        image = self.base / name
        sizes = [-(-part.stat().st_size // MIB) * MIB for _, part in parts]
        starts = [MIB + sum(sizes[:n]) for n in range(len(parts))]
        with image.open("wb") as out:
            out.truncate(2 * MIB + sum(sizes))
        script = "label: gpt\nfirst-lba: 2048\n" + "".join(
            f"start={start // 512}, size={size // 512}, type={kind}\n"
            for start, size, (kind, _) in zip(starts, sizes, parts, strict=True)
        )
        _run("sfdisk", "-q", image, input=script.encode())
        with image.open("r+b") as out:
            for start, (_, part) in zip(starts, parts, strict=True):
                out.seek(start)
                out.write(part.read_bytes())
        places = {
            part.name: (start, size)
            for start, size, (_, part) in zip(starts, sizes, parts, strict=True)
        }
        return Disk(image, expected or Expected(closure=self.closure), places)


def fake_kernel(machine=0x8664):
    """Make the least that passes for a kernel: a DOS header that leads to a PE signature."""
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine)
    return head + random.Random(3).randbytes(100_000)


def _nix_hash(path):
    text = _run("nix-hash", "--type", "sha256", "--base32", path).decode().strip()
    return Hash.parse(f"sha256:{text}")


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    base = tmp_path_factory.mktemp("disks")
    store = base / "root/nix/store"
    store.mkdir(parents=True)
    fill(store)
    closure = {StorePath.from_basename(path.name): _nix_hash(path) for path in store.iterdir()}
    return Tools(base, base / "root", closure)


@pytest.fixture(scope="session")
def disk(tools):
    """A disk as it is booted: ESP with a UKI, an EROFS root, dm-verity over it."""
    root = tools.erofs()
    verity = tools.verity(root, "--salt=00ff")
    cmdline = f"{tools.CMDLINE} roothash={verity.root_hash.hex()}"
    esp = tools.esp(
        {
            "EFI/BOOT/BOOTX64.EFI": tools.program(cmdline),
            "EFI/Linux/A long name of a kernel.efi": tools.program(cmdline),
            "loader/entries/readme.txt": b"",
        }
    )
    return tools.disk(
        "disk",
        [(tools.ESP, esp), (tools.ROOT, root), (tools.VERITY, verity.image)],
        expected=Expected(closure=tools.closure, cmdline=cmdline, machine="x86_64"),
    )


@pytest.fixture(scope="session")
def disk_ext4(tools):
    """The same with an ext4 root, and without dm-verity."""
    esp = tools.esp(
        {"EFI/BOOT/BOOTX64.EFI": tools.program()}, bits=16, size=8 * MIB, options=("-s", "2")
    )
    root = tools.ext4("-b", "4096")
    return tools.disk("disk-ext4", [(tools.ESP, esp), (tools.ROOT, root)])


@pytest.fixture
def findings():
    return Findings()
