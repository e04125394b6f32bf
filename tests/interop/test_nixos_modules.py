"""The NixOS modules, by Nix and the real module system, on stub declarations: what a NixOS would be told, not NixOS.

CALVE_NIXPKGS_LIB names a checkout of github.com/nix-community/nixpkgs.lib (or a nixpkgs). Without it all that needs
the module system is skipped.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calve.boot.policy import Policy
from calve.contract import abi
from calve.contract.evidence import Evidence
from calve.contract.health import Health, Http
from calve.contract.userdata import UserData, UserDataError
from calve.disk import initrd, payload
from calve.nix.signing import Keyring, SecretKey

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "src/calve/disk/data/calve-agent.service"
KEY = SecretKey.generate("acme-1", random=bytes).public.dump()
AGENT, MACHINE = ("nixos/modules/agent.nix", "nixos/modules/machine.nix")
SERVER, WEB = ("nixos/profiles/server.nix", "examples/webserver/configuration.nix")
KEYS = f'{{ boot.initrd.calve.trustedKeys = [ "{KEY}" ]; }}'
ENABLED = f'{{ boot.initrd.calve = {{ enable = true; trustedKeys = [ "{KEY}" ]; }}; }}'
NIX_FILES = [
    *sorted(ROOT.glob("nixos/**/*.nix")),
    *sorted(ROOT.glob("examples/**/*.nix")),
    *sorted(ROOT.glob("tests/interop/nixos/*.nix")),
    ROOT / "flake.nix",
]


@pytest.fixture(scope="session")
def nixpkgs_lib():
    place = os.environ.get("CALVE_NIXPKGS_LIB")
    if not place:
        pytest.skip("CALVE_NIXPKGS_LIB names no checkout of nixpkgs' lib")
    assert (Path(place) / "lib/default.nix").is_file(), f"CALVE_NIXPKGS_LIB={place} has no lib"
    return Path(place)


@pytest.fixture
def evaluate(nix, nixpkgs_lib):
    """Evaluate some of our files and some modules' text; return what they set and which assertions fail."""

    def run(*modules):
        listed = " ".join(str(ROOT / m) if m.endswith(".nix") else m for m in modules)
        out = nix.run(
            *("nix-instantiate", "--eval", "--strict", "--json"),
            ROOT / "tests/interop/nixos/evaluate.nix",
            *("--arg", "nixpkgsLib", nixpkgs_lib, "--arg", "modules", f"[ {listed} ]"),
        )
        return json.loads(out)

    return run


def systemd(result):
    return result["config"]["boot"]["initrd"]["systemd"]


def sections(text):
    """Return a unit's settings: section, key, list of values."""
    found, section = {}, None
    for line in text.splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section.setdefault(key, []).extend(value.split(" "))
    return found


# Every file


