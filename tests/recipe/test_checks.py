"""Checks of a recipe that need no file. Every mistake with its line: test_reader.py."""

from __future__ import annotations

from typing import Any

import pytest

import streammerge as sm
from streammerge.methods.registry import find_method
from streammerge.recipe.checks import check, raise_all
from streammerge.recipe.fields import Path, Position, Problems
from streammerge.recipe.model import Model, Module, Recipe, Rule, Slice, SliceSource
from streammerge.recipe.patterns import parse_pattern
from streammerge.recipe.settings import constant

A, B, C = (Model(f"{name}.pth", path=("models", number)) for number, name in enumerate("abc"))
MATCH = (parse_pattern("*"),)


def found(method: str, *models: Model, **keys: Any) -> dict[Path, str]:
    problems = Problems()
    check(Recipe(find_method(method), models, **keys), problems)
    return dict(problems)


def slice_of(*ranges: tuple[int, int], **keys: Any) -> Slice:
    return Slice(tuple(SliceSource(f"{'abc'[n]}.pth", each) for n, each in enumerate(ranges)), path=("slices", 0), **keys)


@pytest.mark.parametrize(
    ("problems", "expected"),
    [
        (found("linear", A, B), {}),
        (found("ties", A, B, base_model="c.pth"), {}),
        (found("slerp", A, B, parameters={"t": constant(0.5)}), {}),
        (found("linear", slices=(slice_of((0, 2), (1, 3)),)), {}),
        (found("linear"), {(): "there is nothing to merge; a recipe has one of models, slices and modules"}),
        (
            found("linear", A, slices=(slice_of((0, 2)),)),
            {("slices",): "models and slices are given; a recipe has one of models, slices and modules"},
        ),
        (found("linear", modules={"m": Module()}), {("modules", "m"): "a module has either models or slices"}),
        (found("ties", A, B), {(): "ties needs the models' common ancestor; name it as the base"}),
        (found("slerp", A, B), {("merge_method",): "slerp needs the parameter t"}),
        (found("slerp", A, B, C, parameters={"t": constant(0.5)}), {("models",): "slerp merges exactly 2 models, not 3"}),
        (found("linear", A, B, base_model="c.pth"), {("base_model",): "linear takes no base"}),
        (found("linear", A, B, base_model="./a.pth"), {}),
        (found("linear", A, parameters={"x": constant(1)}), {("parameters", "x"): "linear has no parameter x"}),
        (
            found("linear", Model("a.pth", {"normalize": constant(True)}, path=("models", 0))),
            {("models", 0, "parameters", "normalize"): "normalize cannot differ between models"},
        ),
        (
            found("linear", slices=(slice_of((0, 2), (0, 3)),)),
            {("slices", 0): "all sources of a slice must have the same number of layers, not 2 of a.pth, 3 of b.pth"},
        ),
        (
            found("ties", slices=(slice_of((0, 2), (0, 2), base_model="x.pth"),)),
            {("slices", 0): "the base x.pth must be among the sources"},
        ),
        (
            found("linear", A, rules=(Rule(MATCH, copy="a.pth", drop=True, path=("rules", 0)),)),
            {("rules", 0): "a rule does one thing, not copy and drop"},
        ),
        (
            found("linear", A, B, rules=(Rule(MATCH, merge_method=find_method("ties"), path=("rules", 0)),)),
            {("rules", 0): "ties needs the models' common ancestor; name it as base_model"},
        ),
        (
            found("linear", A, B, rules=(Rule(MATCH, parameters={"t": constant(1)}, path=("rules", 0)),)),
            {("rules", 0, "parameters", "t"): "linear has no parameter t"},
        ),
    ],
)
def test_a_mistake_stands_at_its_key(problems: dict[Path, str], expected: dict[Path, str]) -> None:
    assert set(problems) == set(expected)
    for path, words in expected.items():
        assert words in problems[path]


def test_all_mistakes_are_raised_in_the_order_of_the_file_and_each_once() -> None:
    raise_all(Problems(), {})
    one = Problems([(("b",), "second"), (("a",), "first"), (("a",), "first")])
    positions = {("a",): Position("r.yaml", 2, 1), ("b",): Position("r.yaml", 10, 1)}
    with pytest.raises(sm.RecipeError) as caught:
        raise_all(one, positions, "r.yaml")
    assert str(caught.value).splitlines() == ["r.yaml has 2 mistakes:", "  r.yaml:2:1: first", "  r.yaml:10:1: second"]
    with pytest.raises(sm.RecipeError, match=r"^r\.yaml:2:1: first$"):
        raise_all(Problems(one[1:]), positions)
