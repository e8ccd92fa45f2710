"""Weighted sums of several outputs in tiles: the same numbers to the bit as each output's kernel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.kernels import adding
from streammerge.kernels.group import TensorGroup
from streammerge.methods.linear import combination
from streammerge.running import tiles, together
from streammerge.running.tiles import Tiles

pytestmark = pytest.mark.usefixtures("compiled_or_not")
KERNELS = [
    combination([0.3, 0.7]),
    combination([1.0, 1.0], divisor=3.0),
    combination([1.0, -0.25], of_base=0.25),
    combination([0.1, 1.0], of_base=1.0, divisor=2.1),
    combination([0.1, 1.0], of_base=1.0, divisor=2.0),
    combination([0.7, 1.0], of_base=0.5, divisor=-0.25),
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
def test_an_output_that_may_hold_infinity_is_not_called_finite(odd: float, compiled_or_not: bool) -> None:
    sources, memory = [torch.ones(40_000, dtype=torch.float16) for _ in range(3)], Tiles()
    sources[1][39_999] = odd
    memory.fit(3)
    outs = [torch.empty(40_000, dtype=torch.float16) for _ in range(2)]
    wanted = [(combination([1.0, 1.0]), numbers, None) for numbers in ([0, 1], [0, 2])]
    found = memory.sums(0, 40_000, torch.float64, lambda n, a, b: sources[n][a:b], wanted, outs)
    assert found == [compiled_or_not and odd == 6e4, True]  # compiled functions look at each result


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


def adversarial(elems: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of one size, any bits (of all exponents, subnormal, NaN), and special ones."""
    drawn = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (elems * dtype.itemsize,), generator=drawn, dtype=torch.uint8)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0], dtype=dtype)
    kinds = [
        torch.randn(elems, generator=drawn, dtype=torch.float64).to(dtype),
        octets.view(dtype),
        special[torch.randint(0, len(special), (elems,), generator=drawn)],
    ]
    return torch.stack(kinds).gather(0, torch.randint(0, 3, (1, elems), generator=drawn))[0]


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_sums_of_any_numbers_have_the_bits_of_the_kernels(
    models: int, dtype: torch.dtype, in_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one:
        monkeypatch.setattr(adding, "rounds_products", lambda dtype: False)
    sources, memory = [adversarial(32_001, seed, dtype) for seed in range(models)], Tiles()
    weights = [[0.1 * (n + 1) * (-1) ** (n * m) for m in range(models)] for n in range(6)]
    weights += [[0.0] * models, [1.0] * models, [-0.0] * models, [1e30] * models, [math.nan] * models]
    kernels = [combination(each, divisor=1.0 if number % 2 else 1.7) for number, each in enumerate(weights)]
    outs = [torch.empty(32_001, dtype=dtype) for _ in kernels]
    assert memory.fit(models)
    wanted = [(kernel, list(range(models)), None) for kernel in kernels]
    assert not any(memory.sums(0, 32_001, torch.float64, lambda n, a, b: sources[n][a:b], wanted, outs))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    group, known = TensorGroup.of(*sources, compute=torch.float64), torch.stack(sources)
    agreed = known.isnan().all(0) | (known.isinf().all(0) & (known == known[0]).all(0))  # they are put in afterwards
    for kernel, out in zip(kernels, outs, strict=True):
        one = group.merged(kernel).to(dtype)
        assert torch.equal(out.view(bits)[~agreed], one.view(bits)[~agreed]), kernel


@pytest.mark.parametrize(
    ("executor", "dtype"),
    [("threads", torch.bfloat16), ("threads", torch.float16), ("threads", torch.float32), ("processes", torch.float32)],
)
@pytest.mark.sampled(2, by="executor")
def test_tensors_of_a_sweep_have_the_bytes_of_their_merges(tmp_path: Path, executor: str, dtype: torch.dtype) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        shapes = {"odd": (333, 101), "one": (1,), "none": (0,), "tile": (1 << 14,), "more": (7, 16_385)}
        save_file({name: adversarial(math.prod(shape), seed, dtype).view(shape) for name, shape in shapes.items()}, path)
    weights = [[0.5, 0.25, 0.25], [1, -2, 3], [0.2, 0, 0.8], [-1, 0.1, 0.3]]
    asked = {"workers": 2, "normalize": False, "allow_nonfinite": True}
    sm.sweep(paths, tmp_path / "many", weights=weights, executor=executor, **asked)
    made = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(made) == len(weights)
    singles = list[bytes]()
    for own in weights:
        sm.merge(paths, tmp_path / "one.safetensors", weights=own, overwrite=True, **asked)
        singles.append(_tensors(tmp_path / "one.safetensors"))
    assert sorted(singles) == sorted(map(_tensors, made))


def _tensors(path: Path) -> bytes:
    """Returns the bytes of all tensors of a file, in their order."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