@pytest.mark.parametrize("file", NIX_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_parses(nix, file):
    nix.run("nix-instantiate", "--parse", file)


def test_a_file_that_does_not_parse_is_noticed(nix, tmp_path):
    bad = tmp_path / "bad.nix"
    bad.write_text(UNIT.read_text())
    with pytest.raises(AssertionError, match="--parse"):
        nix.run("nix-instantiate", "--parse", bad)


# The unit


def test_the_unit_stands_where_nixos_needs_it():
    unit = sections(UNIT.read_text())
    assert unit["Unit"]["DefaultDependencies"] == ["no"]
    assert unit["Unit"]["RequiresMountsFor"] == ["/sysroot/nix/store"]
    finders = ["initrd-find-nixos-closure.service", "initrd-find-etc.service"]
    assert unit["Unit"]["Before"] == [
        *finders,
        "initrd-fs.target",
        "initrd.target",
        "shutdown.target",
    ]
    assert unit["Install"]["RequiredBy"] == ["initrd.target", *finders]
    assert "systemd-networkd.service" in unit["Unit"]["After"]
    assert "systemd-networkd.service" in unit["Unit"]["Wants"]
    assert unit["Service"]["Type"] == ["oneshot"]
    assert unit["Service"]["RemainAfterExit"] == ["yes"]


def test_the_unit_starts_the_agent_as_our_own_initrd_does():
    command = " ".join(sections(UNIT.read_text())["Service"]["ExecStart"])
    init = (UNIT.parent / "init").read_text()
    assert f"\n{command}\n" in init


def test_the_unit_outlasts_the_longest_deadline_and_hold():
    limit = sections(UNIT.read_text())["Service"]["TimeoutStartSec"]
    assert limit == [f"{(86400 + 3600) // 3600}h"]


def test_nixos_has_the_very_text(evaluate):
    units = systemd(evaluate(AGENT, ENABLED))["units"]
    assert list(units) == ["calve-agent.service"]
    assert units["calve-agent.service"]["text"] == UNIT.read_text()
    install = sections(UNIT.read_text())["Install"]
    assert units["calve-agent.service"]["requiredBy"] == install["RequiredBy"]
    assert set(install) == {"RequiredBy"}  # the module reads no other


# agent.nix


def test_without_a_key_the_build_says_so(evaluate):
    failed = evaluate(AGENT, "{ boot.initrd.calve.enable = true; }")["failed"]
    assert len(failed) == 1
    assert "boot.initrd.calve.trustedKeys is empty" in failed[0]
    assert "calve keys show" in failed[0]


@pytest.mark.parametrize("key", ["acme-1", "acme-1:abc", ":" + "A" * 43 + "=", KEY[:-1], f"{KEY}="])
def test_what_is_no_key_is_named(evaluate, key):
    module = f'{{ boot.initrd.calve = {{ enable = true; trustedKeys = [ "{KEY}" "{key}" ]; }}; }}'
    (failed,) = evaluate(AGENT, module)["failed"]
    assert failed.strip().endswith(f": {key}")


def test_other_contradictions_are_named(evaluate):
    own = '{ boot.kernelParams = [ "init=/nix/store/x/init" ]; }'
    (failed,) = evaluate(AGENT, ENABLED, own)["failed"]
    assert "must be no second" in failed
    scripted = "({ lib, ... }: { boot.initrd.systemd.enable = lib.mkForce false; })"
    (failed,) = evaluate(AGENT, ENABLED, scripted)["failed"]
    assert "boot.initrd.systemd.enable" in failed


def test_a_key_of_ours_is_one_and_nothing_fails(evaluate):
    assert evaluate(AGENT, ENABLED)["failed"] == []


def test_what_is_not_enabled_changes_nothing_but_drivers(evaluate):
    plain = evaluate("{ }")["config"]
    ours = evaluate(MACHINE)["config"]
    del ours["boot"]["initrd"]["calve"], ours["services"]["calve"]
    assert ours["boot"]["initrd"].pop("availableKernelModules")
    assert plain["boot"]["initrd"].pop("availableKernelModules") == []
    assert ours == plain


def test_the_policy_is_the_agent_s(evaluate):
    changed = "{ boot.initrd.calve.holdSeconds = 5; boot.initrd.calve.memoryMB = 64; }"
    contents = systemd(evaluate(AGENT, ENABLED, changed))["contents"]
    text = contents["/etc/calve/agent.json"]["text"]
    policy = Policy.parse(text.encode(), "agent.json")
    assert policy == Policy(keys=(KEY,), ca_file="/etc/calve/ca.pem", hold_s=5.0, memory_mb=64)
    assert Keyring.parse(policy.keys).keys[0].dump() == KEY
    assert set(json.loads(text)) <= set(json.loads(policy.dump()))


def test_defaults_are_the_agent_s_own(evaluate):
    text = systemd(evaluate(AGENT, ENABLED))["contents"]["/etc/calve/agent.json"]["text"]
    assert Policy.parse(text.encode(), "") == Policy(keys=(KEY,), ca_file="/etc/calve/ca.pem")


def test_its_files(evaluate):
    found = systemd(evaluate(AGENT, ENABLED))
    (package,) = found["storePaths"]
    assert found["contents"]["/calve"]["source"] == f"{package}/calve"
    assert found["contents"]["/etc/calve/ca.pem"]["source"].endswith("/ca-bundle.crt")
    assert found["contents"]["/etc/resolv.conf"]["text"] == "nameserver 169.254.169.253\n"


def test_what_is_not_wanted_is_not_there(evaluate):
    quiet = "{ boot.initrd.calve.caFile = null; boot.initrd.services.resolved.enable = true; }"
    contents = systemd(evaluate(AGENT, ENABLED, quiet))["contents"]
    assert set(contents) == {"/calve", "/etc/calve/agent.json", "/etc/calve/contract.json"}
    offered = abi.parse_abi(contents["/etc/calve/contract.json"]["text"].encode(), "contract.json")
    assert offered.kernel_release == "6.12.1"
    assert json.loads(contents["/etc/calve/agent.json"]["text"])["ca_file"] is None


def test_drivers_are_those_of_our_own_initrd(evaluate):
    modules = evaluate(AGENT, ENABLED)["config"]["boot"]["initrd"]["availableKernelModules"]
    assert len(modules) == len(set(modules))
    # ext4 and its checksums come with fileSystems."/"; nixpkgs' kernel has virtio_rng where it wants it.
    elsewhere = {"ext4", "crc32c_generic", "crc32c_intel", "virtio_rng"}
    assert {*initrd.REQUIRED, *initrd.OPTIONAL} - elsewhere <= set(modules)


def test_nothing_of_others_is_overridden(evaluate):
    debug = "{ boot.initrd.calve.debug = true; services.calve.health.tcp = [ 80 ]; }"
    result = evaluate(SERVER, KEYS, debug)
    found = systemd(result)
    stage_2 = result["config"]["systemd"]
    names = [
        *found["units"],
        *found["services"],
        *stage_2["services"],
        *(name.removeprefix("10-") for name in found["network"]["networks"]),
        *(name.removeprefix("10-") for name in stage_2["network"]["networks"]),
    ]
    assert len(names) == 9
    assert all(name == "calve" or name.startswith("calve-") for name in names)
    assert all(
        re.match(r"/(calve$|etc/(calve/|resolv\.conf$))", name) for name in found["contents"]
    )


def test_the_contract_stands_in_bootspec(evaluate):
    more = "{ system.etc.overlay.enable = true; }"
    extensions = evaluate(SERVER, KEYS, more)["config"]["boot"]["bootspec"]["extensions"]
    assert extensions == {
        "org.calve.v1": {
            "agent": "1.2.3",
            "etcMutable": True,
            "etcOverlay": True,
            "healthUnits": ["calve-health.service"],
            "initrdAbi": 1,
            "kernelRelease": "6.12.1",
            "nixosInit": False,
        }
    }


# A shell, when both say so


def test_no_shell_without_the_policy(evaluate):
    result = evaluate(SERVER, KEYS)
    services = {**systemd(result)["services"], **result["config"]["systemd"]["services"]}
    assert not any("debug" in name for name in services)
    assert "ConditionKernelCommandLine" not in services["calve-emergency"]["unitConfig"]
    assert "autologin" not in json.dumps(result)


def test_with_the_policy_the_command_line_must_ask(evaluate):
    result = evaluate(SERVER, KEYS, "{ boot.initrd.calve.debug = true; }")
    shell = systemd(result)["services"]["calve-debug-shell"]
    login = result["config"]["systemd"]["services"]["calve-debug-login"]
    assert shell["unitConfig"]["ConditionKernelCommandLine"] == "calve.debug=1"
    assert login["unitConfig"]["ConditionPathExists"] == "/run/calve/debug"
    for service in (shell, login):
        assert service["serviceConfig"]["TTYPath"] == "/dev/ttyS0"
    emergency = systemd(result)["services"]["calve-emergency"]["unitConfig"]
    assert emergency["ConditionKernelCommandLine"] == "!calve.debug=1"
    assert "calve.debug=1" not in result["config"]["boot"]["kernelParams"]


# machine.nix and server.nix


def test_a_machine(evaluate):
    result = evaluate(SERVER, KEYS)
    assert result["failed"] == []
    assert result["undescribed"] == []
    config = result["config"]
    assert config["boot"]["kernelParams"] == [
        "calve.kernel=/nix/store/00000000000000000000000000000000-linux-6.12.1",
        "console=ttyS0,115200n8",
        "random.trust_cpu=on",
        "panic=30",
    ]
    assert config["boot"]["loader"]["grub"]["enable"] is False
    assert config["boot"]["loader"]["systemd-boot"]["enable"] is False
    assert config["boot"]["initrd"]["systemd"]["enable"] is True
    assert (
        config["fileSystems"]["/"]["device"] == "/dev/disk/by-label/nixos"
    )  # as disk.ext4 names it
    assert config["services"]["openssh"]["enable"] is False
    assert config["services"]["amazon-ssm-agent"]["enable"] is True
    assert config["users"] == {"allowNoPasswordLogin": True, "mutableUsers": False}
    assert config["nix"]["channel"]["enable"] is False
    assert config["nix"]["nixPath"] == []
    assert config["documentation"]["enable"] is False
    assert config["systemd"]["enableEmergencyMode"] is False


def test_the_lease_is_kept(evaluate):
    config = evaluate(SERVER, KEYS)["config"]
    first = config["boot"]["initrd"]["systemd"]["network"]["networks"]["10-calve"]
    assert first == config["systemd"]["network"]["networks"]["10-calve"]
    assert first["networkConfig"]["KeepConfiguration"] == "dhcp-on-stop"
    assert first["networkConfig"]["IPv6AcceptRA"] is False
    assert first["linkConfig"]["RequiredFamilyForOnline"] == "ipv4"
    assert config["boot"]["initrd"]["network"]["flushBeforeStage2"] is False
    assert config["networking"]["useNetworkd"] is True
    assert config["networking"]["useDHCP"] is False


AMAZON_INIT = """({ lib, ... }: {
  options.virtualisation.amazon-init.enable = lib.mkOption { type = lib.types.bool; default = true; };
})"""


def test_amazon_init_is_off_where_an_image_brings_it(evaluate):
    config = evaluate(SERVER, KEYS, AMAZON_INIT)["config"]
    assert config["virtualisation"]["amazon-init"] == {"enable": False}
    assert "amazon-init" not in evaluate(SERVER, KEYS)["config"]["virtualisation"]


def test_pulled_paths_are_registered_after_the_stock_unit_and_before_the_daemon(evaluate):
    unit = evaluate(SERVER, KEYS)["config"]["systemd"]["services"]["calve-register-paths"]
    assert "register-nix-paths.service" in unit["after"]
    assert {"sysinit.target", "nix-daemon.socket", "nix-daemon.service"} <= set(unit["before"])
    assert unit["wantedBy"] == ["sysinit.target"]
    assert unit["unitConfig"]["ConditionPathExists"] == "/nix-path-registration"
    bare = evaluate(SERVER, KEYS, "{ nix.enable = false; }")["config"]["systemd"]["services"]
    assert "calve-register-paths" not in bare


def test_what_the_operator_says_goes_before_the_profile(evaluate):
    mine = (
        "{ services.openssh.enable = true; documentation.enable = true; system.switch.enable = true; "
        'fileSystems."/".device = "/dev/vda"; boot.initrd.calve.enable = false; }'
    )
    result = evaluate(SERVER, mine)
    assert result["failed"] == []
    config = result["config"]
    assert config["services"]["openssh"]["enable"] is True
    assert config["documentation"]["enable"] is True
    assert config["system"]["switch"]["enable"] is True
    assert config["fileSystems"]["/"]["device"] == "/dev/vda"
    assert config["boot"]["initrd"]["systemd"]["units"] == {}


def test_the_example(evaluate):
    result = evaluate(SERVER, WEB)
    assert result["failed"] == []
    config = result["config"]
    assert config["services"]["nginx"]["enable"] is True
    assert "calve-health" in config["systemd"]["services"]
    assert config["networking"]["firewall"]["allowedTCPPorts"] == [80]


# The scripts, run


def script(evaluate, stage, name, *modules):
    result = evaluate(SERVER, KEYS, *modules)
    units = systemd(result) if stage == 1 else result["config"]["systemd"]
    return units["services"][name]["script"]


def bash(text, **run):
    return subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, **run)


