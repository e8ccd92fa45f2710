"""Which tensors of a tree are the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge as sm
from streammerge.pickles.state_dict import is_training_state, select


@pytest.mark.parametrize(
    ("tree", "label"),
    [
        ({"a.w": 1, "b.w": 1}, "(top level)"),
        ({"state_dict": {"w": 1}, "optimizer_states": [{"state": {0: {"exp_avg": 1}}}], "epoch": 3}, "state_dict"),
        ({"network_weights": {"w": 1}, "optimizer_state": {"state": {0: {"m": 1}}, "param_groups": []}}, "network_weights"),
        ({"dims": {}, "model_state_dict": {"w": 1}}, "model_state_dict"),
        ({"weight": {"w": 1}, "config": ["x"], "info": "x", "sr": "40k", "f0": 0}, "weight"),
        ({"best_state": {"w": 1}, "xp.cfg": "yaml"}, "best_state"),
        ({"model": None, "ema": {"w": 1}}, "ema"),
        ({"net": {"a": {"w": 1}, "b": {"module.w": 1}}, "optimizer": {"w": 1}}, "net.a + net.b"),
        ({"student": {"module.w": 1, "module.v": 1}, "teacher": {"w": 1, "v": 1}, "dino_loss": {"center": 1}}, "student"),
        ({"model": {"w": 1}, "model_avg": {"w": 1}, "sampler": {"x": 1}, "grad_scaler": {"s": 1}}, "model"),
        ({"model": {"language_model": {"embedding": {"w": 1}, "encoder": {"v": 1}}}, "rng_state": [1]},
         "model.language_model.embedding + model.language_model.encoder"),
        ({"model": {"w": 1, "version": "x"}, "criterion": {"w": 1}, "last_optimizer_state": {"state": {"a": 1}}}, "model"),
        ({"model": {"w": 1}, "optimizer": [{"state": {"0": {"exp_avg": 1}}}]}, "model"),
        ({"model": {"w": 1}, "rng": {"torch": 1, "cuda": [1]}, "losses": {"train": 1}, "hparams": {"w": 1}}, "model"),
        ({"model": {"w": 1}, "ema": {"decay": 0.9, "shadow_params": [1, 1]}, "cuda_rng_state_all": [1]}, "model"),
        ([1, 1], "(top level)"),
    ],
)  # fmt: skip
def test_the_state_dict_is_found_in_every_layout(tmp_path: Path, tree: Any, label: str) -> None:
    def with_tensors(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: with_tensors(v) for k, v in node.items()}
        if isinstance(node, list):
            return [with_tensors(v) for v in node]
        return torch.ones(2) if node == 1 and not isinstance(node, bool) else node

    torch.save(with_tensors(tree), tmp_path / "in.pt")
    index = sm.inspect(tmp_path / "in.pt")
    assert index.selection.label == label
    assert select(index.extras).label == label


@pytest.mark.parametrize(
    ("key", "value", "stale"),
    [
        ("optimizer", {}, True),
        ("optim_g", [], True),
        ("lr_scheduler", None, True),
        ("schedulers", [], True),
        ("optimizer_states", [], True),
        ("generator_optimizer", {}, True),
        ("optimizer_history", [], False),
        ("scaler", {"scale": 1024.0}, True),
        ("scaler", {}, True),
        ("scaler", {"mean_": 1.0}, False),
        ("opt", {"lr": 0.1}, False),
        ("opt", {"state": {0: {}}, "param_groups": []}, True),
        ("model", {"w": 1}, False),
        ("epoch", 3, False),
        (3, {}, False),
    ],
)
def test_what_is_stale_after_a_merge(key: Any, value: Any, stale: bool) -> None:
    assert is_training_state(key, value) is stale


def test_what_was_asked_for_and_is_not_there_is_told(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "epoch": 1}, tmp_path / "in.pt")
    for how in ({"state_dict": "generator"}, {"state_dict": "epoch"}, {"ema": "only"}):
        with pytest.raises(sm.RecipeError):
            sm.inspect(tmp_path / "in.pt", **how)
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(sm.FormatError):
        sm.inspect(tmp_path / "none.pt")
