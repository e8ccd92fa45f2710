"""Distances on a sample; how they are shown is tested in tests/reporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.planning.plan import Plan
from streammerge.requests.merging import Request
from streammerge.running.execution import Result, execute
from streammerge.running.measuring import added, distances
from streammerge.running.process import resident_bytes
from streammerge.running.session import RunOptions


def measured(inputs: list[Path], out: Path, **asked: Any) -> Result:
    plan: Plan = Request.of({"inputs": inputs, "out": out, "recipe": None, "base": None, **asked}).plan()
    return execute(plan, RunOptions(measures=True), resident_bytes())


@pytest.mark.parametrize("ways", [{"workers": 1}, {"workers": 3, "memory": "40MiB"}, {"io": "pread"}])
def test_the_sample_does_not_depend_on_how_it_is_made(tmp_path: Path, ways: dict[str, Any]) -> None:
    inputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(inputs):
        make = torch.Generator().manual_seed(seed)
        save_file({"long": torch.randn(2_200_001, generator=make), "s": torch.randn(7, generator=make)}, path)
    result = measured(inputs, tmp_path / "out.safetensors", weights=[0.3, 0.7], **ways)
    made = load_file(tmp_path / "out.safetensors")
    files = [load_file(path) for path in inputs]
    for number, task in enumerate(result.plan.tasks):
        name = task.out.name
        places = [n for n in range(made[name].numel()) if n % (1 << 20) < 1 << 10]
        assert result.measured[number][0] == len(places)
        for file, distance in zip(files, distances(result.measured[number]), strict=True):
            here, there = made[name][places].double(), file[name][places].double()
            assert distance == pytest.approx(float((here - there).norm() / there.norm()), rel=1e-9)


def test_sums_and_distances() -> None:
    assert added([], [1.0, 2.0]) == [1.0, 2.0]
    assert added([1.0, 2.0], [1.0, 3.0]) == [2.0, 5.0]
    assert distances([4.0, 9.0, 36.0, 0.0, 0.0, 1.0, 0.0]) == [0.5, 0.0, None]


def test_a_plain_merge_measures_nothing(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    inputs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    assert sm.merge(inputs, tmp_path / "out.safetensors").measured == {}