def test_the_emergency_unit_says_why_and_holds(evaluate):
    text = script(evaluate, 1, "calve-emergency")
    done = bash(f"sleep() {{ echo held $1; }}\n{text}")
    assert done.returncode == 0, done.stderr
    line, held = done.stdout.splitlines()
    event = Evidence.parse(line)
    assert event.kind == "fail"
    assert event.fields["code"] == "disk-fault"
    assert held == "held 60"


def test_stage_2_says_that_it_begins(evaluate):
    text = script(evaluate, 2, "calve-stage-2")
    assert text.rstrip().endswith(">/dev/console")
    event = Evidence.parse(bash(text.replace(">/dev/console", "")).stdout.strip())
    assert (event.kind, event.fields) == ("phase", {"n": "answer"})


def test_health_is_what_the_program_reads(evaluate):
    health = 'http = "/healthz"; tcp = [ 22 ]; units = [ "a.service" ]; command = "true"; withinSeconds = 9;'
    config = evaluate(SERVER, KEYS, f"{{ services.calve.health = {{ {health} }}; }}")["config"]
    text = config["environment"]["etc"]["calve/health.json"]["text"]
    assert Health.parse_file(text.encode(), "health.json") == Health(
        (Http("/healthz"),), (22,), ("a.service",), "true", 9
    )
    nothing = evaluate(SERVER, KEYS)["config"]["environment"]["etc"]["calve/health.json"]["text"]
    assert Health.parse_file(nothing.encode(), "health.json") == Health()


