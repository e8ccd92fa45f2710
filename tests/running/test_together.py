"""Several outputs in one read: which tensors are made together; the bytes are tested in tests/sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.errors import BudgetError
from streammerge.running.together import Together


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        save_file(trained(seed), path)
    return paths


def plans(inputs: list[Path], *asked: dict[str, Any]) -> list[sm.Plan]:
    return [sm.plan(inputs, integers="first", **each) for each in asked]


def test_equal_tensors_are_made_together(inputs: list[Path]) -> None:
    made = Together(plans(inputs[:2], {"weights": [1, 0]}, {"weights": [0, 1]}))
    assert sorted(task.out.name for task in made.tasks) == sorted(name for name in trained(0) if name != "empty")
    assert made.read_bytes == made.plans[0].read_bytes


def test_outputs_of_different_inputs_share_what_both_read(inputs: list[Path]) -> None:
    one, two = sm.plan(inputs[:2], integers="first"), sm.plan(inputs[1:], integers="first")
    made = Together([one, two])
    assert all(len(task.sources) == 3 for task in made.tasks)
    assert made.read_bytes * 2 == one.read_bytes * 3


def test_other_shapes_and_long_tensors_with_passes_are_made_alone(tmp_path: Path, inputs: list[Path]) -> None:
    long = torch.randn(5_000_000)
    for path in inputs[:2]:
        save_file({**trained(1), "long": long}, path)
    made = Together(plans(inputs[:2], *({"method": "slerp", "parameters": {"t": t}} for t in (0.2, 0.4))))
    assert "long" not in {task.out.name for task in made.tasks}
    assert "embed.weight" in {task.out.name for task in made.tasks}


def test_the_memory_of_all_outputs_is_counted(inputs: list[Path]) -> None:
    few, many = (Together(plans(inputs[:2], *[{"weights": [n, 1]} for n in range(count)])) for count in (2, 20))
    assert few.budget(256 << 20, 1)[0].peak_bytes < many.budget(256 << 20, 1)[0].peak_bytes
    with pytest.raises(BudgetError):
        many.budget(32 << 20, 1)
