"""Configurations of the inputs and of the output against their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


def folder(path: Path, layers: int = 3, **config: Any) -> Path:
    tensors = {f"model.layers.{n}.mlp.weight": torch.ones(4, 4) * n for n in range(layers)}
    path.mkdir()
    save_file({"model.embed_tokens.weight": torch.ones(6, 4), **tensors}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3, **config}))
    return path


def test_an_input_that_disagrees_is_told_and_refused_when_strict(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", num_nextn_predict_layers=1, vocab_size=7)
    plan = sm.plan([a, b], tmp_path / "out/")
    told = [note for note in plan.notes if "config.json" in note]
    assert [each.partition(": ")[0] for each in told] == [str(b), str(b)]
    with pytest.raises(
        sm.MismatchError, match=r"refuses this merge: .*vocab_size 7, and model.embed_tokens.weight has 6 rows"
    ):
        sm.plan([a, b], tmp_path / "out/", strict=True)


def test_equal_inputs_are_each_named(tmp_path: Path) -> None:
    places = [folder(tmp_path / name, vocab_size=7) for name in "ab"]
    told = [note for note in sm.plan(places, tmp_path / "out/").notes if "vocab_size" in note]
    assert [each.partition(": ")[0] for each in told] == [str(each) for each in places]


def test_the_output_is_compared_too(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", tie_word_embeddings=False, architectures=["LlamaForCausalLM"], vocab_size=6)
    save_file(
        {f"model.layers.{n}.mlp.weight": torch.ones(4, 4) for n in range(3)}
        | {"model.embed_tokens.weight": torch.ones(6, 4), "lm_head.weight": torch.ones(6, 4)},
        place / "model.safetensors",
    )
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(place), "parameters": {"weight": 1}}],
        "rules": [{"match": "lm_head.weight", "drop": True}],
    }
    told = [note for note in sm.plan(recipe=recipe, out=f"{tmp_path}/out/").notes if note.startswith("the output")]
    assert told == [
        "the output: config.json says that the head is not tied to model.embed_tokens.weight, and there is no head"
    ]
