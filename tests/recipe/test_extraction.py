"""Recipes of extractions: what they cannot say, and ways that lead to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from adapters.arithmetic import base_of
from factoring.test_extraction import before, pair


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"rules": [{"match": "*", "copy": "tuned"}]}, "`rules` has no meaning for an extraction"),
        ({"output": {"max_shard_size": "5GB"}}, "`max_shard_size` has no meaning for an extraction"),
        ({"base_model": None}, "extract needs the models' common ancestor"),
        ({"models": ["tuned", "base2"]}, "extract merges exactly 1 model"),
        ({"extract": {"energy": 2}}, "energy takes a share above 0, up to 1, not 2"),
        ({"extract": {"rank": 2}}, "unknown key rank"),
        ({"merge_method": "ties"}, "add merge_method: extract"),
    ],
)
def test_mistakes_in_the_recipe_of_an_extraction(recipe: dict[str, Any], words: str) -> None:
    pair()
    base_of(before(), "base2")
    whole = {
        "merge_method": "extract",
        "models": ["tuned"],
        "base_model": "base",
        "extract": {"save_modules": True},
    }
    with pytest.raises(sm.RecipeError, match=words):
        sm.merge(recipe={**whole, **recipe}, out="made/")
    assert not Path("made").exists()


def test_other_ways_to_extract_name_the_right_one() -> None:
    pair()
    with pytest.raises(sm.RecipeError, match="`streammerge extract` does that"):
        sm.merge(["tuned"], "made/", base="base", method="extract")
    stage = {"merge_method": "extract", "models": ["tuned"], "base_model": "base"}
    with pytest.raises(sm.RecipeError, match="`streammerge extract` does that"):
        sm.merge(recipe={"merge_method": "linear", "models": ["tuned", "x"], "stages": {"x": stage}}, out="made/")
    with pytest.raises(sm.RecipeError, match="a plan of an adapter cannot be saved"):
        sm.plan(recipe=stage, out="made/", save="x.plan")
