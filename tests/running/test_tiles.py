"""Weighted sums of several outputs in tiles: the same numbers to the bit as each output's kernel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.kernels.group import TensorGroup
from streammerge.methods.linear import combination
from streammerge.running import tiles, together
from streammerge.running.tiles import Tiles

KERNELS = [
    combination([0.3, 0.7]),
    combination([1.0, 1.0], divisor=3.0),
    combination([1.0, -0.25], of_base=0.25),
    combination([0.1, 1.0], of_base=1.0, divisor=2.1),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_in_tiles_are_those_of_the_kernels(dtype: torch.dtype) -> None:
    base, *models = (torch.randn(70_001, dtype=torch.float64).to(dtype) for _ in range(3))
    sources, memory = [base, *models], Tiles()
    outs = [torch.empty(50_000, dtype=dtype) for _ in KERNELS]
    assert memory.fit(len(sources))
    wanted = [(kernel, [1, 2], 0 if kernel.of_base else None) for kernel in KERNELS]
    finite = memory.sums(20_001, 70_001, torch.float64, lambda n, a, b: sources[n][a:b], wanted, outs)
    assert finite == [True] * len(KERNELS)
    group = TensorGroup.of(*models, base=base, compute=torch.float64)
    for kernel, out in zip(KERNELS, outs, strict=True):
        assert torch.equal(out, group.merged(kernel).to(dtype)[20_001:])


@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
@pytest.mark.parametrize("sources", [2, 3, 40])
def test_more_outputs_than_are_made_at_once(compute: torch.dtype, sources: int) -> None:
    models, memory = [torch.randn(90_001).bfloat16() for _ in range(sources)], Tiles()
    assert memory.fit(sources)
    kernels = [combination(torch.rand(sources).tolist(), divisor=1.0 if n % 3 else 1.7) for n in range(11)]
    outs = [torch.empty(90_001, dtype=torch.bfloat16) for _ in kernels]
    wanted = [(kernel, list(range(sources)), None) for kernel in kernels]
    assert all(memory.sums(0, 90_001, compute, lambda n, a, b: models[n][a:b], wanted, outs))
    group = TensorGroup.of(*models, compute=compute)
    for kernel, out in zip(kernels, outs, strict=True):
        assert torch.equal(out, group.merged(kernel).bfloat16())


@pytest.mark.parametrize("odd", [math.nan, math.inf, 6e4])
def test_an_output_that_may_hold_infinity_is_not_called_finite(odd: float) -> None:
    sources, memory = [torch.ones(40_000, dtype=torch.float16) for _ in range(3)], Tiles()
    sources[1][39_999] = odd
    memory.fit(3)
    outs = [torch.empty(40_000, dtype=torch.float16) for _ in range(2)]
    wanted = [(combination([1.0, 1.0]), numbers, None) for numbers in ([0, 1], [0, 2])]
    assert memory.sums(0, 40_000, torch.float64, lambda n, a, b: sources[n][a:b], wanted, outs) == [False, True]


def test_so_many_inputs_that_tiles_would_be_tiny_have_none() -> None:
    assert not Tiles().fit(1000)


def test_outputs_that_are_made_in_tiles_have_the_bytes_of_their_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        long = torch.randn(300, 500)
        long[7, 7] = math.inf  # all have it, so the outputs keep it
        save_file({"long": long.half(), "short": torch.randn(5).bfloat16(), "wide": torch.randn(9)}, path)
    calls = list[int]()
    summed = tiles.Tiles.sums
    monkeypatch.setattr(together.Tiles, "sums", lambda *args: (calls.append(len(args[-1])), summed(*args))[1])
    weights = [[0.5, 0.25, 0.25], [1, 2, 3], [0.2, 0, 0.8]]
    sm.sweep(paths, tmp_path / "many", weights=weights, executor="threads", workers=1)
    assert set(calls) == {3}
    made = sorted((tmp_path / "many").glob("*.safetensors"))
    for place, own in zip(made, sorted(weights), strict=True):
        sm.merge(paths, tmp_path / "one.safetensors", weights=own, overwrite=True)
        one, many = load_file(tmp_path / "one.safetensors"), load_file(place)
        assert all(torch.equal(one[name], many[name]) for name in one), place
