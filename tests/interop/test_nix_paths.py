"""Store paths of texts, of references and of self-references, as Nix makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath, fixed_output, text_path


def evaluated(nix: Any, expression: str) -> str:
    text = nix.run("nix-instantiate", "--eval", "--json", "--read-write-mode", "-E", expression)
    value = json.loads(text)
    assert isinstance(value, str)
    return value


def test_text_without_references(nix: Any) -> None:
    path = evaluated(nix, 'builtins.toFile "note" "hello"')
    assert path == str(text_path("note", Hash.sha256(b"hello")))


def test_text_with_references(nix: Any) -> None:
    a = text_path("a", Hash.sha256(b"A"))
    b = text_path("b", Hash.sha256(b"B"))
    content = f"{a} and {b}"
    path = evaluated(
        nix,
        'let a = builtins.toFile "a" "A"; b = builtins.toFile "b" "B";'
        ' in builtins.toFile "c" "${a} and ${b}"',
    )
    assert path == str(text_path("c", Hash.sha256(content.encode()), [b, a]))
    assert nix.lines("nix-store", "-q", "--references", path) == sorted([str(a), str(b)])


BUILT = """
let dep = derivation { name = "dep"; system = builtins.currentSystem; builder = "/bin/sh";
      args = [ "-c" "echo dep > $out" ]; };
in derivation { name = "self-1.0"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo $out ${dep} > $out" ]; }
"""


def test_content_address_with_references_and_itself(nix: Any) -> None:
    """`make-content-addressed` says what it hashed, so that only the path is ours to find."""
    (built,) = nix.lines("nix-build", "--no-out-link", "-E", BUILT)
    answer = json.loads(nix.run("nix", "store", "make-content-addressed", "--json", built))
    path = StorePath.parse(answer["rewrites"][built])
    info = json.loads(nix.run("nix", "path-info", "--json", str(path)))[0]
    references = [StorePath.parse(text) for text in info["references"]]
    assert path in references
    assert len(references) == 2
    others = [reference for reference in references if reference != path]
    kind, _, content = info["ca"].partition(":r:")
    assert kind == "fixed"
    assert path == fixed_output(path.name, Hash.parse(content), others, self_reference=True)


def test_derivations_are_texts(nix: Any, tmp_path: Path) -> None:
    (path,) = nix.lines("nix-instantiate", "-E", BUILT)
    content = nix.real(path).read_bytes()
    references = nix.lines("nix-store", "-q", "--references", path)
    assert path == str(
        text_path(
            "self-1.0.drv", Hash.sha256(content), [StorePath.parse(text) for text in references]
        )
    )