@pytest.mark.parametrize(("status", "said"), [("0", ""), ("1", "poweroff"), ("3", "reboot")])
def test_what_was_found_out_decides_how_it_goes_on(evaluate, tmp_path, status, said):
    services = evaluate(SERVER, KEYS)["config"]["systemd"]["services"]
    text = services["calve-health"]["postStop"]
    text = re.sub(r"/nix/store/0{32}-[a-z]+/bin/systemctl", "echo", text)
    done = bash(text, env={"PATH": os.environ["PATH"], "EXIT_STATUS": status})
    assert done.stdout.split() == (["--force", "--no-block", said] if said else [])


def test_the_registration_is_loaded_and_taken_away(evaluate, nix, tmp_path):
    file = tmp_path / "hello"
    file.write_text("hello")
    path = nix.run("nix-store", "--add", file).decode().strip()
    listed = tmp_path / "nix-path-registration"
    listed.write_bytes(nix.run("nix-store", "--dump-db"))
    other = tmp_path / "other"
    text = re.sub(r"/nix/store/0{32}-[a-z]+/bin/", "", script(evaluate, 2, "calve-register-paths"))
    text = text.replace("/nix-path-registration", str(listed)).replace(
        "/nix/var", f"{other}/nix/var"
    )
    environment = {**nix.env, "NIX_REMOTE": f"local?root={other}"}
    done = bash(text, env=environment, cwd=nix.home)
    assert done.returncode == 0, done.stderr
    assert not listed.exists()
    check = ["nix-store", "--check-validity", path]
    assert subprocess.run(check, env=environment, cwd=nix.home).returncode == 0


