"""The arguments of a merge or a plan, read into one request."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import streammerge as sm
from streammerge.requests.merging import Request

DEFAULTS = {name: each.default for name, each in inspect.signature(sm.plan).parameters.items()}


def request(**given: Any) -> Request:
    return Request.of({**DEFAULTS, **given})


def test_a_request_holds_plain_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = request(inputs=["a", "b"], weights=numpy.array([1, 2]), workers=numpy.int64(3), last=torch.tensor(4), out="x")
    assert (made.inputs, made.merging.weights, made.resources.workers, made.choosing.last) == (["a", "b"], [1.0, 2.0], 3, 4)
    assert {type(made.resources.workers), type(made.choosing.last)} == {int}
    assert str(made.out) == "x"
    assert (request(inputs="r.yaml").inputs, request(inputs="r.yaml").recipe) == ([], "r.yaml")


def test_weights_come_once() -> None:
    assert request(inputs={"a": 1, "b": 2}).own_weights == [1.0, 2.0]
    with pytest.raises(sm.RecipeError, match="leave `weights` out"):
        request(inputs={"a": 1}, weights=[1])


def test_weights_follow_their_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (2, 10, 20):
        torch.save({"w": torch.full((2,), float(number))}, f"step-{number}.pt")

    def weights(inputs: Any, **choice: Any) -> dict[str, float]:
        models = request(inputs=inputs, **choice).plan().recipe.models
        return {each.model: float(each.parameters["weight"][0].value) for each in models}  # type: ignore[arg-type]

    given = {"step-10.pt": 0.7, "step-2.pt": 0.2, "step-20.pt": 0.1}
    assert weights(given) == given
    assert weights(given, last=3) == given  # chosen in the order of their numbers
    assert weights(given, last=2) == {"step-10.pt": 0.7, "step-20.pt": 0.1}
    assert weights([f"{path}:{weight}" for path, weight in given.items()], range="1:10", last=2) == {
        "step-2.pt": 0.2,
        "step-10.pt": 0.7,
    }
    assert weights({"step-?.pt": 0.5, "step-?0.pt": 0.25}) == {"step-2.pt": 0.5, "step-10.pt": 0.25, "step-20.pt": 0.25}


def test_a_recipe_names_its_models_itself(tmp_path: Path) -> None:
    wish = {"merge_method": "linear", "models": [{"model": "a"}]}
    for given in ({"inputs": ["a"]}, {"weights": [1]}, {"last": 2}, {"ema_decay": 0.5}, {"method": "ties"}):
        with pytest.raises(sm.RecipeError, match="beside a recipe"):
            request(recipe=wish, **given).plan()


def test_an_empty_text_is_not_the_current_folder() -> None:
    for name in ("out", "base", "convert_first"):
        with pytest.raises(sm.RecipeError, match=f"`{name}` takes a path"):
            request(inputs=["a"], **{name: "\ud800"})
        with pytest.raises(sm.RecipeError, match=f"`{name}` (is an empty text|takes a path, not an empty text)"):
            request(inputs=["a"], **{name: ""})


@pytest.mark.parametrize("name", ["method", "executor"])
def test_an_array_is_no_name(name: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(sm.RecipeError):
        request(inputs=[tmp_path / "a.pt"], **{name: numpy.array([1, 2])}).plan()


def test_a_merge_of_one_input_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, name)
    assert request(inputs=["a*.pt"]).plan().notes == ["a.pt is the only input, so nothing is merged with it"]
    assert not any("only input" in note for note in request(inputs=["a.pt", "b.pt"]).plan().notes)
