"""Which merges need no torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning import plain
from streammerge.planning.plain import needs_no_torch
from streammerge.tensors.dtypes import DType


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(plain, "sys", SimpleNamespace(modules={}))
    found = [tmp_path / f"{number}.safetensors" for number in range(7)]
    for number, path in enumerate(found):
        save_file({"w": torch.randn(64, 64), "h": torch.randn(9).half(), "n": torch.tensor([number // 7])}, path)
    return found


@pytest.mark.parametrize(
    ("inputs", "options", "wanted"),
    [
        (slice(2), {}, True),
        (slice(5), {"method": "n_average"}, True),
        (slice(1), {"out_dtype": "bfloat16"}, True),
        (slice(2), {"integers": "max"}, True),
        (slice(7), {}, False),  # summed by products
        (slice(2), {"method": "slerp", "parameters": {"t": 0.5}}, False),
        (slice(2), {"compute_dtype": "float32"}, False),
        (slice(2), {"out_dtype": "float8_e4m3fn"}, False),
    ],
)
@pytest.mark.usefixtures("uncompiled")
def test_sums_of_a_few_models_need_none(paths: list[Path], inputs: slice, options: dict[str, Any], wanted: bool) -> None:
    plan = sm.plan(paths[inputs], paths[0].parent / "out.safetensors", **options)
    assert plan.torch_needed
    assert needs_no_torch(plan.tasks) is wanted


def test_copies_through_readers_that_compute_need_it(paths: list[Path], tmp_path: Path) -> None:
    """A matrix that is stored with its columns one after the other is gathered by torch."""
    for name, matrix, wanted in (("rows", torch.randn(5, 7), True), ("columns", torch.randn(7, 5).t(), False)):
        torch.save({"w": matrix}, tmp_path / f"{name}.pth")
        plan = sm.plan([tmp_path / f"{name}.pth"], tmp_path / "out.safetensors", method="copy")
        assert all(task.verbatim for task in plan.tasks)
        assert needs_no_torch(plan.tasks) is wanted


def test_a_program_that_has_loaded_it_uses_it(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sm.plan(paths[:2], paths[0].parent / "out.safetensors")
    monkeypatch.setattr(plain, "sys", SimpleNamespace(modules={"torch": torch}))
    assert not needs_no_torch(plan.tasks)


def test_compiled_sums_of_many_models_and_numbers_need_none(
    paths: list[Path], compiled_or_not: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_MOST_SECONDS", 1e-12)
    assert needs_no_torch(sm.plan(paths[:7], paths[0].parent / "out.safetensors").tasks) is compiled_or_not
    options: dict[str, Any] = {"method": "slerp", "parameters": {"t": 0.5}}
    assert not needs_no_torch(sm.plan(paths[:2], paths[0].parent / "out.safetensors", **options).tasks)


@pytest.mark.usefixtures("uncompiled")
def test_where_numpy_takes_longer_than_the_loading_torch_is_loaded(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sm.plan(paths[:2], paths[0].parent / "out.safetensors")
    seconds = 3 * 64 * 64 * plain._SLOWER[DType.F32] + 3 * 9 * plain._SLOWER[DType.F16]
    for most, wanted in ((seconds * 1.01, True), (seconds * 0.99, False)):
        monkeypatch.setattr(plain, "_MOST_SECONDS", most)
        assert needs_no_torch(plan.tasks) is wanted


def test_without_numpy_torch_is_loaded(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sm.plan(paths[:2], paths[0].parent / "out.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "numpy", None)
    assert not needs_no_torch(plan.tasks)
