"""What a .pth with only one state dict leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import streammerge as sm
from streammerge.planning.dispositions.pruned import pruned

ONES = torch.ones(2)
WEIGHTS = object()
"""Stands for a state dict of its own, since pickle writes one dictionary once."""
OPTIMIZER = {"state": {0: {"m": ONES}}, "param_groups": [{"lr": 1.0}]}


def with_weights(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: with_weights(value) for key, value in node.items()}
    return {"a.w": ONES, "b.w": ONES} if node is WEIGHTS else node


class Pair(NamedTuple):
    params: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("content", "key", "gone"),
    [
        ({"model": WEIGHTS, "ema": WEIGHTS, "step": 3, "config": {"a": [1]}}, "ema", ["model"]),
        ({"model": WEIGHTS, "optimizer": OPTIMIZER, "scheduler": {"last_epoch": 3}, "none": None}, "model",
         ["optimizer", "scheduler"]),
        ({"g": WEIGHTS, "d": WEIGHTS, "g_ema": WEIGHTS, "latent_avg": ONES}, "g_ema", ["g", "d"]),
        ({"all": {"net": WEIGHTS, "ema": {"shadow": [ONES]}}, "stats": {"mean": ONES}}, "all.net", ["all.ema", "stats"]),
        ({"all": {"a": WEIGHTS, "b": WEIGHTS, "n": 3}, "c": [ONES], "d": []}, "all", ["c"]),
        ({"a.w": ONES, "b.w": ONES, "ema": WEIGHTS, "optimizer": OPTIMIZER, "lr": 3}, "(top level)", ["ema", "optimizer"]),
        ({"model": WEIGHTS, "step": 3}, "model", []),
    ],
)  # fmt: skip
def test_state_dicts_beside_the_chosen_one_go(tmp_path: Path, content: Any, key: str, gone: list[str]) -> None:
    content = with_weights(content)
    torch.save(content, tmp_path / "in.pth")
    assert [name for name, _, _ in pruned(sm.inspect(tmp_path / "in.pth", state_dict=key))] == gone
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth", only=key)
    made = torch.load(tmp_path / "out.pth")
    for name in gone:
        *above, last = name.split(".")
        holder, had = made, content
        for part in above:
            holder, had = holder[part], had[part]
        assert last in had
        assert last not in holder
    assert set(made) == set(content) - set(gone)
    torch.save(made, tmp_path / "again.pth")
    assert not [*pruned(sm.inspect(tmp_path / "again.pth", state_dict=key))]


def test_no_bytes_of_what_goes_are_written(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(100_000)}, "ema": {"w": torch.zeros(100_000)}}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth", only="ema")
    assert (tmp_path / "out.pth").stat().st_size < 404_000
    assert torch.load(tmp_path / "out.pth")["ema"]["w"].sum() == 0
    assert sm.verify(tmp_path / "out.pth", sample=1.0).recomputed


def test_what_has_a_fixed_place_becomes_none(tmp_path: Path) -> None:
    torch.save(Pair({"w": ONES}, {"w": ONES}), tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth", only="0")
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert type(made) is Pair
    assert made[1] is None
    assert sum(each.nbytes for each in sm.inspect(tmp_path / "out.pth").container.storages.values()) == ONES.nbytes


def test_a_safetensors_file_has_the_one_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"w": ONES}, "ema": {"module.w": ONES * 2}}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", only="ema")
    assert [*sm.inspect(tmp_path / "out.safetensors")] == ["module.w"]
    with pytest.raises(sm.RecipeError, match="there is no state dict"):
        sm.convert(tmp_path / "in.pth", tmp_path / "none.pth", only="teacher")
    with pytest.raises(sm.RecipeError, match="leave `state_dict` out"):
        sm.convert(tmp_path / "in.pth", tmp_path / "none.pth", only="ema", state_dict="model")
