"""A recipe as text of the plan."""

from __future__ import annotations

import pytest

from streammerge.recipe.arguments import recipe_of
from streammerge.recipe.model import Recipe, Rule
from streammerge.recipe.patterns import parse_pattern
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.settings import Case, constant
from streammerge.recipe.summary import recipe_lines, rule_lines, weight_notes


def linear(*weights: float, **parameters: object) -> Recipe:
    return recipe_of([f"{'abc'[n]}.pth" for n in range(len(weights))], "linear", None, weights or None, parameters, {})


@pytest.mark.parametrize(
    ("weights", "shares"), [((3, 1), (0.75, 0.25)), ((1,), (1,)), ((1, 1, 1), (0.333333, 0.333333, 0.333333))]
)
def test_a_weight_is_shown_as_the_share_that_it_becomes(weights: tuple[float, ...], shares: tuple[float, ...]) -> None:
    assert recipe_lines(linear(*weights)) == [f"  {'abc'[n]}.pth  weight {share}" for n, share in enumerate(shares)]


def test_weights_that_are_used_as_given_are_shown_so() -> None:
    assert recipe_lines(linear(3, 1, normalize=False)) == [
        "  a.pth  weight 3",
        "  b.pth  weight 1",
        "with     normalize false",
    ]


def test_a_division_by_the_sum_is_noted_where_it_changes_something() -> None:
    assert weight_notes(linear(3, 1)) == [
        "the weights sum to 4 and are divided by it (`normalize=False` uses them as given)"
    ]
    for unchanged in (
        linear(0.75, 0.25),
        linear(3, 1, normalize=False),
        recipe_of(["a", "b"], "linear", None, None, {}, {}),
    ):
        assert weight_notes(unchanged) == []
    ties = recipe_of(["a", "b"], "ties", "c", [3, 1], {}, {})
    assert weight_notes(ties) == []


def test_the_base_stands_first() -> None:
    recipe = recipe_of(["a.pth", "longer.pth"], "ties", "base.pth", None, {"density": [0.5, 0.7], "normalize": True}, {})
    assert recipe_lines(recipe) == [
        "  base.pth    base",
        "  a.pth       density 0.5",
        "  longer.pth  density 0.7",
        "with     normalize true",
    ]
    listed = recipe_of(["a.pth", "base.pth"], "task_arithmetic", "base.pth", None, {}, {})
    assert [line.split() for line in recipe_lines(listed)] == [["base.pth", "base"], ["a.pth"]]


def test_slices_say_which_layers_come_from_where(models: object) -> None:
    sources = [{"model": "a.safetensors", "layer_range": [0, 2]}], [{"model": "b.safetensors", "layer_range": [5, 6]}]
    recipe = read_recipe({"merge_method": "passthrough", "slices": [{"sources": each} for each in sources]})
    assert recipe_lines(recipe) == [
        "  layers 0 to 1",
        "    a.safetensors  its 0 to 1",
        "  layers 2 to 2",
        "    b.safetensors  its 5 to 5",
    ]


def test_a_rule_is_a_line_with_what_it_took() -> None:
    weight = (Case(0.5, "mlp"), Case((0.25, 0.75)))
    rules = (
        Rule((parse_pattern("*.bias"),), drop=True),
        Rule((parse_pattern("q"),), parameters={"weight": weight, "normalize": constant(True)}),
    )
    recipe = Recipe(linear(1).merge_method, linear(1).models, rules=rules)
    assert rule_lines(recipe, [12, 0]) == [
        "rule     *.bias     12 left out",
        "rule     q           0 merged  with weight 0.5 for mlp, else [0.25, 0.75], normalize true",
    ]
    assert rule_lines(linear(1), []) == []
