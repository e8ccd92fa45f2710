"""Sums in one order: the same bits with compiled functions and without, for any length."""

from __future__ import annotations

import math

import pytest
import torch

from compiled.test_products import in_order
from streammerge.kernels import lanes
from streammerge.kernels.lanes import row_sums

pytestmark = pytest.mark.usefixtures("compiled_or_not")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 0), (0, 5), (0, 300), (3, 1), (2, 255), (2, 256), (2, 257), (4, 768), (5, 1000), (1, 70_001)]
)
def test_rows_are_summed_in_order(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_AT_ONCE", 3)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    assert row_sums(rows).tolist() == [in_order(row) for row in rows.double().tolist()]


def test_rows_that_lie_apart() -> None:
    rows = torch.randn(40, 100).t()
    assert row_sums(rows).tolist() == [in_order(row) for row in rows.double().tolist()]


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_what_is_not_finite_stays(odd: float) -> None:
    rows = torch.ones(2, 100)
    rows[1, 77] = odd
    assert row_sums(rows)[0] == 100
    assert not math.isfinite(row_sums(rows)[1])


@pytest.mark.parametrize("elems", [1, 255, 256, 257, 5000])
def test_a_sum_begins_with_zero(elems: int) -> None:
    rows = torch.full((2, elems), -0.0)
    assert [math.copysign(1, total) for total in row_sums(rows).tolist()] == [1, 1]


def test_tensors_of_other_kinds() -> None:
    rows = torch.randn(2, 300, requires_grad=True)
    assert row_sums(rows).tolist() == row_sums(rows.detach().clone()).tolist()
    negated = torch.randn(2, 300, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert row_sums(negated).tolist() == row_sums(negated.contiguous().resolve_neg()).tolist()
    with pytest.raises((NotImplementedError, TypeError)):
        row_sums(torch.ones(2, 300, device="meta"))
