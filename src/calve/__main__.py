"""The `calve` command: `python -m calve` or the installed script."""

import signal
import sys

# Before anything is imported: Ctrl-C while modules load is no traceback either.
try:
    from calve.cli.main import main
except KeyboardInterrupt:
    sys.exit(130)


def run() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    # All is closed: a further Ctrl-C must not change the exit code while the interpreter ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    run()
