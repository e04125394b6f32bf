"""Start-up: CPU of `calve --help` and of the agent's imports, and what the latter load."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys

from benchmarks._rows import Row, child, finish, python

# Top-level names beyond the standard library that the agent may load (docs/reference/dependencies.md).
ALLOWED = {"calve", "backports", "nacl", "_cffi_backend", "_sodium"}
FORBIDDEN = {
    "argparse",
    "asyncio",
    "boto3",
    "botocore",
    "logging",
    "msgspec",
    "rich",
    "sqlite3",
    "subprocess",
}
_AGENT = "import calve.boot.main as m; m.import_everything()"


def _cpu_s(argv: list[str]) -> float:
    """Return the CPU seconds, user and system, of one run."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    child(argv)()
    return used() - before


def _median_ms(argv: list[str]) -> tuple[float, str]:
    times = sorted(1000 * _cpu_s(argv) for _ in range(11))
    return statistics.median(times), f"{times[0]:.0f}-{times[-1]:.0f}"


def _loaded() -> set[str]:
    code = f"{_AGENT}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    names = json.loads(subprocess.run(python(code), check=True, capture_output=True).stdout)
    bare = json.loads(
        subprocess.run(
            python("import sys, json; print(json.dumps(sorted(sys.modules)))"),
            check=True,
            capture_output=True,
        ).stdout
    )
    return {name.partition(".")[0] for name in set(names) - set(bare)}


def main() -> None:
    bare, _ = _median_ms([sys.executable, "-c", "pass"])
    help_ms, help_range = _median_ms([sys.executable, "-m", "calve", "--help"])
    agent_ms, agent_range = _median_ms(python(_AGENT))
    loaded = _loaded()
    foreign = sorted(
        name
        for name in loaded
        if (name not in ALLOWED and name not in sys.stdlib_module_names) or name in FORBIDDEN
    )
    finish(
        "startup (CPU of a fresh process, median of 11)",
        [
            Row("python -c pass", bare, "ms"),
            Row("calve --help", help_ms, "ms", None, None, help_range, "<= 100 ms", help_ms <= 100),
            Row(
                "the agent's imports",
                agent_ms,
                "ms",
                None,
                None,
                agent_range,
                "<= 150 ms",
                agent_ms <= 150,
            ),
            Row(
                "modules not in the design's list", len(foreign), "", required="0", met=not foreign
            ),
        ],
        [f"not in the list: {', '.join(foreign)}"] if foreign else [],
    )


if __name__ == "__main__":
    main()
