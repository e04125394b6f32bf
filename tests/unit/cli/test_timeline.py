"""`calve timeline` and `calve explain`."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import calve.aws.ec2
from calve.cli import explain, main, timeline
from calve.cli.session import Session
from calve.contract.codes import Code
from calve.contract.evidence import Evidence
from calve.errors import CancelledError, NotFoundError, UsageError

DATA = Path(__file__).parents[1] / "contract/data"
SHOWN = """\
boot 1: handed over to the system, last heard of at 30.8 s
PHASE        START s   TIME s   SHARE
kernel          0.00     3.81   12.4%  ━━━━━
network         3.81     1.01    3.3%       ━
agent           4.82     2.94    9.5%        ━━━━
imds            7.76     0.27    0.9%            ━
manifest        8.03     0.42    1.4%            ━
pull            8.45    22.22   72.1%             ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━
commit         30.67     0.14    0.5%                                         ━
switch-root    30.81        ?    0.0%                                         >
/nix/store/v74lhlniqm550030y0vlkhigxbd284mj-nixos-system-webserver-1, release 1, generation 1
fetched 146 paths, 50.6 MB (116.1 MB of NAR), 2.3 MB/s; agent's peak 34.0 MB; lowest MemAvailable 403.9 MB
"""


def run(*args):
    """Run a command in this process; return its exit code, stdout and stderr."""
    session = Session(io.StringIO(), io.StringIO())
    parser = main._parser(args)
    options = parser.parse_args(args)
    module = {"timeline": timeline, "explain": explain}[args[0]]
    code = module.run(options, session)
    return code, session.out.getvalue(), session.err.getvalue()


def child(*args, **kwargs):
    command = [sys.executable, "-m", "calve", *args]
    return subprocess.run(command, capture_output=True, timeout=60, **kwargs)


def phase(at_s, name):
    return Evidence("phase", at_s, {"n": name}).dump() + "\n"


def fail(at_s, **fields):
    return Evidence("fail", at_s, fields).dump() + "\n"


@pytest.fixture
def log(tmp_path):
    def write(text):
        path = tmp_path / "console.log"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# timeline


def test_a_real_console_as_text():
    assert run("timeline", str(DATA / "webserver.log")) == (0, SHOWN, "")


def test_from_stdin_without_a_utf8_terminal():
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = child("timeline", "-", input=(DATA / "webserver.log").read_bytes(), env=env)
    assert done.returncode == 0
    assert done.stdout.decode("ascii") == SHOWN.replace("━", "=")
    assert done.stderr == b""


def test_ctrl_c_ends_the_wait_for_more():
    command = [sys.executable, "-m", "calve", "timeline", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"." * (1 << 20))  # more than a pipe holds: it is being read
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"interrupted\n"


def test_as_json():
    code, out, _ = run("timeline", str(DATA / "webserver.log"), "--json")
    (boot,) = json.loads(out)["boots"]
    assert code == 0
    assert boot["outcome"] == "ready"
    assert boot["phases"][5] == {
        "name": "pull",
        "begin_s": 8.45,
        "seconds": 22.22,
        "share": 0.7212,
        "open": False,
        "gap": False,
    }
    assert (boot["fetched_bytes"], boot["fetched_bytes_per_s"]) == (50596432, 2277067)
    assert (boot["agent_peak_mb"], boot["lowest_available_mb"]) == (34.0, 403.9)
    assert (boot["failure"], boot["seconds"]) == (None, 30.81)


def test_a_picture(tmp_path):
    code, out, _ = run("timeline", str(DATA / "webserver.log"), "--svg", str(tmp_path / "x.svg"))
    root = ElementTree.fromstring((tmp_path / "x.svg").read_bytes())
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert (code, out) == (0, SHOWN)
    assert {
        "pull",
        "  22.22 s   72.1%",
        "boot 1: handed over to the system, last heard of at 30.8 s",
    } <= set(texts)


def test_a_failure_is_explained(log):
    path = log(
        phase(2, "network") + fail(5, code="disk-fault", phase="network", message="no \x1b[31mdisk")
    )
    _, out, _ = run("timeline", path)
    assert "boot 1: failed after 5.0 s: disk-fault" in out
    assert "disk-fault in phase network: no \ufffd[31mdisk" in out
    assert "  What to do     " in out
    failure = json.loads(run("timeline", path, "--json")[1])["boots"][0]["failure"]
    assert failure == {
        "code": "disk-fault",
        "phase": "network",
        "message": "no \x1b[31mdisk",
        "text": Code.DISK_FAULT.text,
        "transient": False,
    }


def test_a_code_of_a_later_version_is_shown(log):
    path = log(fail(5, code="later\n", phase="x"))
    _, out, _ = run("timeline", path)
    assert "later  in phase x: \n" in out
    assert "this version of Calve does not know the code" in out
    assert json.loads(run("timeline", path, "--json")[1])["boots"][0]["failure"]["text"] is None


def test_what_is_not_known_is_said():
    _, out, _ = run("timeline", str(DATA / "crash.log"))
    assert "neither ready nor failed" in out
    assert "last on the console:\n" in out
    assert "  ImportError: cannot import name" in out
    assert "cannot be read" not in out


def test_gaps_and_damage_are_said(log):
    _, out, _ = run("timeline", log(phase(2, "network") + '@@calve {"v":\n' + phase(5, "imds")))
    assert "network to agent" in out
    assert "1 line of evidence cannot be read" in out
    assert "...: no evidence says" in out


def test_the_last_boots_of_many_are_shown(log):
    _, out, err = run("timeline", log((phase(2, "network") + phase(3, "agent")) * 103))
    assert err == "the first 3 boots of the log are left out\n"
    assert out.count("boot ") == 100
    assert out.startswith("boot 4: ")


@pytest.mark.parametrize("text", ["", "login:", "[    0.000000] Linux version 6\n@@calve {\n"])
def test_no_evidence_is_exit_5(log, text):
    with pytest.raises(NotFoundError, match="no evidence"):
        run("timeline", log(text))


def test_what_cannot_be_opened(tmp_path):
    for path in (tmp_path / "none", DATA / "crash.log" / "none", Path("i-0123456789abcdef0z")):
        with pytest.raises(NotFoundError, match="no such file"):
            run("timeline", str(path))
    with pytest.raises(UsageError, match="directory"):
        run("timeline", str(tmp_path))
    done = child("timeline", str(DATA / "crash.log"), "--svg", str(tmp_path / "none/x.svg"))
    assert done.returncode == 1
    assert b"cannot write the picture" in done.stderr


def test_a_pipe_that_nobody_writes_to_yet_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cancelled = Session(io.StringIO(), io.StringIO())
    cancelled.cancel.cancel()
    options = argparse.Namespace(source=str(tmp_path / "pipe"), svg=None, json=False)
    with pytest.raises(CancelledError):
        timeline.run(options, cancelled)


def test_the_output_of_a_command_that_has_ended_is_read():
    reader, writer = os.pipe()  # as in `calve timeline <(cat console.log)`
    os.write(writer, (DATA / "webserver.log").read_bytes())
    os.close(writer)
    done = child("timeline", f"/dev/fd/{reader}", pass_fds=[reader])
    os.close(reader)
    assert done.stdout.decode() == SHOWN


def test_an_instance_is_asked_for_its_console(monkeypatch, tmp_path):
    asked = []

    class Ec2:
        def __init__(self, session):
            asked.append(session)

        def console(self, instance_id):
            asked.append(instance_id)
            return (DATA / "webserver.log").read_text(encoding="utf-8")

    monkeypatch.setattr(calve.aws.ec2, "Ec2", Ec2)
    monkeypatch.setenv("AWS_REGION", "eu-west-3")  # boto itself does not read it
    monkeypatch.chdir(tmp_path)
    name = "i-0123456789abcdef0"
    assert run("timeline", name) == (0, SHOWN, "")
    assert (asked[0].region, asked[1:]) == ("eu-west-3", [name])
    Path(name).write_bytes((DATA / "webserver.log").read_bytes())  # a file goes first
    assert run("timeline", name) == (0, SHOWN, "")
    assert asked[1:] == [name]


# explain


def test_a_code_is_explained():
    code, out, _ = run("explain", "cache-denied")
    assert code == 0
    assert out.startswith(f"cache-denied: {Code.CACHE_DENIED.text}\n\nWhat happened  The cache")
    assert max(map(len, out.splitlines())) <= 100
    for name in ("The agent", "What to do", "Afterwards"):
        assert f"\n{name} " in out


def test_without_a_code_all_are_listed():
    _, out, _ = run("explain")
    rows = out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [code.value for code in Code]
    assert [row.split()[1] for row in rows] == ["yes" if code.transient else "no" for code in Code]


def test_explanations_as_json():
    one = json.loads(run("explain", "deadline", "--json")[1])
    assert (one["code"], one["transient"]) == ("deadline", True)
    assert all(one[name] for name in ("text", "happened", "agent", "remedy"))
    every = json.loads(run("explain", "--json")[1])["codes"]
    assert one in every
    assert len(every) == len(Code)


def test_another_code_is_exit_5_with_what_is_near():
    with pytest.raises(NotFoundError) as caught:
        run("explain", "cache-denid")
    assert caught.value.hint.startswith("did you mean cache-denied")
    done = child("explain", "\x1b[31m")
    assert done.returncode == 5
    assert b"\x1b" not in done.stderr
