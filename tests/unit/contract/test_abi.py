"""The initrd contract: how a closure starts follows from what runs and what the closure says, and from nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.contract import abi
from calve.contract.abi import Abi, Bootspec, Kexec, Refuse, Running, SwitchRoot, Wanted
from calve.contract.codes import Code
from calve.errors import DamagedError
from calve.nix.storepath import StorePath

A = "/nix/store/" + "a" * 32 + "-linux-6.1"
B = "/nix/store/" + "b" * 32 + "-linux-6.12"
INITRD = "/nix/store/" + "c" * 32 + "-initrd-linux-6.12"
TOP = "/nix/store/" + "d" * 32 + "-nixos-system-web-25.11"

GOLDEN = """\
{
  "org.nixos.bootspec.v1": {
    "init": "/nix/store/dddddddddddddddddddddddddddddddd-nixos-system-web-25.11/init",
    "kernel": "/nix/store/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-linux-6.12/bzImage",
    "initrd": "/nix/store/cccccccccccccccccccccccccccccccc-initrd-linux-6.12/initrd",
    "kernelParams": [
      "console=ttyS0,115200n8",
      "root=fstab"
    ],
    "label": "NixOS Warbler 25.11",
    "toplevel": "/nix/store/dddddddddddddddddddddddddddddddd-nixos-system-web-25.11"
  },
  "org.calve.v1": {
    "agent": "0.2.0",
    "initrdAbi": 1,
    "kernelRelease": "6.12.58",
    "nixosInit": false,
    "etcOverlay": true,
    "etcMutable": true,
    "healthUnits": [
      "nginx.service"
    ]
  }
}
"""


@pytest.fixture
def spec():
    return Bootspec(
        kernel=f"{B}/bzImage",
        initrd=f"{INITRD}/initrd",
        params=("console=ttyS0,115200n8", "root=fstab"),
        init=f"{TOP}/init",
        toplevel=TOP,
        label="NixOS Warbler 25.11",
    )


@pytest.fixture
def offers():
    return Abi("0.2.0", 1, "6.12.58", False, True, True, ("nginx.service",))


@pytest.fixture
def wanted(spec, offers):
    return Wanted(spec, offers)


# The format


def test_golden(wanted):
    assert wanted.dump().decode() == GOLDEN
    assert abi.parse_wanted(GOLDEN.encode(), "boot.json") == wanted
    part = json.dumps(json.loads(GOLDEN)["org.calve.v1"]).encode()
    assert abi.parse_abi(part, "contract.json") == wanted.abi


def test_what_nixos_writes_besides_is_passed_over(wanted):
    document = json.loads(GOLDEN)
    document["org.nixos.bootspec.v1"] |= {"system": "x86_64-linux", "initrdSecrets": "/nix/x"}
    document["org.nixos.specialisation.v1"] = {"a": {}}
    document["org.calve.v1"] |= {"closureSize": 7}
    document["org.calve.v2"] = {"everything": "else"}
    assert abi.parse_wanted(json.dumps(document).encode(), "boot.json") == wanted


def test_without_extension_and_without_initrd(spec):
    document = json.loads(GOLDEN)
    del document["org.calve.v1"], document["org.nixos.bootspec.v1"]["initrd"]
    found = abi.parse_wanted(json.dumps(document).encode(), "x", modules_release="6.12.1")
    assert found == Wanted(dataclasses.replace(spec, initrd=None), None, "6.12.1")
    assert found.release == "6.12.1"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["org.nixos.bootspec.v1"], None, "no org.nixos.bootspec.v1"),
        (["org.nixos.bootspec.v1"], [], "no JSON object"),
        (["org.nixos.bootspec.v1", "kernel"], None, "kernel must be"),
        (["org.nixos.bootspec.v1", "kernel"], "/boot/vmlinuz", "kernel must be a file in a store"),
        (["org.nixos.bootspec.v1", "kernel"], f"{B}/../x", "kernel must be a file in a store"),
        (["org.nixos.bootspec.v1", "kernel"], f"{B}/x\n", "kernel must be a text"),
        (["org.nixos.bootspec.v1", "initrd"], "/nix/store/short/initrd", "initrd must be"),
        (["org.nixos.bootspec.v1", "initrd"], 7, "initrd must be"),
        (["org.nixos.bootspec.v1", "kernelParams"], "quiet", "kernelParams must be"),
        (["org.nixos.bootspec.v1", "kernelParams"], ["a"] * 513, "kernelParams must be"),
        (["org.nixos.bootspec.v1", "kernelParams"], ["a\nb"], "kernelParams must be"),
        (["org.nixos.bootspec.v1", "label"], "x" * 4097, "label must be"),
        (["org.calve.v1"], [], "no JSON object"),
        (["org.calve.v1", "agent"], None, "agent must be"),
        (["org.calve.v1", "initrdAbi"], True, "initrdAbi must be a number"),
        (["org.calve.v1", "initrdAbi"], "1", "initrdAbi must be a number"),
        (["org.calve.v1", "initrdAbi"], 0, "initrdAbi must be a number"),
        (["org.calve.v1", "kernelRelease"], None, "kernelRelease must be"),
        (["org.calve.v1", "nixosInit"], 1, "nixosInit must be true or false"),
        (["org.calve.v1", "healthUnits"], [1], "healthUnits must be"),
    ],
)
def test_damage_is_named(path, value, said):
    document = json.loads(GOLDEN)
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    if path == ["org.nixos.bootspec.v1"] and value is None:
        del document["org.nixos.bootspec.v1"]
    with pytest.raises(DamagedError) as caught:
        abi.parse_wanted(json.dumps(document).encode(), "boot.json")
    assert said in str(caught.value)
    assert caught.value.place == "boot.json"


def test_an_unknown_major_version_is_refused():
    document = json.loads(GOLDEN)
    document["org.calve.v2"] = document.pop("org.calve.v1")
    with pytest.raises(DamagedError, match=r"org\.calve\.v2 is unknown"):
        abi.parse_wanted(json.dumps(document).encode(), "boot.json")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"[" * 100_000, b"\xff"])
def test_no_document(data):
    for parse in (abi.parse_wanted, abi.parse_abi):
        with pytest.raises(DamagedError):
            parse(data, "x")


def test_a_document_has_a_bound():
    data = GOLDEN.encode()
    padded = data + b" " * (abi.LIMIT_BYTES - len(data))
    assert abi.parse_wanted(padded, "x") == abi.parse_wanted(data, "x")
    with pytest.raises(DamagedError, match="more than"):
        abi.parse_wanted(padded + b" ", "x")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_foreign_documents_are_read_or_refused(data):
    document = json.loads(GOLDEN)
    section = document[data.draw(st.sampled_from(["org.nixos.bootspec.v1", "org.calve.v1"]))]
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(values)
    try:
        found = abi.parse_wanted(json.dumps(document).encode(), "x")
    except DamagedError:
        return
    assert abi.parse_wanted(found.dump(), "x") == found
    assert isinstance(abi.decide(Running("6.1"), found), SwitchRoot | Kexec | Refuse)


# What runs


def test_the_kernel_command_line_says_what_runs():
    line = f"quiet calve.kernel={A}/bzImage calve.initrd={INITRD} calve.kexec=1 root=/dev/vda"
    found = Running.parse(line, "6.1")
    assert (str(found.kernel), str(found.initrd), found.kexecs) == (A, INITRD, 1)
    assert Running.parse("quiet", "6.1") == Running("6.1")
    # A guard that cannot be read guards.
    assert Running.parse("calve.kexec=x calve.kernel=/boot/vmlinuz", "6.1") == Running(
        "6.1", kexecs=1
    )


# The decision


def same(wanted, **changes):
    return dataclasses.replace(Running(wanted.abi.kernel_release, wanted.abi), **changes)


def with_abi(wanted, **changes):
    return dataclasses.replace(wanted, abi=dataclasses.replace(wanted.abi, **changes))


def test_same_kernel_and_contract_switch_root(wanted):
    assert abi.decide(same(wanted), wanted) == SwitchRoot()
    assert abi.decide(same(wanted, kernel=StorePath.parse(B)), wanted) == SwitchRoot()
    # Whatever versions of the agent, and whatever is watched later.
    assert abi.decide(same(with_abi(wanted, agent="9", health_units=())), wanted) == SwitchRoot()


def test_the_store_path_of_the_kernel_counts_more_than_its_release(wanted):
    found = abi.decide(same(wanted, kernel=StorePath.parse(A)), wanted)
    assert found == Kexec(
        f"{B}/bzImage", f"{INITRD}/initrd", wanted.bootspec.params, may_switch_root=True
    )
    right = same(wanted, kernel=StorePath.parse(B), release="misread")
    assert abi.decide(right, wanted) == SwitchRoot()


def test_another_kernel_is_started(wanted):
    found = abi.decide(same(wanted, release="6.1.0-56-cloud-amd64"), wanted)
    assert isinstance(found, Kexec)
    assert not found.may_switch_root


@pytest.mark.parametrize(
    "changes",
    [
        {"initrd_abi": 2},
        {"nixos_init": True},
        {"etc_overlay": False},
        {"etc_mutable": False},
    ],
    ids=str,
)
def test_another_contract_needs_the_closure_s_own_initrd(wanted, changes):
    running = same(wanted, abi=dataclasses.replace(wanted.abi, **changes))
    found = abi.decide(running, wanted)
    assert isinstance(found, Kexec)
    assert not found.may_switch_root
    # The closure's own initrd keeps the closure's contract, whatever it says of itself.
    own = dataclasses.replace(running, initrd=StorePath.parse(INITRD))
    assert abi.decide(own, wanted) == SwitchRoot()


def test_without_an_overlay_nobody_asks_whether_it_is_mutable(wanted):
    plain = with_abi(wanted, etc_overlay=False)
    running = same(plain, abi=dataclasses.replace(plain.abi, etc_mutable=False))
    assert abi.decide(running, plain) == SwitchRoot()


def test_once(wanted):
    other = same(wanted, release="6.1", kexecs=1)
    found = abi.decide(other, wanted)
    assert isinstance(found, Refuse)
    assert found.code is Code.KEXEC_LOOP
    assert "6.12.58" in found.message
    assert "6.1 runs" in found.message
    # What was started is what was wanted.
    own = Running("6.12.58", kernel=StorePath.parse(B), initrd=StorePath.parse(INITRD), kexecs=1)
    assert abi.decide(own, wanted) == SwitchRoot()
    # Another build of the same release is good enough by then.
    assert abi.decide(same(wanted, kernel=StorePath.parse(A), kexecs=1), wanted) == SwitchRoot()


def test_a_closure_without_boot_json_or_extension_starts_as_ever(spec):
    assert abi.decide(Running("6.1"), Wanted()) == SwitchRoot()
    assert abi.decide(Running("6.1"), Wanted(spec)) == SwitchRoot()
    assert abi.decide(Running("6.1"), Wanted(spec, None, "6.1")) == SwitchRoot()
    assert abi.decide(Running("6.1", kernel=StorePath.parse(B)), Wanted(spec)) == SwitchRoot()


def test_an_initrd_without_the_agent_is_never_started(spec, wanted):
    alone = dataclasses.replace(wanted, bootspec=dataclasses.replace(spec, initrd=None))
    for running, closure in (
        (Running("6.1"), Wanted(spec, None, "6.12")),
        (Running("6.1", kernel=StorePath.parse(A)), Wanted(spec)),
        (Running("6.1"), Wanted(None, None, "6.12")),
        (Running("6.1"), alone),
        (Running("6.1"), dataclasses.replace(wanted, bootspec=None)),
    ):
        found = abi.decide(running, closure)
        assert isinstance(found, Refuse)
        assert found.code is Code.KERNEL_FOREIGN
        assert "no initrd with the agent" in found.message


def test_every_combination_is_decided_and_no_kernel_starts_a_third(spec, offers):
    """The loop guard, over all there is: after one kexec nothing decides for another."""
    abis = [None, offers, dataclasses.replace(offers, nixos_init=True, kernel_release="6.1")]
    specs = [None, spec, dataclasses.replace(spec, initrd=None)]
    paths = [None, *map(StorePath.parse, (A, B))]
    closures = [Wanted(*parts) for parts in itertools.product(specs, abis, ["", "6.1", "6.12.58"])]
    initrds = [None, StorePath.parse(INITRD)]
    seen = set()
    for release, mine, kernel, initrd, count in itertools.product(
        ["6.1", "6.12.58"], [abi.PLAIN, offers], paths, initrds, [0, 1, 2]
    ):
        running = Running(release, mine, kernel, initrd, count)
        for closure in closures:
            found = abi.decide(running, closure)
            seen.add(type(found))
            if isinstance(found, Kexec):
                assert count == 0
                assert closure.abi is not None
                # What it leads to is started under what was started.
                after = Running.parse(
                    abi.command_line(found, ""), closure.abi.kernel_release, abi.PLAIN
                )
                assert abi.decide(after, closure) == SwitchRoot()
    assert seen == {SwitchRoot, Kexec, Refuse}


# The command line


@pytest.fixture
def kexec(spec):
    return Kexec(spec.kernel, spec.initrd, ("loglevel=4", "quiet"), False)


TAIL = (
    f"init=/nix/var/nix/profiles/system/init calve.kexec=1 calve.kernel={B} calve.initrd={INITRD}"
)


def test_what_carries_over(kexec):
    running = (
        "console=tty0 console=ttyS0,115200n8 root=/dev/vda rootflags=noatime init=/x panic=30 "
        "BOOT_IMAGE=/vmlinuz calve.hold=5 calve.debug=1 calve.kernel=/old calve.kexec=0 ro"
    )
    assert abi.command_line(kexec, running) == (
        "loglevel=4 quiet console=tty0 console=ttyS0,115200n8 root=/dev/vda rootflags=noatime "
        f"calve.hold=5 calve.debug=1 {TAIL}"
    )


def test_the_closure_s_own_words_count_more_but_for_the_console(kexec):
    own = (
        "console=tty0",
        "console=ttyS0,115200n8",
        "root=fstab",
        "calve.hold=9",
        "init=/nix/x/init",
        f"calve.kernel={A}",
        "calve.kexec=0",
    )
    found = abi.command_line(
        dataclasses.replace(kexec, params=own),
        "console=ttyS0,115200n8 root=/dev/vda calve.hold=5",
    )
    assert found == f"console=tty0 root=fstab calve.hold=9 console=ttyS0,115200n8 {TAIL}"
    assert found.count("init=/") == 1
