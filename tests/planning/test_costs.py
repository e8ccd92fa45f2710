"""The memory that tasks take: how inputs are read follows from it, and copies take none."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.costs import budget_of
from streammerge.stores import descriptors


@pytest.fixture
def plan(tmp_path: Path) -> sm.Plan:
    for number in (1, 2):
        save_file(trained(number), tmp_path / f"{number}.safetensors")
    return sm.plan([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path / "out.safetensors", workers=2)


def test_the_budget_of_a_plan_is_that_of_its_tasks(plan: sm.Plan) -> None:
    assert budget_of(plan.tasks, plan.memory_bytes, 2, "mmap") == (plan.budget, plan.io)
    both, _ = budget_of(plan.tasks, plan.memory_bytes, 2, "mmap", planned=plan.tasks)
    assert both.peak_bytes > plan.budget.peak_bytes, "tasks that are planned too are held in memory"


def test_inputs_are_read_where_they_cannot_be_mapped(plan: sm.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, io = budget_of(plan.tasks, plan.memory_bytes, 2, "mmap")
    assert (io, mapped.cost.read, mapped.cost.mapped) == ("mmap", 0, 8), "counters are int64"
    monkeypatch.setattr(descriptors, "mapped_at_once", lambda workers: 2 * workers - 1)
    read, io = budget_of(plan.tasks, plan.memory_bytes, 2, "mmap")
    assert (io, read.cost.read, read.cost.mapped) == ("pread", 8, 0)


def test_too_little_memory_names_what_is_enough(plan: sm.Plan) -> None:
    with pytest.raises(sm.BudgetError, match=r'pass `memory="\d+MiB"` or more'):
        budget_of(plan.tasks, 1 << 20, 2, "mmap")


def test_what_is_copied_needs_no_buffers(tmp_path: Path, plan: sm.Plan) -> None:
    copied = sm.plan([tmp_path / "1.safetensors"], tmp_path / "out.safetensors", method="copy")
    assert copied.budget.cost == (0,) * 3 + (0, *copied.budget.cost[4:])
    assert copied.budget.cost.element_bytes == 0
