"""What a recipe says about the output's tokens survives reading, writing and renaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.vocabulary import TokenSource

TOKENS = {
    "<a>": {"source": "a"},
    "<b>": {"source": {"model": {"path": "b"}}, "force": True},
    "<c>": {"source": {"kind": "model_token", "model": "b", "token_id": 0}},
    "<d>": {"source": {"kind": "model_token", "model": "b", "token": "x"}},
    "<e>": {"source": {"kind": "zero"}},
    "<f>": {},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir(), Path("b").mkdir()
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def test_sources(recipe: dict[str, Any]) -> None:
    read = read_recipe(recipe | {"tokenizer": {"source": "b", "tokens": TOKENS, "pad_to_multiple_of": 8}})
    assert read.tokens is not None
    assert [each.source for each in read.tokens.tokens.values()] == [
        TokenSource("a"),
        TokenSource("b"),
        TokenSource("b", token_id=0),
        TokenSource("b", "x"),
        TokenSource(),
        None,
    ]
    assert [each.force for each in read.tokens.tokens.values()] == [False, True, False, False, False, False]
    written = read.to_dict()
    assert read_recipe(written).tokens == read.tokens
    moved = read.renamed({"a": "x/a", "b": "x/b"})
    assert moved.tokens is not None
    assert moved.tokens.models == ["x/b", "x/a", "x/b", "x/b", "x/b"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"source": {"kind": "model_token", "model": "a"}}, "either token or token_id"),
        ({"source": {"kind": "model_token", "model": "a", "token": "x", "token_id": 1}}, "either token or token_id"),
        ({"source": {"kind": "zero", "model": "a"}}, "unknown key model"),
        ({"source": "nowhere"}, "nowhere does not exist"),
        ({"soruce": "a"}, "did you mean source"),
    ],
)
def test_mistakes(recipe: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_recipe(recipe | {"tokenizer": {"tokens": {"<x>": more}}})
