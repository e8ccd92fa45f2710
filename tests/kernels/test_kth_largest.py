"""The exact k-th largest, for all kinds of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from streammerge.kernels.group import TensorGroup
from streammerge.tensors.spec import GRAIN

Tensor = torch.Tensor


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "continuous": lambda n, make: torch.randn(n, generator=make),
    "differences of bfloat16": lambda n, make: (
        torch.randn(n, generator=make).bfloat16() - torch.randn(n, generator=make).bfloat16()
    ).float(),
    "all equal": lambda n, make: torch.full((n,), 1.5),
    "mostly zero": lambda n, make: torch.randn(n, generator=make) * (torch.rand(n, generator=make) < 0.1),
    "few values": lambda n, make: torch.randint(0, 5, (n,), generator=make).float(),
    "sorted": lambda n, make: torch.randn(n, generator=make).abs().sort().values,
    "one block apart": lambda n, make: torch.cat([torch.full((n // 2,), 100.0), torch.randn(n - n // 2, generator=make)]),
    "next to each other": lambda n, make: 1 + torch.randint(0, 300, (n,), generator=make) * 2.0**-23,
    "tiny": lambda n, make: torch.randn(n, generator=make) * 1e-42,
    "huge": lambda n, make: torch.randn(n, generator=make) * 1e38,
    "with infinity": lambda n, make: torch.where(
        torch.rand(n, generator=make) < 0.2, torch.inf, torch.randn(n, generator=make)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.sampled(2, by="kind")
def test_exactly_k_are_kept_and_the_first_of_equal_ones(kind: str, dtype: torch.dtype) -> None:
    for n in (1, 2, 7, 9_001, GRAIN, GRAIN + 1, 700_001):
        values = KINDS[kind](n, torch.Generator().manual_seed(n)).to(dtype).abs()
        ranks = sorted({0, 1, min(3, n), n // 100, n // 2, n - 1, n})
        group = TensorGroup.of(values, values.flip(0), chunk_elems=2 * GRAIN)
        cuts = group.kth_largest(lambda chunk: (chunk.load(i) for i in range(2)), [ranks, [n // 3]])
        order = values.argsort(descending=True, stable=True)
        for rank, cut in zip(ranks, cuts[0], strict=True):
            kept = torch.cat([cut.keep(values[a : a + 5000].clone(), a) for a in range(0, n, 5000)])
            wanted = torch.zeros_like(values)
            wanted[order[:rank]] = values[order[:rank]]
            assert torch.equal(kept, wanted.nan_to_num(nan=0.0, posinf=torch.inf)), (n, rank)
        if n > 3:
            assert cuts[1][0].threshold == values[order[n // 3 - 1]]


def test_signed_numbers() -> None:
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        group = TensorGroup.of(values.to(dtype))
        ordered = values.to(dtype).sort(descending=True).values
        ranks = [1, 5, 150_000, 299_990, 300_000]
        cuts = group.kth_largest(lambda chunk: [chunk.load(0)], [ranks], signed=True)[0]
        assert [cut.threshold for cut in cuts] == [float(ordered[rank - 1]) for rank in ranks]


def test_nan_is_the_largest_and_is_kept() -> None:
    values = torch.rand(100_000)
    values[[5, 70_000]] = math.nan
    cut = TensorGroup.of(values, torch.rand(100_000)).kth_largest(lambda chunk: [chunk.load(0)], [[1000]])[0][0]
    kept = cut.keep(values.clone(), 0)
    assert int((kept != 0).sum()) == 1000
    assert kept[[5, 70_000]].isnan().all()


def test_a_misleading_sample_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampled numbers do not represent the rest."""
    values = torch.rand(1 << 20)
    # The sample takes spans of 1024 in every 16384.
    for start in range(0, 1 << 20, 1 << 14):
        values[start : start + 1024] = 7.0
    cut = TensorGroup.of(values).kth_largest(lambda chunk: [chunk.load(0)], [[500_000]])[0][0]
    kept = cut.keep(values.clone(), 0)
    assert int((kept != 0).sum()) == 500_000
    assert kept[kept > 0].min() == values.sort(descending=True).values[499_999]


@pytest.mark.parametrize("chunk_elems", [GRAIN, 8 * GRAIN])
def test_nan_of_either_sign_is_the_largest_of_signed_numbers(chunk_elems: int) -> None:
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    values[:90_000] = torch.tensor([-4_194_304], dtype=torch.int32).view(torch.float32)  # as 0 / 0 makes it
    values[90_000:100_000] = math.nan
    group = TensorGroup.of(values, torch.zeros(300_001), chunk_elems=chunk_elems)  # NaN that all models have are hidden
    ordered = values.sort(descending=True).values
    ranks = [99_999, 100_001, 150_000, 300_001]
    cuts = group.kth_largest(lambda chunk: [chunk.load(0)], [ranks], signed=True)[0]
    assert str([cut.threshold for cut in cuts]) == str([float(ordered[rank - 1]) for rank in ranks])
