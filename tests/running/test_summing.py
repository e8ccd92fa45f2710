"""Sums by products: the bytes of the kernel, whatever the numbers, the weights and the way of reading."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.kernels.chunk import Slot
from streammerge.methods.linear import Combination, combination
from streammerge.planning import summed
from streammerge.planning.summed import summed_bytes
from streammerge.running import summing
from streammerge.running.summing import Summing
from streammerge.tensors.dtypes import DType

pytestmark = pytest.mark.usefixtures("uncompiled")

DTYPES = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32}


class _Fresh:
    def get(self, slot: Slot, dtype: torch.dtype, elems: int) -> torch.Tensor:
        return torch.empty(elems, dtype=dtype)


class _Held:
    """Sources in memory."""

    def __init__(self, models: list[torch.Tensor]) -> None:
        self.models = models

    def place(self, source: int, start: int, stop: int) -> None:
        return None

    def fill(self, source: int, start: int, stop: int, out: memoryview) -> None:
        part = self.models[source][start:stop]
        out[:] = memoryview(part.view(torch.uint8).numpy()).cast("B")


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def mean(models: list[torch.Tensor], kernel: Combination) -> torch.Tensor:
    """The sum model by model, as the formula has it, in numpy's float64."""
    weights = [*([kernel.of_base] if kernel.of_base else []), *kernel.weights]
    order = [*models[1:], models[0]] if kernel.of_base else models
    weights = [*weights[1:], weights[0]] if kernel.of_base else weights
    total = order[0].double().numpy() * weights[0]
    for each, weight in zip(order[1:], weights[1:], strict=True):
        total = total + each.double().numpy() * weight
    return torch.from_numpy(total if kernel.divisor == 1 else total / kernel.divisor)


def made(models: list[torch.Tensor], kernel: Combination, out: torch.dtype, start: int = 0) -> tuple[torch.Tensor, bool]:
    kind = next(kind for kind in DTYPES.values() if kind.torch == models[0].dtype)
    memory = memoryview(bytearray(summed_bytes(len(models), kind.element_bytes)))
    result = torch.empty(len(models[0]) - start, dtype=out)
    sums = Summing(kernel, kind, bool(kernel.of_base), memory, _Fresh(), _Held(models))
    return result, sums.sums(start, len(models[0]), result)


def uneven(count: int) -> list[float]:
    return [1 - math.sqrt((n + 1) / count) + 0.01 for n in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [6, 25, 200])
def test_the_bytes_are_those_of_the_sum_in_float64(dtype: str, out: torch.dtype, count: int) -> None:
    models = [torch.randn(50_003).to(DTYPES[dtype].torch) for _ in range(count)]
    kernel = combination(uneven(count), divisor=sum(uneven(count)))
    found, finite = made(models, kernel, out, start=77)
    assert finite
    assert torch.equal(bits(found), bits(mean(models, kernel).to(out)[77:]))


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_sums_that_lie_between_two_numbers_round_as_the_kernel_rounds(out: torch.dtype) -> None:
    """Means of eight numbers with few bits are exact, and many lie in the middle of two 16-bit numbers."""
    models = [torch.randint(-300, 300, (30_000,)).bfloat16() for _ in range(8)]
    kernel = combination([1.0] * 8, divisor=8.0)
    exact = mean(models, kernel)
    assert (exact.bfloat16().double() != exact).float().mean() > 0.1
    found, _ = made(models, kernel, out)
    assert torch.equal(bits(found), bits(exact.to(out)))


def test_sums_that_cancel_and_zeros_with_signs_are_the_kernels() -> None:
    half = [torch.randn(20_000).bfloat16() for _ in range(3)]
    models = [*half, *half]
    models[0][:50], models[3][:50] = -0.0, -0.0
    for each in models:
        each[5_000:9_000] = -0.0
        each[9_000:9_100] = 1e-40
        each[9_100] = 3e38
    weights = [0.3, 0.4, 0.7, -0.3, -0.4, -0.7]
    for kernel in (combination(weights), combination(weights[1:], of_base=0.3), combination([1e-200] * 6)):
        found, _ = made(models, kernel, torch.bfloat16)
        assert torch.equal(bits(found), bits(mean(models, kernel).bfloat16()))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_and_stays(odd: float) -> None:
    models = [torch.randn(9_000).half() for _ in range(7)]
    models[4][8_999] = odd
    kernel = combination([0.5] * 7)
    found, finite = made(models, kernel, torch.float16)
    assert not finite
    assert torch.equal(bits(found[:-1]), bits(mean(models, kernel).half()[:-1]))
    assert found[-1].isnan() if math.isnan(odd) else found[-1] == odd


def test_sums_that_overflow_are_not_called_finite() -> None:
    models = [torch.full((100,), 6e4).half() for _ in range(6)]
    found, finite = made(models, combination([1.0] * 6), torch.float16)
    assert not finite
    assert found.isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_magnitude_exceeds_the_bound(dtype: str) -> None:
    for scale in (1e-3, 1.0, 1.9, 2.1, 500.0):
        for elems in (1, 3, 5, 64, 1001):
            values = (torch.randn(elems) * scale).to(DTYPES[dtype].torch)
            octets = memoryview(values.view(torch.uint8).numpy()).cast("B")
            together = summing._any_bits(octets)
            assert values.abs().max().item() <= summing._largest(together, octets, DTYPES[dtype]) < math.inf


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.sampled(2)
def test_a_merge_has_the_same_bytes_with_and_without(
    executor: str, io: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are there: without memory for them the file is the same, and so it is model by model."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(9)]
    for path in paths:
        wide = {"long": torch.randn(700, 1003), "short": torch.randn(11)}
        save_file({**wide, "half": torch.randn(5, 7).half(), "brain": torch.randn(301, 1009).bfloat16()}, path)
    counted = list[int]()
    plain = Summing.sums
    monkeypatch.setattr(Summing, "sums", lambda self, a, b, out: counted.append(b - a) or plain(self, a, b, out))
    weights = uneven(9)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    sm.merge(paths, one, weights=weights, executor=executor, workers=2, io=io)
    assert executor == "processes" or sum(counted) == 35 + 301 * 1009
    monkeypatch.setattr(summed, "LEAST", 100)
    sm.merge(paths, other, weights=weights, workers=1, memory="64MiB")
    assert one.read_bytes() == other.read_bytes()
    tensors = [load_file(path) for path in paths]
    for name, found in load_file(one).items():
        total = np.zeros(tensors[0][name].shape)
        for each, weight in zip(tensors, weights, strict=True):
            total = total + each[name].double().numpy() * weight
        assert torch.equal(found, torch.from_numpy(total / sum(weights)).to(found.dtype))
