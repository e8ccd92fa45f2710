"""Which tensors are summed by products, and that the memory for it is in the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.budget import regions
from streammerge.planning.summed import LEAST, is_summed, sizes, summed_bytes

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.safetensors" for number in range(LEAST)]
    for path in found:
        save_file({"w": torch.randn(64, 64).bfloat16()}, path)
    return found


def test_many_models_are_summed_so(paths: list[Path], tmp_path: Path) -> None:
    for method in ("linear", "n_average", "ema"):
        plan = sm.plan(paths, tmp_path / "out.safetensors", method=method)
        assert all(map(is_summed, plan.tasks))
        assert plan.budget.summed_bytes == summed_bytes(LEAST, 2)


def test_others_take_no_memory_for_it(paths: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    mixed = tmp_path / "mixed.safetensors"
    save_file({"w": torch.randn(64, 64)}, mixed)
    for plan in (
        sm.plan(paths[1:], out),
        sm.plan(paths, out, method="median"),
        sm.plan(paths, out, compute_dtype="float32"),
        sm.plan([*paths, mixed], out),
        sm.plan([mixed] * LEAST, out),
    ):
        assert not any(map(is_summed, plan.tasks))
        assert plan.budget.summed_bytes == 0


def test_a_small_budget_does_without(paths: list[Path], tmp_path: Path) -> None:
    needed = [sm.plan(paths, tmp_path / "out.safetensors", memory=f"{mib}MiB").budget for mib in (24, 256)]
    assert [each.summed_bytes > 0 for each in needed] == [False, True]


@pytest.mark.parametrize("count", [6, 25, 1000, 5000])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_memory_holds_a_block(count: int, element_bytes: int) -> None:
    tile, block = sizes(count, element_bytes)
    assert tile > 0
    assert block % tile == 0
    assert summed_bytes(count, element_bytes) >= count * (tile * 8 + block * element_bytes) + block * 20


def test_the_region_of_a_worker_is_as_large_as_planned(paths: list[Path], tmp_path: Path) -> None:
    budget = sm.plan(paths, tmp_path / "out.safetensors").budget
    assert regions(budget)["summed"][1] == budget.summed_bytes
