"""Numbers of every dtype: what is counted and summed of them, against numpy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffing.oracle import GRAIN, check, compared, draw, expected, near


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 2 if dtype == torch.bool else 100, (70_001,), generator=generator).to(dtype)
    b = a.clone()
    b[::7] = 1
    for one, two in ((a, b), (a, a)):
        check(compared(tmp_path, {"x": one}, {"x": two})["x"], expected(one, two))


def test_integers_beyond_float64_are_compared_exactly(tmp_path: Path) -> None:
    one, two = torch.tensor([1 << 60, -(1 << 63), 5]), torch.tensor([(1 << 60) + 1, (1 << 63) - 1, 5])
    found = compared(tmp_path, {"x": one[:1]}, {"x": two[:1]})["x"]
    assert (found.sums.differing, found.largest, found.equal) == (1, 1.0, False)
    found = compared(tmp_path, {"x": one}, {"x": two})["x"]
    assert (found.sums.differing, found.largest) == (2, 2.0**64)
    unsigned = compared(tmp_path, {"x": one[:1].to(torch.uint64)}, {"x": two[:1]})["x"]
    assert (unsigned.sums.differing, unsigned.share) == (1, 1.0)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.int32, torch.int64),
        (torch.int64, torch.float32),
    ],
)
def test_two_dtypes_are_compared_as_numbers(tmp_path: Path, one: torch.dtype, two: torch.dtype) -> None:
    a = torch.arange(-300, 300).to(one)
    b = a.clone()
    if not one.is_floating_point:
        assert compared(tmp_path, {"x": a}, {"x": a.to(two)})["x"].equal
    b[::5] += 1
    a, b = a.to(torch.bfloat16).to(one), b.to(torch.bfloat16).to(two)
    assert compared(tmp_path, {"x": a}, {"x": a.to(two)})["x"].equal
    check(compared(tmp_path, {"x": a}, {"x": b})["x"], expected(a, b))


@pytest.mark.parametrize("dtype", [torch.complex64])
def test_complex_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    a = draw((GRAIN + 3,), dtype, 1)
    b = a.clone()
    b[::3] += 1j
    check(compared(tmp_path, {"x": a}, {"x": b})["x"], expected(a, b))


def test_nan_and_infinity_are_left_out_of_norms_and_counted(tmp_path: Path) -> None:
    base = draw((2 * GRAIN + 9,), torch.float32, 1)
    a, b = near(base, 2), near(base, 3)
    a[5] = b[5] = float("nan")  # equal
    a[GRAIN + 1], b[GRAIN + 2], base[7] = float("inf"), float("nan"), float("-inf")
    check(compared(tmp_path, {"x": a}, {"x": b})["x"], expected(a, b))
    check(compared(tmp_path, {"x": a}, {"x": b}, {"x": base})["x"], expected(a, b, base))
    assert compared(tmp_path, {"x": a}, {"x": a})["x"].equal
    halves = {"x": torch.tensor([float("nan"), 1.0])}
    assert compared(tmp_path, halves, {"x": halves["x"].bfloat16()})["x"].equal


def test_zeros(tmp_path: Path) -> None:
    zero, one = torch.zeros(5), torch.ones(5)
    found = compared(tmp_path, {"x": zero}, {"x": one})["x"]
    assert (found.relative, found.cosine, found.share) == (float("inf"), None, 1.0)
    found = compared(tmp_path, {"x": zero}, {"x": zero})["x"]
    assert (found.relative, found.cosine, found.equal) == (0.0, None, True)
    found = compared(tmp_path, {"x": zero}, {"x": -zero})["x"]  # other bits, and no distance
    assert (found.relative, found.largest, found.equal) == (None, 0.0, False)
    found = compared(tmp_path, {"x": one}, {"x": one}, {"x": one})["x"]
    assert found.agreement == type(found.agreement)(0.0, 0.0, None, None, None)


def test_packed_values_are_equal_or_not(tmp_path: Path) -> None:
    a = torch.arange(100, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    b = a.clone()
    b.view(torch.uint8)[3] = 77
    found = compared(tmp_path, {"x": a}, {"x": b})["x"]
    assert (found.sums.differing, found.relative, found.equal) == (1, None, False)
