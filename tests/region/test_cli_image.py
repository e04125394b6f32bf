"""`calve image` as a user runs it: processes, real small disks, two regions behind one endpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from uploading import NoBalancer, NoMachines

import calve
from calve.contract.abi import Abi
from calve.demo.imports import Importer, temporary
from calve.demo.kernel import Kernel
from calve.demo.system import Boot, System, add_toplevel
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES
from calve.disk.inspect.report import inspect
from calve.disk.inspect.source import FileSource
from calve.disk.uki import find_stub
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.region.blocks import Snapshots
from calve.region.cloud import Cloud
from calve.region.ebs import EbsService
from calve.region.ebs_faults import Rot
from calve.region.faults import Delay, FaultPlan
from calve.region.message import Response
from calve.region.server import Server
from calve.region.signature import Allow
from calve.region.storage import Storage

HERE, FAR = "test-region", "far-region"
ACCOUNT = "210987654321"
SCOPE = re.compile(r"Credential=[^/]+/[0-9]{8}/([a-z0-9-]+)/")


class Place:
    """One region: EBS direct and EC2."""

    def __init__(self, name, directory, principals, objects, find):
        self.snapshots = Snapshots(directory / name, region=name, complete_s=0.1)
        self.ebs = EbsService(self.snapshots, principals)
        self.storage = Storage(name, self.snapshots, objects=objects, neighbour=find)
        self.cloud = Cloud(NoMachines(), NoBalancer(), region=name, storage=self.storage)

    def handle(self, request):
        direct = request.path.startswith("/snapshots")
        return (self.ebs if direct else self.cloud).handle(request)

    def images(self):
        return {one.name: one for one in self.storage.images._images.values()}


class World:
    """Two regions, a store, and how to call calve."""

    def __init__(self, directory, places, url, env):
        self.directory, self.places, self.url = directory, places, url
        self.root = directory / "root"
        self.env = {
            **os.environ,
            "PYTHONPATH": str(Path(calve.__file__).parents[1]),
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": HERE,
            **env,
        }
        for name in ("NO_COLOR", "FORCE_COLOR", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
            self.env.pop(name, None)

    @property
    def here(self):
        return self.places[HERE]

    @property
    def far(self):
        return self.places[FAR]

    def system(self, release, content=b"content", name="web"):
        """Add a system with a kernel that is a PE file, and no more."""
        with LocalStore(self.root, create=True) as store:
            importer = Importer(store)
            with temporary(store) as work:
                (work / "page").write_bytes(content * 1000)
                page = importer.add(work / "page", "page")
                (work / "initrd").write_bytes(b"initrd")
                kernel = Kernel("6.1.0-test", find_stub(X86_64), work)
                path = add_toplevel(
                    importer,
                    System(name, release, {"www": page}),
                    "#!/bin/sh\n",
                    Boot(
                        kernel, work / "initrd", extension=Abi("0", kernel_release="6.1.0").dump()
                    ),
                )
            importer.flush()
        return path

    def argv(self, *args):
        return [sys.executable, "-m", "calve", *map(str, args)]

    def run(self, *args, code=0, **options):
        done = subprocess.run(
            self.argv("image", *args),
            capture_output=True,
            text=True,
            timeout=300,
            env=self.env,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            check=False,
            **options,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, (done.stdout, done.stderr)
        return done

    def use(self, image, name):
        """Have a launch template name an image."""
        with contextlib.closing(
            boto3.client(
                "ec2",
                endpoint_url=self.url,
                region_name=HERE,
                aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            )
        ) as client:
            data = {"ImageId": image, "InstanceType": "t3.nano"}
            client.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)

    def json(self, *args, code=0):
        return json.loads(self.run(*args, "--json", code=code).stdout)

    def build(self, release, out, *more, content=b"content"):
        path = self.system(release, content)
        return self.json("build", path, "--out", out, "--store", self.root, *more)


@pytest.fixture
def region_faults():
    return FaultPlan()


@pytest.fixture
def world(tmp_path, principals, admin, service, region_faults):
    principals.set_policy("vmimport", [Allow("s3:*")])
    places = {}

    def find(region):
        return places[region].storage if region in places else None

    for name in (HERE, FAR):
        objects = service if name == HERE else None
        places[name] = Place(name, tmp_path / "regions", principals, objects, find)

    def handle(request):
        found = SCOPE.search(request.headers.get("authorization", ""))
        if found is None or found[1] not in places:
            return Response(400, {}, b"no such region")
        return places[found[1]].handle(request)

    env = {"AWS_ACCESS_KEY_ID": admin.access_key, "AWS_SECRET_ACCESS_KEY": admin.secret_key}
    with contextlib.ExitStack() as stack:
        for one in places.values():
            stack.enter_context(one.storage)
            stack.enter_context(one.cloud)
        server = stack.enter_context(Server(handle, faults=region_faults))
        yield World(tmp_path, places, server.url, env)


def steps(done):
    """Return what a command said on stderr, without its progress."""
    return [
        line
        for line in done.stderr.splitlines()
        if not re.match(r"(upload|verify|hash|put|import|read)( [a-z-]+)?: ", line)
    ]


def exported(place, snapshot, path):
    """Inspect the volume that EC2 would make of a snapshot, garbage where nothing was written."""
    path.unlink(missing_ok=True)
    place.snapshots.export(snapshot, path, omitted="random", key=b"key")
    with FileSource(path) as source:
        return inspect(source)


# The way of a release


def test_releases_are_built_published_to_two_regions_and_verified(world):
    both = ("--region", HERE, "--region", FAR)
    built = world.build(1, "one")
    assert (built["line"], built["arch"], built["changed_blocks"]) == ("web", "x86_64", None)
    assert (built["size_bytes"], built["parent"], built["dry_run"]) == (1 << 30, None, False)
    published = world.json("publish", "one", "--deep", *both)
    assert [one["region"] for one in published["regions"]] == [HERE, FAR]
    for row in published["regions"]:
        assert row["blocks"] == row["requests"] == row["read_blocks"] == built["blocks"]
        assert row["name"] == f"calve-web-x86-64-{built['disk'][:12]}"
        place = world.places[row["region"]]
        image = place.images()[row["name"]]
        assert (image.id, image.boot_mode, image.tpm_support) == (row["image"], "uefi", "v2.0")
        assert image.tags["calve:closure"] == built["system"]
        assert "calve:revision" not in image.tags
        seen = exported(place, row["snapshot"], world.directory / "volume")
        assert (seen.findings, len(seen.file_systems[0].paths)) == ((), 4)
    # Again: nothing is written, and nothing is registered a second time.
    again = world.json("publish", "one", *both)
    assert [(one["image"], one["requests"]) for one in again["regions"]] == [
        (one["image"], 0) for one in published["regions"]
    ]
    listed = world.json("list", *both)["images"]
    assert {(one["region"], one["line"], one["closure"]) for one in listed} == {
        (HERE, "web", built["system"]),
        (FAR, "web", built["system"]),
    }
    for row in world.json("verify", "one", "--deep", *both)["regions"]:
        assert row["findings"] == []
        assert row["read_blocks"] == row["listed_blocks"] == built["blocks"]


def test_the_next_release_is_a_few_blocks_upon_the_parent_s_snapshot(world):
    world.build(1, "one")
    parent = world.json("publish", "one")["regions"][0]["snapshot"]
    argv = ("build", world.system(2, b"other"), "--out", "two", "--store", world.root)
    assert world.json(*argv, "--parent", "one", "--dry-run")["read_paths"] == 2
    assert not (world.directory / "two").exists()
    built = world.build(2, "two", "--parent", "one", content=b"other")
    assert 0 < built["changed_blocks"] < 10
    assert built["parent"] == json.loads((world.directory / "one/image.json").read_text())["disk"]
    (plan,) = world.json("publish", "two", "--dry-run")["regions"]
    assert (plan["parent"], plan["blocks"]) == (parent, built["changed_blocks"])
    assert plan["usd"] == pytest.approx(built["changed_blocks"] * 0.006 / 1000, abs=1e-6)
    assert world.run("upload", "two", "--dry-run").stdout.startswith(
        f"{HERE}: would write {built['changed_blocks']} blocks, "
    )
    assert len(world.here.images()) == 1
    # One step after the other is the same as publish.
    (sent,) = world.json("upload", "two")["regions"]
    assert sent["requests"] == built["changed_blocks"]
    assert world.run("verify", "two").stdout == ""
    (seen,) = world.json("verify", "two")["regions"]
    assert seen["read_blocks"] <= built["changed_blocks"] + 2 < seen["listed_blocks"]
    dry = world.run("register", "two", "--dry-run").stdout
    assert dry.startswith(f"{HERE}: would register {sent['snapshot']} as calve-web-")
    assert len(world.here.images()) == 1
    (image,) = world.json("register", "two")["regions"]
    assert image["snapshot"] == sent["snapshot"]
    (published,) = world.json("publish", "two", "--deep")["regions"]
    assert (published["image"], published["requests"]) == (image["image"], 0)
    assert exported(world.here, sent["snapshot"], world.directory / "volume").findings == ()
    # What the other region lacks is told before anything is written.
    lacks = world.run("publish", "two", "--region", HERE, "--region", FAR, code=5)
    assert f"{FAR}: no snapshot in {FAR} holds the disk" in lacks.stderr
    assert "--full" in lacks.stderr


@pytest.mark.full
def test_dm_verity_goes_from_parent_to_child(world):
    assert not world.build(1, "plain")["verity"]
    first = world.build(1, "one", "--verity")
    assert first["verity"]
    second = world.build(2, "two", "--parent", "one", content=b"other")
    assert second["verity"]
    assert 0 < second["changed_blocks"] <= 10
    for built in (first, second):
        (row,) = world.json("publish", built["directory"], "--deep")["regions"]
        seen = exported(world.here, row["snapshot"], world.directory / "volume")
        assert seen.findings == ()
        assert seen.verity is not None
    # Built whole, it is the same system below another root hash or none.
    assert world.build(2, "full", "--parent", "one", "--full", content=b"other")["verity"]
    (world.directory / "one/verity").write_bytes(b"not the tree")
    path = world.system(3)
    done = world.run(
        "build", path, "--store", world.root, "--out", "three", "--parent", "one", code=7
    )
    assert "one/verity: it is no tree of dm-verity" in done.stderr


@pytest.mark.full
def test_an_overlay_as_a_parent(world):
    world.build(1, "one")
    world.run("publish", "one")
    world.build(2, "two", "--parent", "one", content=b"other")
    world.run("publish", "two")
    before = world.here.ebs.counts["GetSnapshotBlock"]
    three = world.build(3, "three", "--parent", "two", "--parent-region", HERE, content=b"third")
    assert three["changed_blocks"] < 10
    assert world.here.ebs.counts["GetSnapshotBlock"] > before
    (row,) = world.json("publish", "three", "--deep")["regions"]
    assert exported(world.here, row["snapshot"], world.directory / "volume").findings == ()
    whole = world.build(3, "whole", "--parent", "two", "--full", content=b"third")
    assert (whole["parent"], whole["changed_blocks"]) == (None, None)


def test_a_parent_that_is_full_of_the_dead_is_not_built_upon(world):
    world.build(1, "old", content=os.urandom(60_000))  # 60 MB that the next lacks
    second = world.build(2, "next", "--parent", "old")
    assert second["parent"] is not None
    third = world.system(3, b"third")
    argv = ("build", third, "--out", "third", "--store", world.root, "--parent", "next")
    dry = world.run(*argv, "--dry-run")
    done = world.run(*argv)
    for one in (dry, done):
        assert "building it whole" in one.stderr
    assert not json.loads((world.directory / "third/disk.json").read_text())["parent"]


def test_out_of_a_cache_it_is_the_same_disk(world):
    key = SecretKey.generate("acme-1")
    (world.directory / "key.sec").write_text(key.dump())
    (world.directory / "key.sec").chmod(0o600)
    cache = f"file://{world.directory}/cache"
    built = world.build(1, "one")
    push = ["push", built["system"], "--store", world.root, "--to", cache, "--key", "key.sec"]
    done = subprocess.run(
        world.argv(*push),
        env=world.env, cwd=world.directory, capture_output=True, text=True, check=True,
    )  # fmt: skip
    manifest = done.stdout.split()[1]
    argv = ["build", built["system"], "--out", "two", "--from", cache, "--manifest", manifest]
    assert "no key is trusted" in world.run(*argv, code=2).stderr
    argv += ["--trusted", key.public.dump()]
    would = world.json(*argv, "--dry-run")
    assert (would["read_paths"], would["dry_run"]) == (4, True)
    assert not (world.directory / "two").exists()
    assert world.json(*argv)["disk"] == built["disk"]
    # Of what the parent has nothing is read.
    assert (
        world.json(*argv[:2], "--out", "x", *argv[4:], "--parent", "one", "--dry-run")["read_paths"]
        == 0
    )


@pytest.mark.full
def test_a_base_image_with_a_seed(world):
    system = world.system(1)
    argv = ("build", "--base", system, "--store", world.root, "--line", "base")
    bare = world.json(*argv, "--out", "bare")
    seeded = world.json(*argv, "--out", "seeded", "--seed", system)
    assert (bare["base"], bare["changed_blocks"]) == (True, None)
    assert world.json(*argv, "--out", "x", "--seed", system, "--dry-run")["read_paths"] == 4
    assert world.json(*argv, "--out", "x", "--dry-run")["read_paths"] == 2
    for built, paths in ((bare, 2), (seeded, 4)):
        (row,) = world.json("publish", built["directory"], "--deep")["regions"]
        seen = exported(world.here, row["snapshot"], world.directory / "volume")
        assert (seen.findings, len(seen.file_systems[0].paths)) == ((), paths)
    images = world.json("list", "--line", "base")["images"]
    assert [(one["line"], one["closure"]) for one in images] == [("base", None)] * 2
    assert world.json("list", "--line", "web")["images"] == []


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--from", "/c", "--store", "/"), 2, "exclude each other"),
        (("--manifest", "0" * 64), 2, "are for --from"),
        (("--base", "--parent", "one"), 2, "a base image has no parent"),
        (("--seed", "one"), 2, "--seed is for --base"),
        (("--base", "--verity"), 2, "--verity is for release images"),
        (("--parent", "one", "--verity"), 2, "one: the parent is not under dm-verity"),
        (("--parent-region", HERE), 2, "goes with --parent"),
        (("--initrd", "none"), 5, "none: there is no such file"),
        (("--line", "Web!"), 2, "no name for a line"),
        (("--arch", "riscv64"), 2, "no processor that images are made for"),
        (("--arch", "aarch64"), 2, "it is no kernel for aarch64"),
        (("--parent", "none"), 5, "none/disk.json"),
        (("--parent", "base"), 2, "base: the parent is no release image"),
        (("--parent", "one", "--out", "one"), 2, "the parent's own directory"),
    ],
)
def test_what_is_not_built(world, more, code, said):
    system = world.build(1, "one")["system"] if "one" in more else world.system(1)
    if "base" in more:
        world.run("build", "--base", system, "--store", world.root, "--out", "base")
    before = sorted(world.directory.rglob("*.raw"))
    store = () if "--from" in more else ("--store", world.root)
    done = world.run("build", system, "--out", "two", *store, *more, code=code)
    assert said in done.stderr
    assert done.stdout == ""
    assert sorted(world.directory.rglob("*.raw")) == before


def test_a_system_without_boot_json_is_named(world):
    world.system(1)
    (page,) = (world.root / "nix/store").glob("*-page")
    page = StorePath.from_basename(page.name)
    done = world.run("build", page, "--store", world.root, "--out", "out", code=5)
    assert f"{page}: the system has no boot.json" in done.stderr
    assert not list((world.directory / "out").glob("*"))


# What goes wrong on the way


def test_a_snapshot_that_is_not_what_was_planned_is_no_image(world):
    built = world.build(1, "one")
    world.here.ebs.faults.add(Rot(), method="PUT", path="*/blocks/*", skip=5)
    done = world.run("publish", "one", code=7)
    assert "block-differs: block " in done.stderr
    assert world.here.images() == {}
    found = world.run("verify", "one", code=7)
    (line,) = found.stdout.splitlines()
    assert re.fullmatch(rf"{HERE} snap-\w+: block-differs: block \d+: .*", line)
    assert "1 finding" in found.stderr
    (row,) = world.json("verify", "one", "--deep", code=7)["regions"]
    assert row["findings"][0]["check"] == "block-differs"
    assert row["read_blocks"] == built["blocks"]


def test_what_is_not_there_and_what_is_not_allowed(world, principals):
    world.build(1, "one")
    lacks = world.run("verify", "one", code=5)
    assert f"one: no snapshot in {HERE} holds this image" in lacks.stderr
    world.run("register", "one", code=5)
    assert "calve image list" in world.run("show", "ami-0123456789abcdef0", code=5).stderr
    world.run("debug", "nothing", code=5)
    world.run("upload", "none", code=5)
    world.run("list", "--region", "../x", code=2)
    world.env.pop("AWS_REGION")
    assert "no region is named" in world.run("upload", "one", code=2).stderr
    world.env["AWS_REGION"] = HERE
    principals.set_policy("admin", [Allow("ebs:StartSnapshot")])
    denied = world.run("upload", "one", code=4)
    assert "ebs:PutSnapshotBlock" in denied.stderr


def slow_puts(faults):
    faults.add(Delay(0.3), method="PUT", times=None)


def interrupted(world, *args):
    """Run a command, and press Ctrl-C once blocks are on their way."""
    before = world.here.ebs.counts["PutSnapshotBlock"]
    child = subprocess.Popen(
        world.argv("image", *args),
        env=world.env, cwd=world.directory, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while world.here.ebs.counts["PutSnapshotBlock"] < before + 40:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    return err


def test_ctrl_c_and_the_same_command_goes_on(world, region_faults):
    built = world.build(1, "one")
    slow_puts(region_faults)
    err = interrupted(world, "upload", "one")
    assert "the same command goes on with it, --abort deletes it" in err
    region_faults.clear()
    (row,) = world.json("upload", "one")["regions"]
    assert row["requests"] < built["blocks"]
    assert world.json("verify", "one", "--deep")["regions"][0]["findings"] == []
    assert len(world.here.snapshots.all()) == 1


def test_an_upload_is_aborted_and_begun_anew(world, region_faults):
    built = world.build(1, "one")
    assert world.run("upload", "one", "--abort").stdout == f"{HERE}: nothing is pending\n"
    slow_puts(region_faults)
    interrupted(world, "publish", "one")
    region_faults.clear()
    (pending,) = (one.id for one in world.here.snapshots.all())
    assert world.run("upload", "one", "--abort").stdout == f"{HERE}: deleted {pending}\n"
    assert world.here.snapshots.all() == []
    assert world.run("upload", "one", "--abort").stdout == f"{HERE}: nothing is pending\n"
    (row,) = world.json("upload", "one")["regions"]
    assert (row["requests"], row["snapshot"] == pending) == (built["blocks"], False)
    assert not list((world.directory / "one").glob("*.upload"))
    world.run("upload", "one", "--abort", "--dry-run", code=2)


# Disks that were made elsewhere


@pytest.mark.full
def test_a_raw_disk_of_anybody_s(world):
    built = world.build(1, "one")
    foreign = world.directory / "My Disk.img"
    shutil.copy(world.directory / "one/disk.raw", foreign)
    (plan,) = world.json("upload", foreign, "--dry-run")["regions"]
    assert plan["blocks"] == (1 << 30) // BLOCK_BYTES  # zeros included
    (row,) = world.json("publish", foreign, "--deep")["regions"]
    assert row["name"].startswith("calve-my-disk-x86-64-")
    assert row["read_blocks"] == plan["blocks"]
    # The disk in a directory is the directory's: it may be an overlay.
    (plan,) = world.json("upload", "one/disk.raw", "--dry-run")["regions"]
    assert plan["blocks"] == built["blocks"]


def test_a_disk_that_ends_within_a_gib_has_its_table_there(world):
    world.build(1, "one")
    size, start, count = 100 << 20, 1 << 20, 64 << 20
    foreign = world.directory / "small.img"
    with (world.directory / "one/disk.raw").open("rb") as source, foreign.open("wb") as target:
        source.seek(start)
        target.seek(start)
        target.write(source.read(count))
        target.truncate(size)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    script = f"label: gpt\nstart={start // 512}, size={count // 512}, type=uefi\n"
    subprocess.run(
        [shutil.which("sfdisk", path=path), "-q", foreign], input=script, text=True, check=True
    )
    (row,) = world.json("publish", foreign, "--deep")["regions"]
    assert row["read_blocks"] == size // BLOCK_BYTES


def test_what_is_no_raw_disk_is_refused_by_name(world):
    (world.directory / "disk.vhd").write_bytes(b"conectix" + bytes(1 << 20))
    done = world.run("upload", "disk.vhd", code=2)
    assert "disk.vhd: it is a dynamic VHD, not a raw disk" in done.stderr
    assert "qemu-img convert" in done.stderr
    assert world.here.snapshots.all() == []


@pytest.mark.full
def test_an_import_through_a_bucket(world, server, s3, service, principals):
    built = world.build(1, "one")
    bucket = f"s3://nix/prefix?region={HERE}&endpoint={server.url}"
    argv = ("upload", "one", "--via", "import", "--bucket", bucket)
    assert f"would import 1 GiB through {bucket}" in world.run(*argv, "--dry-run").stdout
    assert world.here.snapshots.all() == []
    # EC2 may not read the bucket; what is there is not sent a second time.
    principals.set_policy("vmimport", [])
    assert "vmimport" in world.run(*argv, code=1).stderr
    (sent,) = s3.list_objects_v2(Bucket="nix")["Contents"]
    assert (sent["Key"].startswith("prefix/calve-import/"), sent["Size"]) == (True, 1 << 30)
    principals.set_policy("vmimport", [Allow("s3:*")])
    done = world.run(*argv, "--json")
    assert '"name": "put"' not in done.stderr
    (row,) = json.loads(done.stdout)["regions"]
    (snapshot,) = world.here.snapshots.all()
    assert (row["snapshot"], snapshot.tags["calve:disk"]) == (snapshot.id, built["disk"])
    assert "Contents" not in s3.list_objects_v2(Bucket="nix")
    assert world.json(*argv)["regions"] == [row]
    assert len(world.here.snapshots.all()) == 1
    # EC2's import writes the whole volume, and zeros do no harm.
    (seen,) = world.json("verify", "one")["regions"]
    assert (seen["findings"], seen["listed_blocks"]) == ([], 2048)
    assert world.run("register", "one").stdout.startswith(f"{HERE} ami-")
    world.build(2, "two", "--parent", "one", content=b"other")
    overlay = world.run("upload", "two", *argv[2:], code=2)
    assert "an overlay upon its parent cannot be imported" in overlay.stderr
    world.run("upload", "one", "--via", "import", code=2)
    world.run("upload", "one", *argv[2:], "--region", FAR, code=2)


def test_a_disk_that_changed_is_not_imported(world, server, s3):
    world.build(1, "one")
    with (world.directory / "one/disk.raw").open("r+b") as file:
        file.seek(700_000)
        file.write(b"changed")
    bucket = f"s3://nix/prefix?region={HERE}&endpoint={server.url}"
    done = world.run("upload", "one", "--via", "import", "--bucket", bucket, code=7)
    assert "block 1 is not what was planned" in done.stderr
    assert "Contents" not in s3.list_objects_v2(Bucket="nix")
    assert world.here.snapshots.all() == []


# Images


def published(world, release=1, out="one", *more, content=b"content"):
    world.build(release, out, *more, content=content)
    return world.json("publish", out)["regions"][0]


def test_one_is_shown_shared_and_deprecated(world):
    world.build(1, "one")
    argv = ("publish", "one", "--share", ACCOUNT, "--deprecate-after", "90d")
    name = world.json(*argv)["regions"][0]["name"]
    image = world.here.images()[name]
    assert image.launchable_by == {ACCOUNT}
    assert image.deprecated_at > time.time() + 89 * 86_400
    assert world.here.snapshots.find(image.root.snapshot_id).shared_with == {ACCOUNT}
    assert (
        f"{name} would be taken back"
        not in world.run("share", name, ACCOUNT, "--take-back", "--dry-run").stdout
    )
    assert world.here.images()[name].launchable_by == {ACCOUNT}
    world.run("share", image.id, ACCOUNT, "--take-back")
    assert world.here.images()[name].launchable_by == frozenset()
    assert world.json("share", name, "123456789012")["accounts"] == ["123456789012"]
    shown = world.json("show", image.id)
    assert (shown["used_by"], shown["tags"]["calve:line"]) == (None, "web")
    assert shown["snapshots"] == [{"snapshot": image.root.snapshot_id, "state": "completed"}]
    world.use(image.id, "fleet-web")
    assert "used by      fleet-web version 1" in world.run("show", name).stdout
    world.run("share", name, "me", code=2)


def test_foreign_text_is_made_harmless(world):
    row = published(world)
    world.here.storage.images.put_tags(
        row["image"],
        {**world.here.images()[row["name"]].tags, "calve:line": "\x1b[2Jx", "n": "a\nb"},
    )
    for args in (("list",), ("show", row["image"]), ("prune", "--dry-run")):
        assert "\x1b" not in world.run(*args).stdout
    assert "tag          n=a b" in world.run("show", row["image"]).stdout


def test_a_clean_working_directory_gives_the_revision(world):
    world.build(1, "one")

    def git(*args):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        done = subprocess.run(
            ["git", *identity, *args],
            cwd=world.directory,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    git("init", "-q")
    (world.directory / ".gitignore").write_text("*\n")
    git("add", "-f", ".gitignore")
    git("commit", "-qm", "first")
    world.run("upload", "one")
    row = world.json("publish", "one")["regions"][0]
    assert row["requests"] == 0
    assert world.here.images()[row["name"]].tags["calve:revision"] == git("rev-parse", "HEAD")


def test_a_copy_into_another_region_can_be_built_upon(world):
    one = published(world)
    argv = ("copy", one["name"], "--to", FAR)
    assert world.run(*argv, "--dry-run").stdout.startswith(f"{FAR} would copy ami-")
    assert world.far.images() == {}
    (row,) = world.json(*argv)["regions"]
    assert world.json(*argv)["regions"] == [row]
    assert world.far.images()[one["name"]].id == row["image"]
    built = world.build(2, "two", "--parent", "one", content=b"other")
    (sent,) = world.json("publish", "two", "--region", FAR)["regions"]
    assert sent["requests"] == built["changed_blocks"]
    assert world.json("verify", "one", "--region", FAR)["regions"][0]["findings"] == []
    assert (
        "the image is there already" in world.run("copy", one["name"], "--to", HERE, code=2).stderr
    )


@pytest.mark.full
def test_the_debug_variant_is_a_block_upon_its_image(world):
    one = published(world)
    would = world.json("debug", one["name"], "--dry-run")
    assert (would["blocks"], would["image"]) == (1, None)
    assert len(world.here.images()) == 1
    made = world.json("debug", one["image"])
    assert made["name"] == f"{one['name']}-debug"
    before = exported(world.here, one["snapshot"], world.directory / "before")
    after = exported(world.here, made["snapshot"], world.directory / "after")
    assert after.findings == ()
    (old,), (new,) = before.ukis, after.ukis
    assert new.image.cmdline == f"{old.image.cmdline} calve.debug=1" == made["command_lines"][0]
    assert after.file_systems == before.file_systems
    assert world.json("debug", one["image"])["image"] == made["image"]
    assert [one["image"] for one in world.json("list", "--line", "web")["images"]] == [one["image"]]
    (variant,) = world.json("list", "--line", "web-debug")["images"]
    assert (variant["image"], variant["disk"]) == (made["image"], None)
    assert "a variant itself" in world.run("debug", made["image"], code=2).stderr
    # It is no parent: the next release goes onto the image.
    built = world.build(2, "two", "--parent", "one", content=b"other")
    (plan,) = world.json("upload", "two", "--dry-run")["regions"]
    assert (plan["parent"], plan["blocks"]) == (one["snapshot"], built["changed_blocks"])
    world.build(1, "shell", "--debug")
    (shell,) = world.json("publish", "shell")["regions"]
    assert "on its command line already" in world.run("debug", shell["image"], code=2).stderr


# What goes


def kept(world, *more):
    (row,) = world.json("prune", "--older-than", "0s", "--dry-run", *more)["regions"]
    return {one["name"]: one["kept_because"] for one in row["images"]}


@pytest.mark.full
def test_only_what_nothing_needs_is_pruned(world):
    first = published(world, 1, "one")
    second = published(world, 2, "two", "--parent", "one", content=b"second")
    third = published(world, 3, "three", "--parent", "two", content=b"third")
    debug = world.json("debug", third["image"])
    assert kept(world) == {
        first["name"]: None,
        second["name"]: None,
        third["name"]: "it is the newest of its line",
        debug["name"]: None,
    }
    closure = world.here.images()[first["name"]].tags["calve:closure"]
    assert kept(world, "--keep-closure", closure)[first["name"]] == "a release or a pin keeps it"
    world.run("share", second["image"], ACCOUNT)
    assert kept(world)[second["name"]] == f"it is shared with {ACCOUNT}"
    world.run("share", second["image"], ACCOUNT, "--take-back")
    world.use(debug["image"], "look")
    assert kept(world)[debug["name"]] == "look version 1 uses it"
    (young,) = world.json("prune", "--dry-run")["regions"]
    assert {one["kept_because"] for one in young["images"]} >= {"it is young"}
    assert young["snapshots"] == []

    refused = world.run("prune", "--older-than", "0s", code=2)
    assert "--yes" in refused.stderr
    assert len(world.here.images()) == 4
    done = world.run("prune", "--older-than", "0s", "--yes")
    assert "removed 2 images and 2 snapshots" in done.stderr
    assert set(world.here.images()) == {third["name"], debug["name"]}
    assert {one.id for one in world.here.snapshots.all()} == {third["snapshot"], debug["snapshot"]}
    # What is left is whole without its parents.
    assert exported(world.here, third["snapshot"], world.directory / "volume").findings == ()
    (seen,) = world.json("verify", "three")["regions"]
    assert (seen["findings"], seen["read_blocks"]) == ([], seen["listed_blocks"])
    again = world.run("prune", "--older-than", "0s", "--yes")
    assert "nothing is to be removed" in again.stderr


def test_what_a_pin_of_the_cache_names_stays(world):
    first = published(world, 1, "one")
    published(world, 2, "two", "--parent", "one", content=b"other")
    closure = world.here.images()[first["name"]].tags["calve:closure"]
    key = SecretKey.generate("test-1")
    (world.directory / "key").write_text(key.dump())
    (world.directory / "key").chmod(0o600)
    cache = f"file://{world.directory}/cache"
    for words in (
        ("push", closure, "--store", world.root, "--to", cache, "--key", world.directory / "key"),
        ("cache", "pin", "live", closure, "--cache", cache, "--trusted", key.public.dump()),
    ):
        done = subprocess.run(world.argv(*words), env=world.env, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert kept(world)[first["name"]] is None
    assert kept(world, "--cache", cache)[first["name"]] == "a release or a pin keeps it"
    (world.directory / "calve.toml").write_text(f'[cache]\nurl = "{cache}"\n')
    assert kept(world)[first["name"]] == "a release or a pin keeps it"
    for manifest in (world.directory / "cache/manifests").rglob("*.*"):
        manifest.write_bytes(b"damaged")
    done = world.run("prune", "--older-than", "0s", "--yes", code=7)
    assert "cannot be read" in done.stderr
    assert len(world.here.images()) == 2


def on_a_terminal(world, answer, *args):
    """Run a command on a terminal and answer its question; return the exit code."""
    ours, theirs = pty.openpty()
    try:
        child = subprocess.Popen(
            world.argv("image", *args),
            env={**world.env, "TERM": "dumb"},
            cwd=world.directory,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        )
        said = b""
        while not said.endswith(b"[y/N] "):
            said += os.read(ours, 1024)
        if answer is None:
            child.send_signal(signal.SIGINT)
        else:
            os.write(ours, answer)
        return child.wait(30)
    finally:
        os.close(theirs)
        os.close(ours)


def test_on_a_terminal_it_asks(world):
    published(world)
    published(world, 2, "two", "--parent", "one", content=b"other")
    argv = ("prune", "--older-than", "0s")
    for answer, code in ((b"\n", 0), (b"no\n", 0), (None, 130)):
        assert on_a_terminal(world, answer, *argv) == code
        assert len(world.here.images()) == 2
    assert on_a_terminal(world, b"y\n", *argv) == 0
    assert len(world.here.images()) == 1


def test_a_snapshot_that_failed_goes_and_a_young_upload_stays(world, region_faults):
    world.build(1, "one")
    slow_puts(region_faults)
    interrupted(world, "upload", "one")
    region_faults.clear()
    assert world.json("prune", "--older-than", "0s", "--yes")["regions"][0]["snapshots"] == []
    (pending,) = world.here.snapshots.all()
    world.here.snapshots.update(
        pending.id, lambda one: dataclasses.replace(one, started_at=one.started_at - 2 * 86_400)
    )
    (row,) = world.json("prune", "--older-than", "0s", "--yes")["regions"]
    assert [one["snapshot"] for one in row["snapshots"]] == [pending.id]
    assert world.here.snapshots.all() == []
