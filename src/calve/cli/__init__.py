"""The command line: one file per command, adapters from arguments to calls and from events to rows.

It knows argparse, the terminal and the exit codes; it hands frozen values down and no argparse object.
Results go to stdout, prose to stderr; every command that shows something has `--json`.
Types: `Command` (a command's module), `Session` (streams, cancellation, progress of one call).
"""
