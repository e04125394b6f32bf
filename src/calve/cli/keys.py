"""`calve keys`: signing keys, in Nix's own format, and the keyring of a cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.cache.keyring import Document
    from calve.cache.rekey import Change
    from calve.fleet.config import Cache
    from calve.nix.signing import Keyring, PublicKey, SecretKey

__all__ = ["arguments", "root_keys", "roots_of", "run"]


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
    text = "print a public key: that of a secret one, or one that is given"
    show = what.add_parser("show", help=text, description=text, allow_abbrev=False)
    show.add_argument(
        "source",
        nargs="?",
        metavar="KEY",
        help="a file with a secret or a public key, or NAME:BASE64 (default: the fleet file's signing key)",
    )
    common.add_json(show)
    common.add_config(show)
    for name, text, meaning in (
        ("add", "let a key count beside the root keys", "a public key, NAME:BASE64, or its file"),
        (
            "revoke",
            "let a key never count again",
            "a public key, NAME:BASE64, its file, or the name of one in the keyring",
        ),
    ):
        change = what.add_parser(name, help=text, description=text, allow_abbrev=False)
        change.add_argument("key", metavar="KEY", help=meaning)
        _add_cache(change)
        change.add_argument(
            "--root-key",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            help="a secret root key, which signs the keyring; may be repeated (default: the fleet file's)",
        )
        change.add_argument(
            "--sequence",
            type=common.between(1, (1 << 63) - 1),
            metavar="N",
            help="of the keyring: only where it was lost, or an old one put in its place (default: the next)",
        )
        common.add_dry_run(change)
        common.add_json(change)
        common.add_config(change)
    text = "list the keys that count for a cache, and those that were revoked"
    listed = what.add_parser("list", help=text, description=text, allow_abbrev=False)
    _add_cache(listed)
    common.add_json(listed)
    common.add_config(listed)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", metavar="URL", help="the cache (default: the fleet file's)")
    parser.add_argument(
        "--trusted",
        action="append",
        default=[],
        metavar="KEY",
        help="a public root key, NAME:BASE64; may be repeated (default: the fleet file's)",
    )


def run(options: argparse.Namespace, session: Session) -> int:
    """Do one of them."""
    actions = {"generate": _generate, "show": _show, "add": _change, "revoke": _change}
    return actions.get(options.what, _list)(options, session)


def _generate(options: argparse.Namespace, session: Session) -> int:
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

    if options.source is not None:
        key = keys.public(options.source)
    else:
        cache = common.cache_of(options, "source")
        if cache is None or cache.key is None:
            raise UsageError("no key to show", hint="give KEY, or cache.key in calve.toml")
        key = keys.read(cache.key, cancel=session.cancel).public
    if options.json:
        session.document({"name": key.name, "public": key.dump()})
    else:
        session.result(key.dump())
    return 0


# The keyring of a cache


def _url(options: argparse.Namespace, cache: Cache | None) -> str:
    text: str | None = options.cache or (None if cache is None else cache.url)
    if text is None:
        raise UsageError("no cache is named", hint="give --cache URL, or [cache] in calve.toml")
    return text


def root_keys(
    options: argparse.Namespace, cache: Cache | None, session: Session
) -> list[SecretKey]:
    """Read the secret root keys that are named: --root-key, else the fleet file's; none where none is."""
    from calve.fleet import keys

    if options.root_key:
        return [keys.read_file(path) for path in options.root_key]
    if cache is None or cache.root_key is None:
        return []
    return [keys.read(cache.root_key, cancel=session.cancel)]


def roots_of(options: argparse.Namespace, cache: Cache | None, signers: list[SecretKey]) -> Keyring:
    """Return the public root keys: --trusted, else the fleet file's, else those of the secret ones."""
    from calve.nix.signing import Keyring

    given = options.trusted or (() if cache is None else cache.trusted)
    if given:
        return Keyring.parse(given)
    return Keyring(tuple(key.public for key in signers))


def _change(options: argparse.Namespace, session: Session) -> int:
    from calve.cache.rekey import rekey
    from calve.cache.sequences import Sequences, directory, remember

    cache = common.cache_of(options, "cache", "root_key", "trusted")
    signers = root_keys(options, cache, session)
    if not signers:
        raise UsageError(
            "no root key", hint="give --root-key FILE, or cache.root-key in calve.toml"
        )
    roots = roots_of(options, cache, signers)
    add, revoke = _keys(options)
    memory = Sequences(directory())
    with common.caches(session, [_url(options, cache)]) as (objects,):
        change = rekey(
            objects,
            roots,
            signers,
            add=add,
            revoke=revoke,
            sequence=options.sequence,
            seen=memory.load(objects.url),
            dry_run=options.dry_run,
        )
        if not options.dry_run:
            remember(memory, {objects.url: change.document.sequence})
        _print(options, session, objects.url, change)
    return 0


def _print(options: argparse.Namespace, session: Session, url: str, change: Change) -> None:
    if options.json:
        told = {"cache": url, "dry_run": options.dry_run, "changed": change.changed}
        session.document({**told, **_document(change.document)})
        return
    verb = {"add": "added to", "revoke": "revoked in"}[options.what]
    if not change.changed:
        session.result(f"already {verb} the keyring of {url}")
        return
    would = "would be " if options.dry_run else ""
    session.result(f"{would}{verb} the keyring of {url}, number {change.document.sequence}")


def _keys(options: argparse.Namespace) -> tuple[list[PublicKey], list[PublicKey | str]]:
    """Return what to add and what to revoke."""
    from calve.errors import NotFoundError
    from calve.fleet import keys

    if options.what == "add":
        return [keys.public(options.key)], []
    try:
        return [], [keys.public(options.key)]
    except NotFoundError:
        return [], [options.key]


def _document(document: Document) -> dict[str, object]:
    return {
        "sequence": document.sequence,
        "added": [key.dump() for key in document.keys],
        "revoked": [key.dump() for key in document.revoked],
        "signed_by": [signature.name for signature in document.signatures],
    }


def _list(options: argparse.Namespace, session: Session) -> int:
    from calve.cache import keyring
    from calve.cache.keyring import Document
    from calve.cache.sequences import Sequences, directory, remember
    from calve.ui.table import table

    cache = common.cache_of(options, "cache", "trusted")
    roots = roots_of(options, cache, [])
    if not roots.keys:
        raise UsageError(
            "no root key is known, so the keyring cannot be verified",
            hint="give --trusted KEY, or cache.trusted in calve.toml",
        )
    memory = Sequences(directory())
    with common.caches(session, [_url(options, cache)]) as (objects,):
        document = keyring.read(objects, roots, seen=memory.load(objects.url))
        if document is not None:
            remember(memory, {objects.url: document.sequence})
    found = document or Document(0)
    counting = keyring.effective(roots, [found])
    if options.json:
        session.document(
            {
                "cache": objects.url,
                "trusted": [key.dump() for key in counting.keys],
                "roots": [key.dump() for key in roots.keys],
                **_document(found),
            }
        )
        return 0
    gone = {key.key for key in found.revoked}
    rows = [(key.name, "root", key.dump()) for key in roots.keys if key.key not in gone]
    rows += [(key.name, "added", key.dump()) for key in found.keys if key.key not in gone]
    rows += [(key.name, "revoked", key.dump()) for key in found.revoked]
    table(rows, ("key", "state", "public key"), session.out)
    session.prose(
        f"keyring {found.sequence} of {objects.url}"
        if document is not None
        else f"{objects.url} has no keyring: the root keys alone count"
    )
    return 0
