"""`calve explain`: what a failure code means, and what to do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli.session import Session
from calve.errors import NotFoundError

if TYPE_CHECKING:
    from calve.contract.codes import Code

__all__ = ["arguments", "page", "run"]

_COLUMNS = 100


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="a failure code; without it, all of them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace, session: Session) -> int:
    """Explain a code, or list all."""
    from calve.contract.codes import Code

    if options.code is not None:
        code = _code(options.code)
        if options.json:
            session.document(_document(code))
        else:
            session.result(f"{code.value}: {code.text}")
            session.result("")
            session.result("\n".join(page(code.value)))
    elif options.json:
        session.document({"codes": [_document(code) for code in Code]})
    else:
        from calve.ui.table import table

        rows = [(code.value, "yes" if code.transient else "no", code.text) for code in Code]
        table(rows, ("CODE", "TRANSIENT", "WHY"), session.out)
    return 0


def page(code: str) -> list[str]:
    """Return the lines that explain a code, for people; none where it is not known."""
    import textwrap

    from calve.contract import explain

    found = explain.explain(code)
    if found is None:
        return []
    rows = (
        ("What happened", found.happened),
        ("The agent", found.agent),
        ("What to do", found.remedy),
        ("Afterwards", explain.AFTER),
    )
    lines = []
    for name, text in rows:
        lines += textwrap.wrap(
            text,
            _COLUMNS,
            initial_indent=f"{name:<15}",
            subsequent_indent=" " * 15,
            break_on_hyphens=False,
            break_long_words=False,
        )
    return lines


def _code(text: str) -> Code:
    from calve.contract.explain import EXPLANATIONS, known

    found = known(text)
    if found is not None:
        return found
    import difflib

    near = difflib.get_close_matches(text, [code.value for code in EXPLANATIONS], n=3)
    raise NotFoundError(
        "no such failure code",
        place=text,
        hint=f"did you mean {' or '.join(near)}?" if near else "`calve explain` lists all",
    )


def _document(code: Code) -> dict[str, object]:
    from calve.contract.explain import explain

    found = explain(code.value)
    return {
        "code": code.value,
        "text": code.text,
        "transient": code.transient,
        "happened": None if found is None else found.happened,
        "agent": None if found is None else found.agent,
        "remedy": None if found is None else found.remedy,
    }