def test_every_script_is_one(evaluate):
    more = "{ boot.initrd.calve.debug = true; }"
    result = evaluate(SERVER, WEB, more)
    services = {**systemd(result)["services"], **result["config"]["systemd"]["services"]}
    texts = {name: unit["script"] or unit["postStop"] for name, unit in services.items()}
    scripts = {name: text for name, text in texts.items() if text}
    assert len(scripts) == 4
    for name, text in scripts.items():
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)


# The order of units, by systemd itself

# What NixOS has beside systemd's own units, as far as its place in the order goes.
NIXOS_UNITS = {
    "sysroot.mount": "[Unit]\nBefore=initrd-root-fs.target\n[Mount]\nWhat=/dev/vda\nWhere=/sysroot\n",
    "initrd-find-nixos-closure.service": "[Unit]\nDefaultDependencies=no\nRequiresMountsFor=/sysroot/nix/store\n"
    "Before=initrd.target shutdown.target\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
    "initrd-find-etc.service": "[Unit]\nDefaultDependencies=no\nRequiresMountsFor=/sysroot/nix/store\n"
    "Requires=initrd-find-nixos-closure.service\nAfter=initrd-find-nixos-closure.service\n"
    "Before=initrd-fs.target shutdown.target\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
    "register-nix-paths.service": "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target\n"
    "Before=sysinit.target shutdown.target nix-daemon.socket nix-daemon.service\n"
    "[Service]\nType=oneshot\nExecStart=/bin/true\n",
}
NIXOS_WANTS = {
    "initrd-find-nixos-closure.service": ["initrd.target"],
    "initrd-find-etc.service": ["initrd-fs.target"],
    "register-nix-paths.service": ["sysinit.target"],
    "systemd-networkd.service": ["initrd.target"],
}


