"""The functions of the Python API: which arguments they take and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm


def test_listeners_hear_what_happens(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    heard: list[object] = []
    result = sm.merge(voices, tmp_path / "voice.pth", listener=heard.append)
    done = [event for event in heard if type(event).__name__ == "TaskDone"]
    assert sum(event.written_bytes for event in done) == sum(t.out.nbytes for t in result.plan.tasks)  # type: ignore[attr-defined]
    assert {event.tensor for event in done} == {f"xtts.{n}" for n, t in trained(1).items() if t.numel()}  # type: ignore[attr-defined]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        save_file({"w": torch.full((5,), float(number)), "s": torch.tensor(1.0), "e": torch.empty(0)}, name)
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_inputs_are_paths_globs_weights_by_path_or_state_dicts(pair: list[Path], tmp_path: Path) -> None:
    held = [load_safetensors(path) for path in pair]
    for number, inputs in enumerate((pair, tuple(map(str, pair)), "?.safetensors", held, [pair[0], held[1]], iter(pair))):
        sm.merge(inputs, f"out{number}.safetensors")
        assert load_safetensors(tmp_path / f"out{number}.safetensors")["w"].tolist() == [0.5] * 5
    sm.merge({"a.safetensors": 1, "b.safetensors": 3}, "weighted.safetensors")
    assert load_safetensors(tmp_path / "weighted.safetensors")["w"].tolist() == [0.75] * 5


def test_a_plan_of_a_yaml_file_is_that_of_the_recipe(pair: list[Path], tmp_path: Path) -> None:
    wish = {"merge_method": "linear", "models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}]}
    (tmp_path / "r.yaml").write_text(json.dumps(wish))
    plans = [sm.plan("r.yaml"), sm.plan(recipe="r.yaml")]
    plans += [sm.plan(recipe=wish), sm.plan(["a.safetensors", "b.safetensors"])]
    assert [plan.recipe.to_dict() for plan in plans] == [wish] * 4
    assert sm.plan(recipe="r.yaml", seed=3).recipe.seed == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1, 2], "ema_decay": 0.5}, "`ema_decay` gives the weights"),
        ({"normalize": True, "parameters": {"normalize": False}}, "`normalize` and the parameter normalize"),
        ({"inputs": {"a.safetensors": 1, "b.safetensors": None}}, "b.safetensors has no number"),
        ({"inputs": {"a.safetensors": 1}, "weights": [1]}, "leave `weights` out"),
        ({"inputs": [3]}, "`inputs` takes a path, not 3"),
        ({"inputs": []}, "nothing to merge"),
        ({"inputs": (), "recipe": {"merge_method": "linear"}, "weights": [1]}, "weights beside a recipe"),
        ({"inputs": [{"w": torch.ones(1)}], "convert_first": "kept"}, "`convert_first` converts files"),
        ({"out": 3}, "`out` takes a path, not 3"),
        ({"out": None}, "pass `out`"),
        ({"listener": 3}, "`listener` takes a function"),
    ],
    ids=str,
)
def test_arguments_that_contradict_are_refused_and_nothing_is_written(
    arguments: dict[str, Any], words: str, pair: list[Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(sm.RecipeError, match=words):
        sm.merge(**{"inputs": pair, "out": "out.safetensors", **arguments})
    assert sorted(tmp_path.iterdir()) == before


def test_a_state_dict_in_memory_is_inspected_and_converted(tmp_path: Path) -> None:
    state = {"model": trained(1), "step": 7}
    assert (len(sm.inspect(state)), sm.inspect(state).plain_data()) == (len(trained(1)), {"step": 7})
    sm.convert(state, tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), dict(trained(1)))
    verified = sm.verify(tmp_path / "out.safetensors")
    assert not verified.recomputed
    assert "was in memory when it was merged" in verified.notes[0]
    with pytest.raises(sm.VerifyError, match="cannot be computed again"):
        sm.verify(tmp_path / "out.safetensors", sample="5%")
