"""No wrong image passes: each fault of the service and each mutant of the writer, on ext4 and EROFS, with a parent and without, whatever blocks read as that nobody wrote.

A mutant is a writer that errs, and describes what it wrote: the snapshot is as planned, and only what is on the disk
can tell. What is found is told by the snapshot's blocks, or by the volume that EC2 would make of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
import subprocess
from pathlib import Path

import pytest

from calve.contract.abi import Abi
from calve.demo.imports import Importer, temporary
from calve.demo.kernel import Kernel
from calve.demo.system import Boot, System, add_toplevel
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES, Block
from calve.disk.inspect.report import inspect
from calve.disk.inspect.source import FileSource
from calve.disk.uki import find_stub
from calve.image.base import Base
from calve.image.parent import FileBlocks
from calve.image.plan import Parent, plan
from calve.image.publish import expected
from calve.image.release import Release
from calve.image.source import StoreSource
from calve.image.start import start_of
from calve.image.verify import verify
from calve.nix.store import LocalStore
from calve.region.ebs_faults import Forget, Rot
from calve.tasks import Cancel

PAGE = random.Random(1).randbytes(300_000)
NEW_PAGE = random.Random(2).randbytes(300_000)
LOGO = random.Random(3).randbytes(2_000_000)


@dataclasses.dataclass
class Image:
    """A whole disk, its description and closure."""

    raw: Path
    disk: object
    built: object

    def part(self, name):
        return next(one for one in self.disk.partitions if one.name == name)

    def start_of(self, name):
        return self.part(name).start_bytes


def systems(store, folder):
    """Add two releases, which differ in a page."""
    importer = Importer(store)
    made = []
    for number, page in enumerate((PAGE, NEW_PAGE), 1):
        with temporary(store) as work:
            (work / "page").mkdir()
            (work / "page/index.html").write_bytes(page)
            (work / "page/run").write_bytes(b"#!/bin/sh\n" + page[:9000])
            (work / "page/run").chmod(0o755)
            (work / "page/link").symlink_to("index.html")
            (work / "logo").write_bytes(LOGO)
            (work / "initrd").write_bytes(PAGE[:100_000])
            paths = {
                "www": importer.add(work / "page", "page"),
                "logo": importer.add(work / "logo", "logo"),
            }
            kernel = Kernel("6.1.0-test", find_stub(X86_64), folder)
            boot = Boot(kernel, work / "initrd", extension=Abi("0", kernel_release="6.1.0").dump())
            made.append(add_toplevel(importer, System("web", number, paths), "#!/bin/sh\n", boot))
    importer.flush()
    return made


def copy(source, target):
    subprocess.run(["cp", "--sparse=always", "--", source, target], check=True)


def whole(built, parent):
    """Write the whole disk of an overlay, in place of it."""
    if parent is not None and built.disk.changed is not None:
        full = built.directory / "whole.raw"
        copy(parent.raw, full)
        with full.open("r+b") as target, built.raw.open("rb") as source:
            for index in built.disk.changed:
                source.seek(index * BLOCK_BYTES)
                target.seek(index * BLOCK_BYTES)
                target.write(source.read(BLOCK_BYTES))
        full.replace(built.raw)
    return dataclasses.replace(built.disk, parent=None, changed=None)


FULL = pytest.mark.full


@pytest.fixture(scope="module", params=[pytest.param("ext4", marks=FULL), "erofs"])
def pair(request, tmp_path_factory):
    """Two images of a line, the second with another page."""
    folder = tmp_path_factory.mktemp(request.param)
    found, parent = [], None
    with LocalStore(folder / "root", create=True) as store:
        source = StoreSource(store)
        for number, path in enumerate(systems(store, folder), 1):
            start = start_of(source, path, folder)
            out = folder / str(number)
            if request.param == "ext4":
                base = Base("web", X86_64, start, source, (path,))
                built = base.build(out, cancel=Cancel())
            else:
                blocks = None if parent is None else FileBlocks(parent.raw, parent.disk)
                made = Release("web", X86_64, start, source, path, parent, blocks)
                built = made.build(out, cancel=Cancel())
            assert set(built.paths) >= {info.path for info in store.closure([path])}
            found.append(Image(built.raw, whole(built, parent), built))
            parent = built
    return found


# What writers do wrong: bytes of the disk and where they go


def everywhere(image, content, part="root"):
    """Return where some content is in a partition."""
    start = image.part(part).start_bytes
    with image.raw.open("rb") as file:
        file.seek(start)
        data = file.read(image.part(part).content_bytes)
    found = [start + match.start() for match in re.finditer(re.escape(content), data)]
    assert found
    return found


def at(image, content, part="root"):
    return everywhere(image, content, part)[0]


def put(image, where, data):
    with image.raw.open("r+b") as file:
        file.seek(where)
        file.write(data)


def flip(image, where):
    with image.raw.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))


def a_bit_of_a_file(image, _before):
    flip(image, at(image, NEW_PAGE[200_000:200_064]))


def two_pages_of_a_file_are_swapped(image, _before):
    one, other = (at(image, LOGO[n << 12 :][:64]) for n in (100, 101))
    put(image, one, LOGO[101 << 12 :][:4096])
    put(image, other, LOGO[100 << 12 :][:4096])


def the_end_of_a_file_is_zeros(image, _before):
    put(image, at(image, LOGO[1_999_000:1_999_064]), bytes(1000))


def a_file_has_its_old_content(image, _before):
    put(image, at(image, NEW_PAGE[8192 : 8192 + 64]), PAGE[8192 : 8192 + 4096])


def a_link_leads_elsewhere(image, _before):
    for where in everywhere(image, b"index.html"):  # the file has another name, too
        put(image, where, b"index.hxml")


def a_path_has_another_name(image, _before):
    name = next(path.basename for path in image.built.paths if path.name == "logo").encode()
    for where in everywhere(image, name):
        put(image, where, b"1" + name[1:] if name[:1] == b"0" else b"0" + name[1:])


def the_superblock_has_a_bit_flipped(image, _before):
    flip(image, image.start_of("root") + 1024 + 16)


def the_file_system_stands_a_sector_off(image, _before):
    with image.raw.open("r+b") as file:
        file.seek(image.start_of("root"))
        data = file.read(1 << 20)
        file.seek(image.start_of("root") + 512)
        file.write(data)


def the_table_is_the_one_before_s_half(image, _before):
    put(image, 1024, bytes(512))


def the_backup_of_the_table_is_not_written(image, _before):
    put(image, image.disk.size_bytes - 512, bytes(512))


def the_two_fats_differ(image, _before):
    start = image.start_of("esp")
    boot = image.raw.open("rb")
    with boot:
        boot.seek(start)
        sector = boot.read(512)
    reserved = int.from_bytes(sector[14:16], "little")
    length = int.from_bytes(sector[22:24], "little") or int.from_bytes(sector[36:40], "little")
    flip(image, start + (reserved + length) * 512 + 40)


def the_kernel_has_a_bit_flipped(image, _before):
    flip(image, at(image, find_stub(X86_64).read_bytes()[-600:-536], "esp"))


def the_initrd_is_another(image, _before):
    flip(image, at(image, PAGE[50_000:50_064], "esp"))


MUTANTS = [
    a_bit_of_a_file,
    two_pages_of_a_file_are_swapped,
    the_end_of_a_file_is_zeros,
    a_file_has_its_old_content,
    a_link_leads_elsewhere,
    a_path_has_another_name,
    the_superblock_has_a_bit_flipped,
    the_file_system_stands_a_sector_off,
    the_table_is_the_one_before_s_half,
    the_backup_of_the_table_is_not_written,
    the_two_fats_differ,
    the_kernel_has_a_bit_flipped,
    the_initrd_is_another,
]


def described(image):
    """Describe what is there, as a writer does that believes in it."""
    blocks = []
    with image.raw.open("rb") as file:
        for block in image.disk.blocks:
            file.seek(block.index * BLOCK_BYTES)
            blocks.append(Block(block.index, hashlib.sha256(file.read(BLOCK_BYTES)).hexdigest()))
    return dataclasses.replace(image.disk, blocks=tuple(blocks))


class Bench:
    """Uploads images to a place, and looks at what came of them."""

    def __init__(self, place, pair, folder, *, onto, omitted):
        self.place, self.folder, self.omitted = place, folder, omitted
        self.before, self.image = pair
        self.parent = None
        if onto:
            made = place.run(self.before.disk, path=self.before.raw).id
            self.parent = Parent(made, self.before.disk)

    def findings(self, disk, raw, region="region"):
        """Upload and verify; return the names of the checks that failed."""
        place = self.place
        made = place.run(disk, self.parent, path=raw, region=region).id
        found = verify(
            place.ebs, made, plan(disk, self.parent), disk, deep=True, cancel=Cancel()
        ).findings
        volume = self.folder / "volume.raw"
        volume.unlink(missing_ok=True)
        place.snapshots.export(made, volume, omitted=self.omitted, key=b"key")
        with FileSource(volume) as source:
            inspected = inspect(source, expected(self.image.built)).findings
        return [one.check for one in (*found, *inspected)]


@pytest.fixture(params=[pytest.param("zeros", marks=FULL), "random"])
def omitted(request):
    return request.param


@pytest.fixture(
    params=[pytest.param(True, id="parent"), pytest.param(False, id="whole", marks=FULL)]
)
def bench(request, place, pair, tmp_path, omitted):
    return Bench(place, pair, tmp_path, onto=request.param, omitted=omitted)


def test_the_right_image_passes(bench):
    assert bench.findings(bench.image.disk, bench.image.raw) == []


def test_no_mutant_of_the_writer_passes(bench):
    passed = {}
    for mutate in MUTANTS:
        raw = bench.folder / "mutant.raw"
        copy(bench.image.raw, raw)
        image = dataclasses.replace(bench.image, raw=raw)
        mutate(image, bench.before)
        disk = described(image)
        assert disk.digest != bench.image.disk.digest, mutate.__name__
        passed[mutate.__name__] = bench.findings(disk, raw)
    assert [name for name, found in passed.items() if not found] == []


def test_no_fault_of_the_service_passes(bench):
    disk = bench.image.disk
    written = [block.index for block in plan(disk, bench.parent).blocks]
    passed, before = {}, len(bench.place.ids())
    for index in {written[0], written[len(written) // 2], written[-1]}:
        for fault in (Forget(), Rot(8 * 4000), Rot(5, hidden=False)):
            bench.place.service.faults.add(fault, method="PUT", path=f"*/blocks/{index}")
            region = f"region-{len(passed)}"  # another token: the same would find the same snapshot
            passed[index, fault] = bench.findings(disk, bench.image.raw, region)
    assert len(bench.place.ids()) == before + len(passed)  # none was found again
    assert [what for what, found in passed.items() if not found] == []