def render(service):
    """Write a service of the module system as NixOS does, its script left out."""
    keys = {"after": "After", "before": "Before", "requires": "Requires", "conflicts": "Conflicts"}
    unit = [(name, " ".join(service[key])) for key, name in keys.items() if service[key]]
    unit += service["unitConfig"].items()
    lines = ["[Unit]", *(f"{key}={value}" for key, value in unit), "[Service]"]
    lines += [f"{key}={value}" for key, value in service["serviceConfig"].items()]
    if service["script"]:
        lines.append("ExecStart=/bin/true")
    return "\n".join(lines).replace("=True", "=yes").replace("=False", "=no") + "\n"


@pytest.fixture
def verify(tmp_path):
    """Lay out units beside Debian's, and let systemd order a target's transaction."""
    upstream = Path("/usr/lib/systemd/system")
    if shutil.which("systemd-analyze") is None or not (upstream / "initrd.target").exists():
        pytest.skip("systemd is not installed")

    def run(target, units, wanted):
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(upstream, root / "usr/lib/systemd/system", symlinks=True)
        (root / "lib").symlink_to("usr/lib")
        (root / "calve/bin").mkdir(parents=True)
        (root / "calve/bin/python3").touch(0o755)
        place = root / "etc/systemd/system"
        place.mkdir(parents=True)
        for name, text in {**NIXOS_UNITS, **units}.items():
            (place / name).write_text(text)
        for name, targets in [*NIXOS_WANTS.items(), *wanted]:
            for one in targets:
                (place / f"{one}.requires").mkdir(exist_ok=True)
                (place / f"{one}.requires" / name).symlink_to(f"../{name}")
        command = ["systemd-analyze", "verify", "--man=no", f"--root={root}", target]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr

    return run


@pytest.mark.parametrize(
    "target", ["initrd.target", "initrd-fs.target", "initrd-switch-root.target"]
)
def test_systemd_finds_no_cycle_in_the_initrd(verify, target):
    install = sections(UNIT.read_text())["Install"]["RequiredBy"]
    said = verify(
        target, {"calve-agent.service": UNIT.read_text()}, [("calve-agent.service", install)]
    )
    assert "cycl" not in said


def test_systemd_would_find_one(verify):
    text = UNIT.read_text().replace("After=", "After=initrd-fs.target ", 1)
    install = sections(text)["Install"]["RequiredBy"]
    said = verify(
        "initrd.target", {"calve-agent.service": text}, [("calve-agent.service", install)]
    )
    assert "cycl" in said


def test_systemd_finds_no_fault_in_the_agent_s_unit(verify):
    assert verify("calve-agent.service", {"calve-agent.service": UNIT.read_text()}, []) == ""
    wrong = UNIT.read_text().replace("poweroff-force", "power-off")
    assert "FailureAction" in verify("calve-agent.service", {"calve-agent.service": wrong}, [])


@pytest.mark.parametrize("target", ["sysinit.target", "multi-user.target", "boot-complete.target"])
def test_systemd_finds_no_cycle_in_stage_2(evaluate, verify, target):
    more = "{ boot.initrd.calve.debug = true; services.calve.health.tcp = [ 80 ]; }"
    services = evaluate(SERVER, KEYS, more)["config"]["systemd"]["services"]
    assert {"calve-health", "calve-register-paths"} < set(services)
    units = {f"{name}.service": render(service) for name, service in services.items()}
    wanted = [
        (f"{name}.service", [*service["wantedBy"], *service["requiredBy"]])
        for name, service in services.items()
    ]
    assert "cycl" not in verify(target, units, wanted)


# One document, two readers


def test_user_data_serves_calve_and_systemd():
    data = (ROOT / "tests/interop/nixos/userdata.json").read_bytes()
    assert UserData.parse(data).release == 7
    # systemd 261's rules (src/imds/imds-tool.c): an object, which it knows by its first letter; of it this member; of
    # each credential a name and exactly one of three, and nothing that it does not know.
    assert data.startswith(b"{")
    credentials = json.loads(data)["systemd.credentials"]
    assert credentials
    for credential in credentials:
        assert len(credential.keys() & {"text", "data", "encrypted"}) == 1
        assert credential.keys() <= {"name", "text", "data", "encrypted"}
        base64.b64decode(credential.get("data", ""), validate=True)


