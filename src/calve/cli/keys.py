"""`calve keys`: signing keys, in Nix's own format."""

from __future__ import annotations

import argparse
from pathlib import Path

from calve.cli import common
from calve.cli.session import Session

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    what = parser.add_subparsers(title="what", metavar="WHAT", dest="what", required=True)
    text = "make a key: the secret one into a new file, the public one to stdout"
    generate = what.add_parser("generate", help=text, description=text, allow_abbrev=False)
    generate.add_argument("name", metavar="NAME", help="of the key, such as acme-1")
    generate.add_argument(
        "--out", type=Path, metavar="FILE", help="for the secret key (default: NAME.sec)"
    )
    common.add_dry_run(generate)
    common.add_json(generate)
    text = "print the public key of a secret one"
    show = what.add_parser("show", help=text, description=text, allow_abbrev=False)
    show.add_argument("file", type=Path, metavar="FILE", help="with a secret key")
    common.add_json(show)


def run(options: argparse.Namespace, session: Session) -> int:
    """Generate or show."""
    return _generate(options, session) if options.what == "generate" else _show(options, session)


def _generate(options: argparse.Namespace, session: Session) -> int:
    from calve.errors import UsageError
    from calve.fleet import keys
    from calve.nix.signing import SecretKey

    key = SecretKey.generate(options.name)
    if options.out is None and "/" in options.name:
        raise UsageError("the key's name is not that of a file", hint="give --out FILE")
    out: Path = options.out or Path(f"{options.name}.sec")
    if options.dry_run:
        keys.check_new(out)
        if options.json:
            session.document({"name": key.name, "public": None, "file": str(out), "dry_run": True})
        else:
            session.result(f"would write a key {key.name} to {out}")
        return 0
    keys.write_file(key, out)
    public = key.public.dump()
    if options.json:
        session.document({"name": key.name, "public": public, "file": str(out), "dry_run": False})
    else:
        session.result(public)
        session.prose(f"the secret key is in {out}: keep it where only those who push can read it")
    return 0


def _show(options: argparse.Namespace, session: Session) -> int:
    from calve.fleet import keys

    key = keys.read_file(options.file).public
    if options.json:
        session.document({"name": key.name, "public": key.dump()})
    else:
        session.result(key.dump())
    return 0
