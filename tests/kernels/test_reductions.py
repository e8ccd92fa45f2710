"""Sums over a whole tensor, whatever the chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.tensors.spec import GRAIN

SIZES = [0, 1, 7, GRAIN - 1, GRAIN, GRAIN + 1, 5 * GRAIN + 3]


def terms(chunk: Chunk) -> Iterator[torch.Tensor]:
    yield chunk.models[0]
    yield chunk.models[0] * chunk.models[1]


@pytest.mark.parametrize("elems", SIZES)
def test_sums_are_close_to_the_exact_ones_and_do_not_depend_on_the_chunk(elems: int) -> None:
    make = torch.Generator().manual_seed(elems)
    one, two = (torch.randn(elems, generator=make) for _ in range(2))
    found = {
        tuple(map(float, TensorGroup.of(one, two, chunk_elems=chunk).reduce(terms)))
        for chunk in (GRAIN, 2 * GRAIN, 3 * GRAIN, 8 * GRAIN)
    }
    ((total, product),) = found
    assert total == pytest.approx(math.fsum(one.tolist()), rel=1e-12, abs=1e-9)
    assert product == pytest.approx(math.fsum((one * two).tolist()), rel=1e-12, abs=1e-9)


def test_sums_are_wide() -> None:
    """In float32 the ones would be lost."""
    values = torch.ones(3 * GRAIN)
    values[0] = 2.0**30
    (total,) = TensorGroup.of(values).reduce(lambda chunk: [chunk.models[0]])
    assert Fraction(float(total)) == 2**30 + 3 * GRAIN - 1


@pytest.mark.parametrize("rows", [1, 2, 700])
def test_columns_are_summed_apart(rows: int) -> None:
    width = 300
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    group = TensorGroup.of(values, row=width)
    (sums,) = group.reduce(lambda chunk: [chunk.models[0].view(-1, width)])
    assert sums.dtype == torch.float64
    assert torch.allclose(sums, values.double().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elems", SIZES)
@pytest.mark.parametrize("deltas", [False, True])
def test_inner_products_of_all_pairs(elems: int, deltas: bool) -> None:
    make = torch.Generator().manual_seed(elems)
    base, *models = (torch.randn(elems, generator=make) for _ in range(4))
    matrix = TensorGroup.of(*models, base=base, chunk_elems=2 * GRAIN).gram(deltas)
    rows = torch.stack([m.double() - base.double() * deltas for m in models])
    assert matrix.shape == (3, 3)
    assert torch.equal(matrix, matrix.t())
    assert torch.allclose(matrix, rows @ rows.t(), rtol=1e-11, atol=1e-11)


def test_deltas_are_formed_before_they_are_multiplied() -> None:
    """From products of the numbers themselves nothing of the delta would be left."""
    base = torch.full((4,), 1e8, dtype=torch.float64)
    model = base + torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert TensorGroup.of(model, base=base).gram(deltas=True).item() == 6.0
