"""calve.toml: what it says, and exactly what is said of a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from calve.errors import NotFoundError, UsageError
from calve.fleet.config import (
    Cache,
    Command,
    Delivery,
    Environment,
    File,
    Fleet,
    Health,
    Parameter,
    Rollout,
    Secret,
    load,
    parse,
)
from calve.nix.signing import SecretKey

KEY = SecretKey.generate("acme-1", bytes).public.dump()
EXAMPLE = Path(__file__).parents[3] / "examples/webserver/calve.toml"
FLEET = '[fleet.web]\nsystem = "x"\n'
CACHE = '[cache]\nurl = "/c"\n'


def read(text):
    return parse(text, Path("calve.toml"))


@pytest.mark.parametrize("name", ["Web", "web_1", "-web", "w" * 64])
def test_a_fleet_s_name_is_one_that_releases_can_have(tmp_path, name):
    path = tmp_path / "calve.toml"
    path.write_text(f'[fleet.{name}]\nsystem = "x"\n')
    with pytest.raises(UsageError, match="lower-case letters, digits and -"):
        load(path)


def test_the_design_s_example_is_read():
    config = parse(
        f"""
        [cache]
        url = "s3://acme-nix?region=eu-central-1"
        key = {{ file = "cache.sec" }}
        trusted = ["{KEY}"]
        [fleet.web]
        system   = ".#nixosConfigurations.web"
        delivery = "image"
        group    = "web-asg"
        health   = {{ http = "/healthz", within = "1m30s" }}
        rollout  = {{ min-healthy = 90, max-healthy = 110, bake = "1h" }}
        """,
        Path("/srv/acme/calve.toml"),
    )
    assert config.cache == Cache(
        "s3://acme-nix?region=eu-central-1", File(Path("/srv/acme/cache.sec")), (KEY,)
    )
    assert config.fleets == {
        "web": Fleet(
            name="web",
            system=".#nixosConfigurations.web",
            delivery=Delivery.IMAGE,
            group="web-asg",
            health=Health("/healthz", None, 90),
            rollout=Rollout(90, 110, 3600),
        )
    }


def test_defaults():
    fleet = read(FLEET).fleets["web"]
    assert fleet == Fleet("web", "x", Delivery.INITRD, "web", None, Rollout(100, 200, 120))
    assert read('[fleet.web]\nsystem = "x"\nhealth = { tcp = 80 }').fleets["web"].health == Health(
        None, 80, 180
    )
    assert read("").cache is None
    assert read("").fleets == {}


def test_max_healthy_is_by_default_as_high_as_auto_scaling_allows():
    rollout = read(f"{FLEET}rollout.min-healthy = 50").fleets["web"].rollout
    assert (rollout.min_healthy_percent, rollout.max_healthy_percent) == (50, 150)


def test_where_a_key_may_be():
    def key(text):
        return parse(f"{CACHE}key = {text}\n", Path("/etc/acme/calve.toml")).cache.key

    assert key('{ file = "/run/key" }') == File(Path("/run/key"))
    assert key('{ env = "KEY" }') == Environment("KEY")
    assert key('{ command = ["pass", "show", "x"] }') == Command(
        ("pass", "show", "x"), Path("/etc/acme")
    )


def test_a_key_in_aws_is_where_its_arn_says_or_where_the_bucket_is():
    def key(value, url="s3://acme?region=eu-west-1&profile=ops", table="key"):
        cache = read(f'[cache]\nurl = "{url}"\n{table} = {{ {value} }}\n').cache
        return cache.key or cache.root_key

    arn = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:acme/key-AbCdEf"
    assert key('ssm = "/acme/key"') == Parameter("/acme/key", "eu-west-1", "ops")
    assert key('ssm = "/acme/key"', url="/c") == Parameter("/acme/key", None, None)
    assert key(f'secretsmanager = "{arn}"') == Secret(arn, "eu-central-1", "ops")
    assert key('secretsmanager = "acme"', table="root-key") == Secret("acme", "eu-west-1", "ops")
    assert key('file = "/k"', table="root-key") == File(Path("/k"))


@pytest.mark.parametrize("word", ["initrd", "image", "ssh", "user-data-build", "user-data-pull"])
def test_the_five_deliveries(word):
    assert read(f'{FLEET}delivery = "{word}"').fleets["web"].delivery == word


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[cash]\n", "calve.toml:1: cash: is not known", "did you mean cache?"),
        ("zzz = 1\n", "calve.toml:1: zzz: is not known", "known are cache, fleet"),
        ("cache = 3", "calve.toml:1: cache: must be a table, not a whole number", None),
        ("[cache]\n", "calve.toml:1: cache.url: is missing", None),
        ("[cache]\nurl = 1", "calve.toml:2: cache.url: must be text, not a whole number", None),
        (
            '[cache]\nurl = "ftp://x"',
            "calve.toml:2: cache.url: this is not the URL of a binary cache",
            "give s3://bucket?region=…, https://host, file:///directory or /directory",
        ),
        (
            CACHE + "trsted = []",
            "calve.toml:3: cache.trsted: is not known",
            "did you mean trusted?",
        ),
        (
            CACHE + "trusted = [1]",
            "calve.toml:3: cache.trusted[0]: must be text, not a whole number",
            None,
        ),
        (
            CACHE + f'trusted = ["{KEY}", "nonsense"]',
            "calve.toml:3: cache.trusted[1]: not a public key: it has no name before a colon",
            "a public key is one line, NAME:BASE64, as nix-store --generate-binary-cache-key writes it",
        ),
        (
            CACHE + 'key = { ssm = "arn:aws:ssm:eu-central-1:123:parameter/k" }',
            "calve.toml:3: cache.key.ssm: is an ARN, but not one of ssm",
            None,
        ),
        (
            CACHE + 'key = { secretsmanager = "arn:aws:ssm:eu-west-1:123456789012:parameter/k" }',
            "calve.toml:3: cache.key.secretsmanager: is an ARN, but not one of secretsmanager",
            None,
        ),
        (
            CACHE + 'root-key = { ssm = "" }',
            "calve.toml:3: cache.root-key.ssm: is empty, or has a NUL",
            None,
        ),
        (
            CACHE + 'root-key = { fil = "" }',
            "calve.toml:3: cache.root-key.fil: is not known",
            "did you mean file?",
        ),
        (
            CACHE + 'key = { file = "a", env = "b" }',
            "calve.toml:3: cache.key: must have exactly one of file, env, command, ssm and secretsmanager",
            None,
        ),
        (
            CACHE + "key = {}",
            "calve.toml:3: cache.key: must have exactly one of file, env, command, ssm and secretsmanager",
            None,
        ),
        (
            CACHE + 'key = { command = "pass show x" }',
            "calve.toml:3: cache.key.command: must be a list, not text",
            None,
        ),
        (
            CACHE + "key = { command = [] }",
            "calve.toml:3: cache.key.command: is empty, or has a NUL",
            None,
        ),
        (
            CACHE + 'key = { fil = "a" }',
            "calve.toml:3: cache.key.fil: is not known",
            "did you mean file?",
        ),
        ("fleet = 1", "calve.toml:1: fleet: must be tables, [fleet.NAME]", None),
        ('[fleet]\nsystem = "x"', "calve.toml:1: fleet: must be tables, [fleet.NAME]", None),
        (
            '[fleet."a b"]\nsystem = "x"',
            "calve.toml:1: fleet.a b: a fleet's name has lower-case letters, digits and -, at most 63",
            None,
        ),
        ("[fleet.web]\n", "calve.toml:1: fleet.web.system: is missing", None),
        ('[fleet.web]\nsystem = ""', "calve.toml:2: fleet.web.system: is empty", None),
        (FLEET + 'group = ""', "calve.toml:3: fleet.web.group: is empty", None),
        (
            FLEET + 'delivery = "initd"',
            "calve.toml:3: fleet.web.delivery: 'initd' is not a delivery",
            "did you mean initrd?",
        ),
        (
            FLEET + 'delivery = "zzz"',
            "calve.toml:3: fleet.web.delivery: 'zzz' is not a delivery",
            "known are initrd, image, ssh, user-data-build, user-data-pull",
        ),
        (
            FLEET + 'health = { http = "/", withn = "1m" }',
            "calve.toml:3: fleet.web.health.withn: is not known",
            "did you mean within?",
        ),
        (
            FLEET + 'health = { http = "/", within = "soon" }',
            'calve.toml:3: fleet.web.health.within: must be a duration such as "3m"',
            None,
        ),
        (
            FLEET + '[fleet.web.health]\nhttp = "/"\n\nwithin = "3h"',
            "calve.toml:6: fleet.web.health.within: must be from 1s to 1h",
            None,
        ),
        (
            FLEET + 'health = { http = "/", within = "0s" }',
            "calve.toml:3: fleet.web.health.within: must be from 1s to 1h",
            None,
        ),
        (
            FLEET + "health = {}",
            "calve.toml:3: fleet.web.health: must have exactly one of http and tcp",
            None,
        ),
        (
            FLEET + 'health = { http = "healthz" }',
            'calve.toml:3: fleet.web.health.http: must be a path such as "/healthz"',
            None,
        ),
        (
            FLEET + "health = { tcp = 0 }",
            "calve.toml:3: fleet.web.health.tcp: must be a port, 1 to 65535",
            None,
        ),
        (
            FLEET + 'health = { tcp = "80" }',
            "calve.toml:3: fleet.web.health.tcp: must be a whole number, not text",
            None,
        ),
        (
            FLEET + "rollout = { min-healthy = 101 }",
            "calve.toml:3: fleet.web.rollout.min-healthy: must be a percentage, 0 to 100",
            None,
        ),
        (
            FLEET + "rollout = { min_healthy = 10 }",
            "calve.toml:3: fleet.web.rollout.min_healthy: is not known",
            "did you mean min-healthy?",
        ),
        (
            FLEET + "rollout = { min-healthy = 90, max-healthy = 99 }",
            "calve.toml:3: fleet.web.rollout.max-healthy: must be a percentage, 100 to 200",
            None,
        ),
        (
            FLEET + "rollout.min-healthy = 50\nrollout.max-healthy = 151",
            "calve.toml:4: fleet.web.rollout.max-healthy: must not be more than 100 above min-healthy",
            None,
        ),
        (
            FLEET + 'rollout = { bake = "49h" }',
            "calve.toml:3: fleet.web.rollout.bake: must be from 0s to 48h",
            None,
        ),
        (
            FLEET + "rollout = { bake = 2 }",
            "calve.toml:3: fleet.web.rollout.bake: must be text, not a whole number",
            None,
        ),
    ],
)
def test_what_is_said_of_a_wrong_file(text, message, hint):
    with pytest.raises(UsageError) as caught:
        read(text)
    assert str(caught.value) == message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("text", "value_s"), [("90s", 90), ("3m", 180), ("1h30m", 5400), ("1h1m1s", 3661), ("0s", 0)]
)
def test_durations(text, value_s):
    assert read(f'{FLEET}rollout.bake = "{text}"').fleets["web"].rollout.bake_s == value_s


@pytest.mark.parametrize("text", ["", "3", "m", "3 m", "3m2h", "-3m", "3.5m", "٣m", "9999999s"])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="must be a duration"):
        read(f'{FLEET}rollout.bake = "{text}"')


def test_toml_errors_name_their_place():
    with pytest.raises(UsageError, match=r"^calve.toml: not TOML: .*line 2"):
        read("[cache]\nurl = \n")
    with pytest.raises(UsageError, match="not TOML"):
        read(f"x = {'[' * 20000}")


def test_a_line_that_may_be_another_s_is_not_named():
    text = FLEET + 'rollout = { bake = "x" }\ngroup = """\nrollout = 1\n"""'
    with pytest.raises(UsageError) as caught:
        read(text)
    assert caught.value.place == "calve.toml"


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load() is None
    with pytest.raises(NotFoundError, match=r"other\.toml: there is no such file"):
        load(Path("other.toml"))
    Path("calve.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        load()
    Path("calve.toml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(UsageError, match="longer than 1 MiB"):
        load()
    Path("calve.toml").write_text(f'{CACHE}key = {{ file = "k" }}')
    assert load().cache.key == File(tmp_path / "k")


def test_the_example_is_a_fleet_file():
    fleet = load(EXAMPLE).fleets["web"]
    assert fleet.delivery is Delivery.INITRD
    assert fleet.health == Health("/healthz", None, 180)


def test_msgspec_is_loaded_by_reading_a_file_only():
    program = "import sys, calve.fleet.config; print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_numbers_beyond_all_bounds():
    with pytest.raises(UsageError, match="not TOML"):
        read(FLEET + f"rollout.min-healthy = {'9' * 5000}")
    with pytest.raises(UsageError, match="percentage"):
        read(FLEET + f"rollout.min-healthy = {'9' * 500}")
    with pytest.raises(UsageError, match="whole number"):
        read(FLEET + "rollout.min-healthy = nan")


def test_long_lines_of_blanks_are_looked_through_once():
    for line in (" " * 100_000, "[" + " " * 100_000, "a" + " " * 100_000, "[" * 100_000):
        with pytest.raises(UsageError, match="foo"):
            read(f"x = '''\n{line}\n'''\nfoo = 1\n".replace("x =", "foo2 ="))
