"""Numbers within limits, to the last bit; the largest numbers of rows; the planned memory of a search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from streammerge.kernels import ranking
from streammerge.kernels.ranking import (
    Guess,
    affordable,
    count_above,
    held_bytes,
    inside,
    keep_rows,
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
        places = inside(values, low, high, torch.empty(4099)).places
        assert torch.equal(places.sort().values, ((values >= low) & (values <= high)).nonzero()[:, 0])


@pytest.mark.parametrize("low", [-math.inf, -3.0, 0.0, 5.0])
@pytest.mark.parametrize("high", [math.inf, 9.0, 5.0])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 83])
def test_limits_belong_to_what_lies_inside(low: float, high: float, size: int) -> None:
    """Integers, so many equal a limit."""
    values = torch.randint(-4, 10, (size,), generator=torch.Generator().manual_seed(size)).float()
    picked, places, above, nan = inside(values, low, high, torch.empty(size))
    assert not nan
    wanted = (values >= low) & (values <= high)
    assert torch.equal(places.sort().values, wanted.nonzero()[:, 0])
    assert torch.equal(picked, values[places])
    assert above == count_above(values, high, torch.empty(size)) == int((values > high).sum())
    for place in {0, size // 2, size - 1}:
        with_nan = values.clone()
        with_nan[place] = math.nan
        found = inside(with_nan, low, high, torch.empty(size))
        assert found.nan, place
        assert found.above == count_above(with_nan, high, torch.empty(size)), place


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 5, 700, 9000])
@pytest.mark.parametrize("kind", ["many equal", "all different", "mostly zero"])
def test_the_largest_numbers_of_each_row_are_kept(dtype: torch.dtype, n: int, kind: str) -> None:
    """The oracle is Python's stable sort. Dropped numbers are zero without a sign."""
    make = torch.Generator().manual_seed(n)
    values = torch.randn(6, n, generator=make, dtype=dtype)
    if kind != "all different":
        values = values.mul(3 if kind == "many equal" else 0.4).round()  # also -0
    ranks = [(n // 2, 0), (n, 0), (0, 0), (n, n // 3), (n - 1, n // 2), (1, 0)]
    made = values.clone()
    assert keep_rows(made, ranks, torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype))
    for row, found, (most, without) in zip(values.tolist(), made.tolist(), ranks, strict=True):
        order = sorted(range(n), key=lambda i: (-abs(row[i]), i))
        kept = set(order[without:most])
        wanted = [number if i in kept else 0.0 for i, number in enumerate(row)]
        assert found == wanted
        dropped = [math.copysign(1, found[i]) for i in range(n) if i not in kept and row[i]]
        assert dropped == [1.0] * len(dropped)


def test_a_search_that_meets_nan_says_so() -> None:
    for rank in (1, 3, 4):
        values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, -math.nan, 3.0, 4.0, 5.0]])
        assert keep_rows(values[:1].clone(), [(rank, 0)], torch.empty(5), torch.empty(5))
        assert not keep_rows(values, [(rank, 0)] * 2, torch.empty(5), torch.empty(5))
    values = torch.tensor([[1.0, math.nan]])
    assert keep_rows(values, [(0, 0)], torch.empty(2), torch.empty(2)), "nothing is searched"
    assert values[0, 0] == 0
    assert math.isnan(values[0, 1]), "NaN stays, so that the result says it"


def test_the_place_of_a_true_value_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_LISTED", 4)
    for step in (1, 2, 7):
        flags = np.zeros(103, bool)
        flags[step // 2 :: step] = True
        places = [ranking._place_of(flags, count) for count in range(1, int(flags.sum()) + 1)]
        assert places == [*range(step // 2, 103, step)]
