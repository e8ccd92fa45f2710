"""Numbers within limits, to the last bit; ranks along a dimension; the planned memory of a search."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from streammerge.kernels import ranking
from streammerge.kernels.ranking import (
    Guess,
    affordable,
    by_rank,
    count_above,
    held_bytes,
    inside,
    row_ranks,
    sample_elems,
)


def test_what_lies_inside_is_found_to_the_last_bit() -> None:
    """Limits a few units in the last place apart, where the middle between them is rounded."""
    make = torch.Generator().manual_seed(0)
    for _ in range(300):
        scale = 2.0 ** int(torch.randint(-5, 5, (1,), generator=make))
        values = (1 + torch.randint(0, 300, (4099,), generator=make) * 2.0**-23) * scale
        first, count = int(torch.randint(0, 295, (1,), generator=make)), int(torch.randint(1, 6, (1,), generator=make))
        low, high = (1 + first * 2.0**-23) * scale, (1 + (first + count) * 2.0**-23) * scale
        _, places, _ = inside(values, low, high, torch.empty(4099))
        assert torch.equal(places.sort().values, ((values >= low) & (values <= high)).nonzero()[:, 0])


@pytest.mark.parametrize("low", [-math.inf, -3.0, 0.0, 5.0])
@pytest.mark.parametrize("high", [math.inf, 9.0, 5.0])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 83])
def test_limits_belong_to_what_lies_inside(low: float, high: float, size: int) -> None:
    """Integers, so many equal a limit. A column of the table has one such number or eight."""
    values = torch.randint(-4, 10, (size,), generator=torch.Generator().manual_seed(size)).float()
    picked, places, nan = inside(values, low, high, torch.empty(size))
    assert not nan
    wanted = (values >= low) & (values <= high)
    assert torch.equal(places.sort().values, wanted.nonzero()[:, 0])
    assert torch.equal(picked, values[places])
    assert count_above(values, high, torch.empty(size)) == int((values > high).sum())
    for place in {0, size // 2, size - 1}:
        with_nan = values.clone()
        with_nan[place] = math.nan
        assert inside(with_nan, low, high, torch.empty(size))[2], place


def test_ranks_of_rows_are_those_of_a_stable_sort() -> None:
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, -1.0]])
    assert row_ranks(values, 1).tolist() == [[3, 0, 2, 1], [3, 2, 1, 0]]
    assert torch.equal(row_ranks(values.t().contiguous(), 0), row_ranks(values, 1).t())


def test_what_is_collected_stays_within_what_was_planned() -> None:
    """The planned bytes hold a sample, three histograms, and twice the numbers that a guess may collect."""
    for count in (1, 5000, 1 << 20, 1 << 28):
        share = 0.04
        collected = 24 * share * count
        assert affordable([Guess(0.0, 1.0, share)], count) == (collected <= 32 << 20)
        if affordable([Guess(0.0, 1.0, share)], count):
            assert held_bytes(count, 1) >= 3 * 8 * (1 << 16) + 4 * min(sample_elems(count), count) + collected * 0.99
    assert held_bytes(1 << 20, 0) == 0
    assert affordable([Guess(0.0, 1.0, 1.0, (2.0,))], 1 << 40), "of few frequent numbers nothing is collected"


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
    "kind", ["differences", "some with more bits", "many with more bits", "equal but for a bit", "infinite"]
)
def test_ranks_of_numbers_with_few_bits_and_with_many(n: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few numbers whose lower bits are in the way of the place are put in order by themselves."""
    rows = 9
    make = torch.Generator().manual_seed(n)
    values = torch.randint(-40, 40, (rows, n, 1), generator=make).float() / 64
    if kind == "some with more bits":
        values[::4, : max(n // 50, 1)] += 1e-7
    elif kind == "many with more bits":
        values = torch.randn(rows, n, 1, generator=make)
    elif kind == "equal but for a bit":  # numbers with more bits, of which keys of 32 bits have the same part
        first = torch.tensor(0.7500001).view(torch.int32)
        values[3, 0], values[3, n - 1] = first.view(torch.float32), (first + 1).view(torch.float32)
        values[5, 0], values[5, n - 1] = (first + 1).view(torch.float32), first.view(torch.float32)
    elif kind == "infinite":
        values[1, n // 2], values[2, 0], values[2, n - 1] = math.inf, -math.inf, math.inf
    short = list[bool]()
    plain = ranking._sorted_short

    def seen(*arguments: Any) -> bool:
        short.append(plain(*arguments))
        return short[-1]

    monkeypatch.setattr(ranking, "_sorted_short", seen)
    check_ranks(values, rows)
    if n >= 100:
        assert set(short) == {kind != "many with more bits"}
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
