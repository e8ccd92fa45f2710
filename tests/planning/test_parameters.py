"""The parameters of a method for each tensor: the first level that says something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.parameters import ParameterValues, shares
from streammerge.planning.views import Part, make_parts
from streammerge.recipe.model import Recipe
from streammerge.recipe.reader import read_recipe

TENSORS = {f"layers.{n}.{part}.w": torch.ones(1) for n in range(5) for part in ("mlp", "attn")} | {"norm.w": torch.ones(1)}


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_file(TENSORS, tmp_path / f"{name}.safetensors")


def prepared(own: list[Any], **keys: Any) -> tuple[Recipe, Part]:
    listed = [{"model": f"{'ab'[n]}.safetensors", "parameters": each} for n, each in enumerate(own)]
    recipe = read_recipe({"merge_method": "linear", "models": listed, **keys})
    indexes = {each: sm.inspect(each.path) for each in recipe.checkpoints}
    return recipe, make_parts(recipe, indexes).parts[0]


def weights(recipe: Recipe, part: Part, name: str, absent: int | None = None, rule: Any = None) -> Any:
    sources = [None if number == absent else view.entries[name] for number, view in enumerate(part.views)]
    return tuple(ParameterValues(recipe, part).of(part.method, part.models, name, sources, rule)["weight"])


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ([{}, {}], {}, (1.0, 1.0)),
        ([{"weight": 3}, {}], {}, (3.0, 1.0)),
        ([{"weight": 3}, {}], {"weight": 2}, (3.0, 2.0)),
        ([{"weight": [{"filter": "mlp", "value": 5}, {"value": 6}]}, {"weight": 0.5}], {}, (5.0, 0.5)),
        ([{"weight": [{"filter": "attn", "value": 5}]}, {}], {"weight": 2}, (2.0, 2.0)),
    ],
)
def test_a_models_own_value_wins_over_the_recipes_and_both_over_the_default(
    own: list[Any], shared: dict[str, Any], expected: tuple[float, ...]
) -> None:
    assert weights(*prepared(own, parameters=shared), "layers.2.mlp.w") == expected


def test_a_gradient_runs_over_the_layers_and_begins_outside_them() -> None:
    recipe, part = prepared([{"weight": [1, 3]}, {}])
    found = [weights(recipe, part, f"layers.{n}.mlp.w")[0] for n in range(5)]
    assert found == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert weights(recipe, part, "norm.w")[0] == 1.0


def test_a_rules_list_is_one_value_per_model() -> None:
    recipe, part = prepared([{"weight": 9}, {}], rules=[{"match": "*", "parameters": {"weight": [0.25, 0.75]}}])
    assert weights(recipe, part, "norm.w", rule=recipe.rules[0]) == (0.25, 0.75)
    assert weights(recipe, part, "norm.w") == (9.0, 1.0)
    recipe, part = prepared([{}, {}], rules=[{"match": "*", "parameters": {"weight": [1, 2, 3]}}])
    with pytest.raises(sm.RecipeError, match="3 values of weight for 2 models"):
        weights(recipe, part, "norm.w", rule=recipe.rules[0])


def test_only_the_models_that_have_the_tensor_count() -> None:
    recipe, part = prepared([{"weight": 1}, {"weight": -1}])
    assert weights(recipe, part, "norm.w", absent=1) == (1.0,)
    with pytest.raises(sm.RecipeError, match="sum to zero"):
        weights(recipe, part, "norm.w")
    recipe, part = prepared([{"weight": 0}, {"weight": 1}])
    with pytest.raises(sm.RecipeError, match=r"for the inputs that have norm\.w: .*sum to zero"):
        weights(recipe, part, "norm.w", absent=1)


def test_values_are_resolved_once_for_all_tensors_with_the_same() -> None:
    recipe, part = prepared([{"weight": [1, 3]}, {}])
    values = ParameterValues(recipe, part)
    found = [values.of(part.method, part.models, n, [v.entries[n] for v in part.views], None) for n in TENSORS]
    assert len({id(each) for each in found}) == len(values.resolved) == 5


def test_numbers_beside_the_tensors_are_weighed_as_the_models() -> None:
    assert [share for _, share in shares(prepared([{"weight": 3}, {}])[1])] == [3.0, 1.0]
