"""From a recipe to a plan: what is told of the output's place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.options.resources import Resources
from streammerge.recipe.arguments import recipe_of
from streammerge.requests.plans import output_warnings, planned
from streammerge.stores.locations import parse


def test_a_plan_tells_what_would_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.ones(1000)}, "a.safetensors")
    recipe = recipe_of(["a.safetensors"], "linear", None, None, {}, {})
    free = planned(recipe, parse("out.safetensors"), Resources(), "auto")
    assert output_warnings(free) == []
    assert output_warnings(planned(recipe, None, Resources(), "auto")) == []
    taken = planned(recipe, parse("a.safetensors"), Resources(workers=3), "auto")
    assert "a.safetensors exists" in output_warnings(taken)[0]
    monkeypatch.setattr(type(parse("out")), "free_bytes", lambda location: 10)
    assert "are needed where 10 bytes are free" in output_warnings(free)[0]


def test_state_dicts_cannot_be_converted_first(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    with pytest.raises(sm.RecipeError, match="`convert_first` converts files"):
        sm.plan([state], convert_first=tmp_path / "kept")


def test_a_run_is_not_warned_of_what_it_replaces(tmp_path: Path) -> None:
    for name in ("a", "b", "out"):
        save_file({"w": torch.ones(4)}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.safetensors"
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert "exists already" in sm.plan(inputs, out).warnings[0]
    assert sm.merge(inputs, out, overwrite=True).warnings == ()
    assert sm.convert(inputs[0], out, overwrite=True).warnings == ()
