"""Differences from a base by compiled functions: the bits that torch makes, operation by operation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from streammerge.compiled import library
from streammerge.kernels.group import TensorGroup
from streammerge.methods.registry import find_method
from streammerge.methods.task_arithmetic import _Mixed

pytestmark = pytest.mark.skipif(library.library() is None, reason="the package was built without a C compiler")
MERGES: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {"weight": [0.3, 0.7, 0.5]}),
    ("task_arithmetic", {"weight": [0.3, 0.7, 0.5], "normalize": True, "lambda": 1.0}),
    ("dare_linear", {}),
    ("dare_linear", {"normalize": True, "rescale": False}),
    ("dare_linear", {"density": [1.0, 1.0, 1.0]}),
    ("dare_linear", {"density": [0.0, 0.9, 0.1]}),
    ("dare_ties", {}),
    ("dare_ties", {"normalize": True}),
    ("dare_ties", {"normalize": True, "weight": [1.0, -0.5, 0.2]}),
    ("dare_ties", {"normalize": True, "weight": [0.0, 1.0, 0.0]}),
    ("dare_ties", {"normalize": True, "weight": [1.0, 1e-50, 1e-40]}),
    ("dare_ties", {"normalize": True, "weight": [1.0, -1e-50, 0.5]}),
]


def group_of(count: int, elems: int, dtype: torch.dtype, kinds: tuple[torch.dtype, ...] = ()) -> TensorGroup:
    drawn = torch.Generator().manual_seed(elems)
    base = torch.randn(elems, generator=drawn).to(dtype)
    models = [(base.float() + 0.1 * torch.randn(elems, generator=drawn)).to(dtype) for _ in range(count)]
    models[0][: elems // 3] = base[: elems // 3]
    base[: elems // 5] = -0.0
    for each in models:
        each[: elems // 7] = 0.0
    models = [each.to(kind) for each, kind in zip(models, kinds or [dtype] * count, strict=True)]
    return TensorGroup.of(*models, base=base, seed=3, chunk_elems=1 << 16)


def kernel_of(group: TensorGroup, name: str, given: dict[str, Any]) -> Any:
    values = {"weight": [0.3, 0.7, 0.5], **({} if name == "task_arithmetic" else {"density": [0.5, 1.0, 0.3]})}
    values = {"lambda": 0.8, **values, **given}
    own = {key: value[: group.models] if isinstance(value, list) else value for key, value in values.items()}
    method = find_method(name)
    return method.bind(group, method.resolve(own, group.models))


def put(group: TensorGroup, kernel: Any, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    out = torch.empty(group.elems, dtype=dtype)

    def step(look: Any, chunks: Any) -> list[bool]:
        return [kernel.put_compiled(chunk, out[chunk.start : chunk.stop]) for chunk in chunks]

    done = [each for piece in group.sweep(lambda chunk: [], step, 0, group.elems) for each in piece]
    return out, all(done)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("elems", [1, 769, 70_001])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("number", range(len(MERGES)))
@pytest.mark.sampled(4)
def test_merges_have_the_bits_of_torch(
    number: int, count: int, elems: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(count, elems, dtype)
    found, done = put(group, kernel_of(group, *MERGES[number]), dtype)
    assert done
    monkeypatch.setattr(library, "_loaded", lambda: None)
    wanted = group.merged(kernel_of(group, *MERGES[number])).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), wanted.view(bits))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_models_of_other_dtypes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(3, 70_001, torch.bfloat16, (torch.float32, torch.bfloat16, torch.float16))
    found, done = put(group, kernel_of(group, name, {}), torch.float32)
    assert done
    monkeypatch.setattr(library, "_loaded", lambda: None)
    assert torch.equal(found, group.merged(kernel_of(group, name, {})))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_torch(odd: float) -> None:
    base, model = torch.zeros(1000), torch.ones(1000)
    model[900] = odd
    group = TensorGroup.of(model, base=base)
    _, done = put(group, kernel_of(group, "task_arithmetic", {"weight": [0.5]}), torch.float32)
    assert not done
    rounded = TensorGroup.of(torch.full((1000,), 65519.0), base=torch.full((1000,), 65488.0))
    for weight, wanted in ((1.0, True), (1.05, False)):  # 65,520 is the least that is infinite as a half
        kernel = kernel_of(rounded, "task_arithmetic", {"weight": [weight], "lambda": 1.0})
        assert put(rounded, kernel, torch.float16)[1] is wanted
    large = TensorGroup.of(torch.full((1000,), 3e38), base=torch.full((1000,), -3e38))
    assert not put(large, kernel_of(large, "task_arithmetic", {"weight": [0.5]}), torch.float32)[1]


def test_what_it_cannot_take_is_left_to_torch() -> None:
    wide = group_of(2, 100, torch.float64)
    kernel = kernel_of(wide, "dare_linear", {})
    assert isinstance(kernel, _Mixed)
    assert not put(wide, kernel, torch.float64)[1]
    many = group_of(17, 100, torch.float32)
    assert not put(many, kernel_of(many, "task_arithmetic", {"weight": [0.5] * 17}), torch.float32)[1]
    group = group_of(2, 100, torch.float32)
    assert not put(group, kernel_of(group, "ties", {}), torch.float32)[1]
    assert not put(group, kernel_of(group, "dare_linear", {}), torch.float64)[1]
