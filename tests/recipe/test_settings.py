"""Values by filter and depth. Against mergekit: test_mergekit.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import RecipeError
from streammerge.methods.registry import find_method
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.settings import Case, Chain, Setting, constant, evaluate, is_same_for_all


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        (0.25, 0.7, 0.25),
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0, 0.5), 0.5, 1.0),
        ((0.0, 1.0, 0.5), 0.75, 0.75),
        ((3.0,), 0.4, 3.0),
        ((), 0.4, None),
        ((True, False), 0.9, True),
        ((True, False), 1.0, False),
    ],
)
def test_gradients(values: Any, t: float, expected: Any) -> None:
    assert evaluate((Case(values),), "any", t, lambda value: value) == expected


def test_the_first_filter_that_is_found_in_the_name_holds() -> None:
    setting = (Case(1.0, "mlp"), Case(2.0, "mlp.up"), Case(3.0, "*"), Case(4.0))
    found = [evaluate(setting, name, 0.0, float) for name in ("l.mlp.up", "l.up", "")]
    assert found == [1.0, 3.0, 3.0]
    assert evaluate(setting[:2], "l.up", 0.0, float) is None


def test_levels_are_asked_until_one_has_a_value() -> None:
    weight = find_method("linear").parameters["weight"]
    levels: list[dict[str, Setting]] = [{"weight": (Case(1.0, "mlp"),)}, {}, {"weight": (Case(2.0, "norm"),)}]
    levels += [{"weight": constant(3.0)}, {"weight": constant(4.0)}]
    chain = Chain(weight, levels)
    assert [chain.at(name, 0.0) for name in ("mlp.w", "norm.w", "head.w")] == [1.0, 2.0, 3.0]
    assert not chain.fixed
    assert Chain(weight, levels[:3]).at("head.w", 0.0) is None
    fixed = Chain(weight, levels[3:])
    assert (fixed.fixed, fixed.at("mlp.w", 0.5)) == (True, 3.0)
    assert Chain(weight, []).at("any", 0.0) is None


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        (constant(1.0), True),
        ((Case(1.0, "*"),), True),
        ((Case((1.0, 2.0)),), False),
        ((Case(1.0, "mlp"), Case(2.0)), False),
    ],
)
def test_what_is_the_same_for_all_tensors(setting: Setting, same: bool) -> None:
    assert is_same_for_all(setting) is same
    values = {evaluate(setting, name, t, float) for name in ("mlp", "x") for t in (0.0, 1.0)}
    assert (len(values) == 1) is same


def test_a_decimal_comma_is_told(tmp_path: Path) -> None:
    """YAML reads `{weight: 0,5}` as a weight of 0, and a key 5 without a value."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: linear\nmodels:\n  - model: a.pth\n    parameters: {weight: 0,5}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:4:28: 5 has no value; a decimal number has a point, as in 0\.5"):
        read_recipe(recipe)
    with pytest.raises(RecipeError, match=r"absent\.yaml does not exist"):
        read_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"is not a file; a recipe is a YAML file"):
        read_recipe(tmp_path)
