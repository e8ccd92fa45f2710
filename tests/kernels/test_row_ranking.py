"""Ranks along a dimension, by keys of 32 and of 64 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from streammerge.kernels import row_ranking
from streammerge.kernels.row_ranking import by_rank, row_ranks


def test_ranks_of_rows_are_those_of_a_stable_sort() -> None:
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, -1.0]])
    assert row_ranks(values, 1).tolist() == [[3, 0, 2, 1], [3, 2, 1, 0]]
    assert torch.equal(row_ranks(values.t().contiguous(), 0), row_ranks(values, 1).t())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70_001, 1), (64, 100, 1), (5, 7, 9), (2, 40, 3), (0, 4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("not_finite", [False, True])
def test_ranks_of_magnitudes_select_from_a_table(shape: tuple[int, ...], dtype: torch.dtype, not_finite: bool) -> None:
    """The oracle is Python's stable sort. NaN of different bits are equal, and the largest."""
    rows, n, _ = shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(n)).mul(3).round().to(dtype)  # many are equal
    if n > 1 and rows and not_finite:
        values[0, 0, 0], values[0, n // 2, 0] = math.nan, -math.inf
        other = torch.tensor([-4_194_303], dtype=torch.int32).view(torch.float32)  # another NaN, with a sign
        values[0, -1, 0] = other.to(dtype)[0]
    check_ranks(values)


@pytest.mark.parametrize("n", [2, 3, 100, 128, 129, 1500, 4096, 20_000])
@pytest.mark.parametrize(
    "kind",
    [
        "differences",
        "some with more bits",
        "alike with more bits",
        "many with more bits",
        "multiples",
        "a few between multiples",
        "equal but for a bit",
        "subnormal",
        "infinite",
    ],
)
@pytest.mark.sampled(4)
def test_ranks_of_numbers_with_few_bits_and_with_many(n: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few numbers whose lower bits are in the way of the place are put in order by themselves."""
    rows = 9
    make = torch.Generator().manual_seed(n)
    values = torch.randint(-40, 40, (rows, n, 1), generator=make).float() / 64
    if kind == "some with more bits":
        values[::4, : max(n // 50, 1)] += 1e-7
    elif kind == "alike with more bits":  # some have one part and different rest, at the places of others
        values[::4, : max(n // 50, 1)] = 0.5 + torch.rand(values[::4, : max(n // 50, 1)].shape, generator=make) / 65_536
    elif kind == "many with more bits":
        values = torch.randn(rows, n, 1, generator=make)
    elif kind in ("multiples", "a few between multiples"):  # of a step, with more bits than a short key has of leading ones
        values = torch.randint(-65_535, 65_536, (rows, n, 1), generator=make).float() / 1024
        values[:, 0] = 63.9990234375
        if kind == "a few between multiples":
            values[2, : max(n // 50, 1)] += 1e-5
    elif kind == "subnormal":
        values = torch.randint(-9, 10, (rows, n, 1), generator=make).float() * 2.0**-149
    elif kind == "equal but for a bit":  # numbers with more bits, of which keys of 32 bits have the same part
        first = torch.tensor(0.7500001).view(torch.int32)
        values[3, 0], values[3, n - 1] = first.view(torch.float32), (first + 1).view(torch.float32)
        values[5, 0], values[5, n - 1] = (first + 1).view(torch.float32), first.view(torch.float32)
    elif kind == "infinite":
        values[1, n // 2], values[2, 0], values[2, n - 1] = math.inf, -math.inf, math.inf
    short = list[bool]()
    plain = row_ranking._sorted_short

    def seen(*arguments: Any) -> bool:
        short.append(plain(*arguments))
        return short[-1]

    monkeypatch.setattr(row_ranking, "_sorted_short", seen)
    check_ranks(values, rows)
    if n >= 100:
        assert (False in short) == (kind in ("many with more bits", "infinite"))
    check_ranks(torch.cat([values, values.flip(0)], 2), rows)


def check_ranks(values: torch.Tensor, most: int = 3) -> None:
    rows, n, rest = values.shape
    table = torch.randperm(n, generator=torch.Generator().manual_seed(1)).int()
    keys, order = (torch.empty(values.numel(), dtype=torch.int64) for _ in range(2))
    made = by_rank(values, table, torch.empty(values.shape, dtype=torch.int32), keys, order)
    for row in range(min(rows, most)):
        for at in range(rest):
            fibre = [math.inf if v != v else min(abs(v), 1e308) for v in values[row, :, at].tolist()]
            ranked = sorted(range(n), key=lambda i: (fibre[i], -i))
            expected = torch.empty(n, dtype=torch.int32)
            expected[torch.tensor(ranked)] = table.flip(0)  # the first is that of the largest
            assert torch.equal(made[row, :, at], expected)
