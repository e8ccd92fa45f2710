"""Multiples that are added in one operation: the bits of products that are rounded before they are added."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from streammerge.kernels import adding
from streammerge.kernels.adding import Multiples, add_scaled, exact_reciprocal, rounds_products

FACTORS = [0.3, -0.7, 1.0, 1 / 3, 0.0, -0.0, 1e30, -1e-30, 5e-324, 1e300, math.inf, math.nan]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    rounds_products.cache_clear()
    yield
    rounds_products.cache_clear()


def numbers(elems: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of one size, any bits (subnormal numbers, NaN of all kinds), and special ones."""
    rng = np.random.default_rng(seed)
    floats, words = (np.float64, np.uint64) if dtype == torch.float64 else (np.float32, np.uint32)
    similar = rng.standard_normal(elems).astype(floats)
    any_bits = rng.integers(0, np.iinfo(words).max, elems, dtype=words, endpoint=True).view(floats)
    special = rng.choice(np.array([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324], floats), elems)
    return torch.from_numpy(np.choose(rng.integers(0, 3, elems), [similar, any_bits, special]))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def in_turn(total: torch.Tensor, values: torch.Tensor, factor: float) -> torch.Tensor:
    """numpy multiplies, rounds, and then adds."""
    with np.errstate(all="ignore"):
        product = values.numpy() * values.numpy().dtype.type(factor)
        return torch.from_numpy(total.numpy() + product)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("elems", [0, 1, 7, 8, 1001, 40_000])
def test_products_are_rounded_before_they_are_added(
    elems: int, dtype: torch.dtype, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rounds_products(dtype)
    if fails:
        monkeypatch.setattr(adding, "rounds_products", lambda dtype: False)
    total, values = numbers(elems, 1, dtype), numbers(elems, 2, dtype)
    rows = [total.clone() for _ in FACTORS]
    Multiples(FACTORS, dtype).add_to(rows, values)
    some = FACTORS[:5]
    few = list(total.expand(5, elems).clone().unbind())
    Multiples(some, dtype).add_to(few, values)
    for row, factor in zip([*rows, *few], [*FACTORS, *some], strict=True):
        wanted = in_turn(total, values, factor)
        known = ~wanted.isnan()
        own = add_scaled(total.clone(), values.clone(), factor)
        for made in (row, own):
            assert torch.equal(made.isnan(), wanted.isnan())
            assert torch.equal(bits(made[known]), bits(wanted[known])), factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_keeps_its_bits_in_both_ways(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    total, values = numbers(9001, 3, dtype), numbers(9001, 4, dtype)
    quick = [add_scaled(total.clone(), values.clone(), factor) for factor in FACTORS]
    apart = [total.clone() for _ in FACTORS]
    for factor, row in zip(FACTORS, apart, strict=True):  # numbers that lie elsewhere in a vector
        multiples = Multiples([factor], dtype)
        for begin in range(0, 9001, 13):
            multiples.add_to([row[begin : begin + 13]], values[begin : begin + 13])
    monkeypatch.setattr(adding, "rounds_products", lambda dtype: False)
    for factor, *made in zip(FACTORS, quick, apart, strict=True):
        plain = add_scaled(total.clone(), values.clone(), factor)
        for each in made:
            assert torch.equal(bits(each), bits(plain)), factor


def test_numbers_that_do_not_lie_side_by_side() -> None:
    total, values = numbers(6000, 5, torch.float64)[::3], numbers(4000, 6, torch.float64)[::2]
    wanted = in_turn(total.clone(), values.clone(), 0.1)
    known = ~wanted.isnan()
    add_scaled(total, values, 0.1)
    assert torch.equal(bits(total[known]), bits(wanted[known]))


def test_a_fused_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(self: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, value: float) -> torch.Tensor:
        wide = self.double() + float(np.float32(value)) * first.double() * second.double()
        return self.copy_(wide.float())

    monkeypatch.setattr(torch.Tensor, "addcmul_", fused)
    assert not rounds_products(torch.float32)
    total, values = torch.randn(1000), torch.randn(1000)
    assert torch.equal(add_scaled(total.clone(), values.clone(), 0.1), in_turn(total, values, 0.1))


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.sampled(2)
def test_other_instructions_of_torch_round_products_too(capability: str) -> None:
    program = (
        "import torch; from streammerge.kernels.adding import rounds_products as r;"
        "print(r(torch.float32), r(torch.float64))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["True", "True"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divisor", [1.0, 2.0, -4.0, 0.5, 2.0**99, -(2.0**-99)])
def test_powers_of_two_divide_by_a_product(divisor: float, dtype: torch.dtype) -> None:
    values, factor = numbers(30_001, 7, dtype), exact_reciprocal(divisor)
    assert factor is not None
    assert torch.equal(bits(values * factor), bits(values / divisor))


@pytest.mark.parametrize("divisor", [0.0, -0.0, 3.0, 1.1, 2.0**200, 2.0**-200, math.inf, math.nan])
def test_other_divisors_have_no_reciprocal(divisor: float) -> None:
    assert exact_reciprocal(divisor) is None
