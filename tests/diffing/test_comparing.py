"""The numbers of a comparison, against numpy's over whole arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from diffing.oracle import GRAIN, PIECE, Tensors, check, compared, draw, expected, near
from streammerge.events import RunFinished, RunStarted, TaskDone

SHAPES = [(), (0,), (1,), (3, 0), (7,), (9, 11), (GRAIN,), (GRAIN + 1,), (3, GRAIN + 5)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_two_floating_point_tensors_of_any_size(tmp_path: Path, io: str) -> None:
    a = {f"{dtype}{shape}".replace("torch.", ""): draw(shape, dtype, 1) for dtype in FLOATS for shape in SHAPES}
    a = {name.replace(".", "_"): tensor for name, tensor in a.items()}
    b = {name: near(tensor, 2) for name, tensor in a.items()}
    found = compared(tmp_path, a, b, io=io)
    assert len(found) == len(FLOATS) * len(SHAPES)
    for name, each in found.items():
        check(each, expected(a[name], b[name]))


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_the_changes_of_a_base(tmp_path: Path, io: str) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    base = {f"{dtype}{shape}".replace(".", "_"): draw(shape, dtype, 1) for dtype in dtypes for shape in SHAPES}
    a = {name: near(tensor, 2) for name, tensor in base.items()}
    b = {name: near(near(tensor, 2, 0.5), 3) for name, tensor in base.items()}
    base["sparse"], a["sparse"], b["sparse"] = torch.zeros(1000), torch.zeros(1000), torch.zeros(1000)
    a["sparse"][:30], b["sparse"][20:400] = 1.0, -2.0  # fewer changes than a tenth, and equal ones
    for name, each in compared(tmp_path, a, b, base, io=io).items():
        check(each, expected(a[name], b[name], base[name]))


def test_a_tensor_that_all_workers_share(tmp_path: Path) -> None:
    base = {"long": draw((2 * PIECE + GRAIN + 3,), torch.bfloat16, 1), "short": draw((5,), torch.float32, 1)}
    a, b = ({name: near(tensor, seed) for name, tensor in base.items()} for seed in (2, 3))
    for name, each in compared(tmp_path, a, b, base).items():
        check(each, expected(a[name], b[name], base[name]))
    check(compared(tmp_path, a, b)["long"], expected(a["long"], b["long"]))


def test_numbers_depend_on_inputs_alone(tmp_path: Path) -> None:
    base = {"long": draw((PIECE + 3 * GRAIN + 3,), torch.float32, 1), "other": draw((300, 700), torch.float16, 1)}
    a, b = ({name: near(tensor, seed) for name, tensor in base.items()} for seed in (2, 3))
    ways: list[dict[str, Any]] = [{"workers": 1}, {"workers": 3, "io": "pread"}, {"workers": 2, "executor": "processes"}]
    ways.append({"workers": 2, "memory": "80MiB"})
    first, *others = ([each.sums for each in compared(tmp_path, a, b, base, **way).values()] for way in ways)
    assert all(other == first for other in others)


def test_layers_and_the_model_leave_integers_out_of_norms(tmp_path: Path) -> None:
    a = {"m.0.w": torch.ones(4), "m.0.steps": torch.tensor(10**6), "m.1.w": torch.ones(4), "head.w": torch.ones(2)}
    b = a | {"m.0.w": 2 * torch.ones(4), "m.0.steps": torch.tensor(5)}
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    diff = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    layers = {layer.name: layer for layer in diff.layers}
    assert {name: (layer.relative, layer.different, layer.tensors) for name, layer in layers.items()} == {
        "m.0": (1.0, 2, 2),
        "m.1": (0.0, 0, 1),
        "head": (0.0, 0, 1),
    }
    assert diff.relative == pytest.approx((4 / 10) ** 0.5)
    assert (diff.elems, diff.sums.differing, diff.equal) == (11, 5, False)


def test_a_compressed_archive_and_state_dicts_in_memory(tmp_path: Path, compressed: Callable[[Tensors], Path]) -> None:
    a, b = ({"x": draw((300, 301), torch.float32, seed)} for seed in (1, 2))
    check(sm.diff(compressed(a), b).tensors[0], expected(a["x"], b["x"]))


@pytest.fixture
def compressed(tmp_path: Path) -> Callable[[Tensors], Path]:
    from conftest import deflate

    def make(tensors: Tensors) -> Path:
        torch.save(tensors, tmp_path / "plain.pth")
        return deflate(tmp_path / "plain.pth", tmp_path / "packed.pth")

    return make


def test_events_and_the_memory_budget(tmp_path: Path) -> None:
    a = {f"layers.{n}.w": draw((1000, 1000), torch.float32, n) for n in range(12)}
    save_file(a, tmp_path / "a.safetensors")
    save_file({name: near(tensor, 9) for name, tensor in a.items()}, tmp_path / "b.safetensors")
    events: list[Any] = []
    diff = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", memory="48MiB", listener=events.append)
    long = {"long": draw((2 * PIECE + 3,), torch.bfloat16, 1)}
    pieces: list[Any] = []
    assert sm.diff(long, long, long, listener=pieces.append).read_bytes == 6 * (2 * PIECE + 3)
    assert [each.read_bytes for each in pieces if isinstance(each, TaskDone)] == [6 * PIECE, 6 * PIECE, 18]
    (started,) = (each for each in events if isinstance(each, RunStarted))
    assert (
        started.read_bytes == diff.read_bytes == sum(e.read_bytes for e in events if isinstance(e, TaskDone)) == 96 * 10**6
    )
    assert isinstance(events[-1], RunFinished)
    assert diff.peak_bytes < 48 << 20
    with pytest.raises(sm.BudgetError, match="at least"):
        sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", memory="2MiB")