def test_systemd_s_marker_line_makes_it_foreign_to_calve():
    data = (ROOT / "tests/interop/nixos/userdata.json").read_bytes()
    with pytest.raises(UserDataError) as caught:
        UserData.parse(b"#systemd-userdata\n" + data)
    assert caught.value.code == "userdata-foreign"


# The flake, the packages, the workflow


FLAKE = """
let
  lib = import (nixpkgsLib + "/lib");
  legacy = { callPackage = _file: _arguments: { version = "1"; }; extend = overlay: legacy // overlay legacy legacy; };
  nixpkgs = { inherit lib; legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (_: legacy); };
  self = (import ROOT/flake.nix).outputs { inherit self nixpkgs; };
  names = lib.mapAttrs (_: builtins.attrNames);
in {
  outputs = builtins.attrNames self;
  modules = builtins.attrNames self.nixosModules;
  packages = names self.packages;
  checks = names self.checks;
  shells = names self.devShells;
}
"""


@pytest.fixture
def flake(nix, nixpkgs_lib):
    text = f"nixpkgsLib: {FLAKE}".replace("ROOT", str(ROOT))
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-E", f"({text}) {nixpkgs_lib}"]
    return json.loads(nix.run(*command))


def test_the_flake_s_outputs(flake):
    assert flake["modules"] == ["agent", "default", "machine", "server"]
    both = {"x86_64-linux", "aarch64-linux"}
    assert set(flake["packages"]) == set(flake["shells"]) == both
    assert flake["packages"]["aarch64-linux"] == ["calve", "calve-agent", "calve-health", "default"]


def test_the_workflow_runs_every_check_on_three_releases(flake):
    text = (ROOT / ".github/workflows/nixos.yml").read_text(encoding="utf-8")
    checks = re.search(r"check: \[(.*)\]", text)[1].split(", ")
    assert sorted(checks) == flake["checks"]["x86_64-linux"]
    releases = re.findall(r"nixpkgs: \[(.*)\]", text)
    assert releases == ["nixos-25.11, nixos-26.05, nixos-unstable"] * 2


def test_the_example_s_flake_builds_what_its_fleet_file_names():
    fleet = (ROOT / "examples/webserver/calve.toml").read_text(encoding="utf-8")
    system = re.search(r'system = "\.#(\S+)"', fleet)[1]
    assert f"{system} =" in (ROOT / "examples/webserver/flake.nix").read_text(encoding="utf-8")


def test_the_agent_s_tree_is_the_payload_and_starts(tmp_path):
    out = tmp_path / "agent"
    subprocess.run([sys.executable, ROOT / "nixos/agent_tree.py", out], check=True)
    built = payload.build()
    for module in built.modules:
        stem = out / built.library_directory / module.name.replace(".", "/")
        found = [*stem.parent.glob(f"{stem.name}.*"), stem / "__init__.pyc"]
        assert any(path.is_file() for path in found), module.name
    links = {os.readlink(link) for link in (out / "libraries").iterdir()}
    assert links == {f"/{place}" for _, place in built.libraries if not place.startswith("calve/")}
    assert any("libgcc_s" in link for link in links)
    command = [out / "calve/bin/python3", "-I", "-S", "-B", "-m", "calve.boot.main", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, env={}, cwd="/")
    event = Evidence.parse(done.stdout.strip())
    assert done.returncode == 1, done.stderr
    assert (event.kind, event.fields["code"]) == ("fail", "internal")
    assert "/nonexistent" in event.fields["message"]


def test_the_tests_machines_trust_the_rig_s_key():
    rig = (ROOT / "nixos/tests/rig.py").read_text(encoding="utf-8")
    assert 'SecretKey.generate("nixos-test-1", random=bytes)' in rig
    key = SecretKey.generate("nixos-test-1", random=bytes).public.dump()
    assert key in (ROOT / "nixos/tests/boot.nix").read_text(encoding="utf-8")
