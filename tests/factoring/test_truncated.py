"""Truncated decompositions by rows, against numpy's of the whole matrix."""

from __future__ import annotations

import numpy
import pytest
import torch

from streammerge.factoring.truncated import Factors, Rows, Wanted, is_exact, of_product, truncated
from streammerge.kernels.spectral import sides
from streammerge.sources.base import Allocated
from streammerge.sources.memory import in_memory
from streammerge.tensors.dtypes import DType

Tensor = torch.Tensor
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (3, 5), (40, 33), (33, 40), (6, 2, 3, 3), (300, 129), (129, 700), (1030, 1100)]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors_of(tensor: Tensor, rank: int = 0, energy: float = 0.0, dtype: DType = DType.F64) -> Factors:
    rows = Rows(in_memory("w", tensor), sides(tuple(tensor.shape)))
    return truncated(rows, Wanted(rank, energy, dtype), Allocated())


def best(tensor: Tensor, rank: int) -> tuple[numpy.ndarray, float]:
    """Returns the best approximation of this rank, and the norm of what it lacks."""
    matrix = tensor.reshape(tensor.shape[0], -1).numpy()
    u, s, v = numpy.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank], float(numpy.sqrt((s[rank:] ** 2).sum()))


@pytest.mark.parametrize(
    ("rank", "shape"),
    [
        pytest.param(rank, shape, marks=[pytest.mark.slow] if shape == SHAPES[-1] and rank != 3 else [])
        for rank in (1, 3, 10_000)
        for shape in SHAPES
    ],
)
@pytest.mark.sampled(4)
def test_a_matrix_has_its_best_approximation(shape: tuple[int, ...], rank: int) -> None:
    tensor = drawn(1, *shape)
    made = factors_of(tensor, rank)
    expected, lacking = best(tensor, rank)
    assert made.rank == min(rank, *sides(shape))
    assert made.total == pytest.approx(float(tensor.square().sum()))
    whole = (made.left @ made.right).numpy()
    if is_exact(sides(shape), made.rank):
        numpy.testing.assert_allclose(whole, expected, atol=1e-9)
        assert made.rest**0.5 == pytest.approx(lacking, abs=1e-7 * made.total**0.5)
    else:
        error = numpy.linalg.norm(whole - tensor.numpy())
        assert lacking <= error <= 1.01 * lacking
        assert made.rest**0.5 == pytest.approx(error, rel=1e-6)


def test_the_largest_number_of_a_vector_of_the_shorter_side_is_positive() -> None:
    for shape in ((9, 5), (5, 9), (1100, 1200), (1200, 1100)):
        made = factors_of(drawn(2, *shape), 4)
        vectors = made.right if shape[0] >= shape[1] else made.left.T
        assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
        torch.testing.assert_close(made.left.norm(dim=0), made.right.norm(dim=1))  # both have the root of S


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), pytest.param((1200, 1100), marks=pytest.mark.slow)])
def test_the_rank_is_the_smallest_that_has_the_energy(shape: tuple[int, int], energy: float) -> None:
    tensor = drawn(3, *shape) @ torch.diag(torch.linspace(0, 1, shape[1], dtype=torch.float64) ** 8)
    squares = numpy.linalg.svd(tensor.numpy(), compute_uv=False) ** 2
    shares = numpy.cumsum(squares) / squares.sum()
    wanted = int(numpy.searchsorted(shares, energy * (1 - 1e-12))) + 1
    made = factors_of(tensor, 0, energy)
    if energy < 1:
        assert abs(made.rank - wanted) <= (0 if is_exact(shape, 0) else 1)
    assert 1 - made.rest / made.total >= energy - 1e-9


def test_rank_limits_energy() -> None:
    assert factors_of(drawn(4, 30, 20), 2, 0.99).rank == 2


def test_lower_ranks_are_found_and_zero_has_none() -> None:
    for shape in ((30, 20), (20, 30), (1300, 1200)):
        low = drawn(5, shape[0], 3) @ drawn(6, 3, shape[1])
        assert factors_of(low, 8).rank == 3
        assert factors_of(torch.zeros(shape, dtype=torch.float64), 8)[2:] == (0.0, 0.0)
        assert factors_of(torch.zeros(shape, dtype=torch.float64), 8).rank == 0


def test_rounding_errors_of_the_reference_count_as_zero() -> None:
    base, low = drawn(7, 200, 100).float(), drawn(8, 200, 4).float() @ drawn(9, 4, 100).float() * 0.01
    tuned = base + low
    source = in_memory("w", tuned.double() - base.double())
    rows = Rows(source, (200, 100), in_memory("w", tuned))
    made = truncated(rows, Wanted(16, 0.0, DType.F64), Allocated())
    assert made.rank == 4
    assert truncated(Rows(source, (200, 100)), Wanted(16, 0.0, DType.F64), Allocated()).rank == 16


def test_numbers_that_are_not_finite_are_refused() -> None:
    for shape in ((9, 5), (5, 9), (1200, 1100)):
        tensor = drawn(10, *shape)
        tensor[-1, -1] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            factors_of(tensor, 2)


@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (20, 6, 30), (30, 6, 20), (4, 9, 30), (30, 9, 4)])
def test_a_product_is_recompressed_from_its_factors(n: int, k: int, m: int) -> None:
    left, right = drawn(11, n, k), drawn(12, k, m)
    for rank in (1, 3, 100):
        made = of_product(left, right, rank, DType.F64)
        expected, lacking = best(left @ right, min(rank, n, k, m))
        numpy.testing.assert_allclose((made.left @ made.right).numpy(), expected, atol=1e-9)
        assert made.rest**0.5 == pytest.approx(lacking, abs=1e-6)
        assert made.rank == min(rank, n, k, m)
