"""A recipe with other parameters: which level they stand on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from streammerge.recipe.model import Recipe
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.varying import varied, varied_models

TWO = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
BASED = {"merge_method": "ties", "base_model": "base", "models": [{"model": m} for m in ("base", "a", "b")]}
SLICES = [{"sources": [{"model": m, "layer_range": [n, n + 1]} for m in ("a", "b")]} for n in range(2)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "base"):
        Path(name).touch()


def made(data: dict[str, Any], weights: list[float] | None = None, **parameters: Any) -> dict[str, Any]:
    read: list[Recipe] = []

    def vary(recipe: Recipe) -> Recipe:
        read.append(recipe)
        return varied(recipe, weights, parameters)

    found = read_recipe(data, vary=vary)
    assert len(read) == 1
    return found.to_dict()


def test_a_parameter_stands_under_those_of_the_recipe() -> None:
    gradient = {"density": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], "weight": 1}
    found = made({**BASED, "parameters": gradient}, density="0.3")
    assert found == {**BASED, "parameters": {"density": 0.3, "weight": 1}} | {"models": found["models"]}
    assert made({**BASED, "parameters": {"lambda": 0.5}}, lambda_=2)["parameters"] == {"lambda": 2.0}


def test_a_recipe_may_lack_what_varies() -> None:
    lacking = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(sm.RecipeError, match="slerp needs"):
        read_recipe(lacking)
    assert made(lacking, t="0.25")["parameters"] == {"t": 0.25}


@pytest.mark.parametrize("own", [{"models": TWO["models"]}, {"slices": SLICES}, {"modules": {"x": {"slices": SLICES}}}])
def test_weights_go_to_each_list_of_models(own: dict[str, Any]) -> None:
    found = made({"merge_method": "linear", **own}, [0.6, 0.4])

    def weights(data: Any) -> list[float]:
        if isinstance(data, dict):
            return ([data["parameters"]["weight"]] if "model" in data else []) + weights(list(data.values()))
        return [w for each in data for w in weights(each)] if isinstance(data, list) else []

    assert weights(found) == [0.6, 0.4] * (1 if "models" in own else 2)
    assert "weight" not in found.get("parameters", {})


def test_a_base_among_the_models_has_no_weight() -> None:
    found = made(BASED, [0.6, 0.4])
    assert [each.get("parameters") for each in found["models"]] == [None, {"weight": 0.6}, {"weight": 0.4}]
    assert made(BASED, density=[0.2, 0.7])["models"][2]["parameters"] == {"density": 0.7}
    read: list[Recipe] = []
    read_recipe(BASED, vary=lambda recipe: read.append(recipe) or recipe)
    assert [each.rpartition("/")[2] for each in varied_models(read[0])] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "weights", "parameters", "said"),
    [
        (TWO, [0.5], {}, "1 value of weight for 2 models"),
        (TWO, [0.5, 0.5], {"weight": 1}, "mean the same"),
        (TWO, None, {"density": 0.5}, "linear has no parameter density"),
        (TWO, None, {"normalize": [True, False]}, "one value for all models"),
        (TWO, None, {"weight": "much"}, "much"),
        ({**TWO, "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"]}, None, {"weight": 2}, "each model"),
        (
            {"merge_method": "slerp", "base_model": "a", "slices": [{**s, "parameters": {"t": 0.1}} for s in SLICES]},
            None,
            {"t": 0.2},
            "each slice or module of the recipe gives t itself",
        ),
    ],
)
def test_what_cannot_vary_is_refused(
    data: dict[str, Any], weights: list[float] | None, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(sm.RecipeError) as caught:
        made(data, weights, **parameters)
    assert said in str(caught.value)


def test_finer_levels_keep_theirs() -> None:
    some = [SLICES[0], {**SLICES[1], "parameters": {"t": 0.1}}]
    found = made({"merge_method": "slerp", "base_model": "a", "slices": some}, t=0.9)
    assert found["slices"][1]["parameters"] == {"t": 0.1}
    assert found["parameters"] == {"t": 0.9}
    partly = [{**each, "parameters": {"t": [{"filter": "mlp", "value": 0.1}]}} for each in SLICES]
    assert made({"merge_method": "slerp", "base_model": "a", "slices": partly}, t=0.9)["parameters"] == {"t": 0.9}
