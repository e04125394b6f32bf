from __future__ import annotations

from collections.abc import Mapping

import pytest

from calve.errors import DamagedError, NotFoundError
from calve.nix.closure import closure
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath, text_path


def path(name: str) -> StorePath:
    return text_path(name, Hash.sha256(name.encode()))


def found(graph: Mapping[str, str], *roots: str) -> list[str]:
    asked: list[str] = []

    def lookup(wanted: StorePath) -> PathInfo:
        asked.append(wanted.name)
        if wanted.name not in graph:
            raise NotFoundError("no", place=wanted)
        references = sorted(path(name) for name in graph[wanted.name].split())
        return PathInfo(wanted, Hash.sha256(b""), 1, tuple(references))

    infos = closure(map(path, roots), lookup)
    assert len(asked) == len(set(asked)) == len(infos)
    done: set[StorePath] = set()
    for info in infos:
        assert set(info.references) - {info.path} <= done
        done.add(info.path)
    return [info.path.name for info in infos]


def test_references_come_first() -> None:
    graph = {"top": "a b top", "a": "c", "b": "c", "c": "c", "alone": ""}
    assert set(found(graph, "top")) == {"top", "a", "b", "c"}
    assert found(graph, "top")[0] == "c"
    assert found(graph, "top")[-1] == "top"


def test_several_roots() -> None:
    graph = {"top": "a", "a": "", "alone": ""}
    assert found(graph, "alone", "a", "top", "top") == ["alone", "a", "top"]
    assert found(graph) == []


def test_deeper_than_the_stack() -> None:
    graph = {str(number): str(number + 1) for number in range(20_000)} | {"20000": ""}
    assert found(graph, "0")[0] == "20000"


@pytest.mark.parametrize("graph", [{"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b c"}])
def test_circles(graph: dict[str, str]) -> None:
    with pytest.raises(DamagedError, match="circle"):
        found(graph, "a")


def test_what_is_missing_passes() -> None:
    with pytest.raises(NotFoundError):
        found({"a": "b"}, "a")
