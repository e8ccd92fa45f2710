"""The first eigenvectors of a large matrix, against LAPACK."""

from __future__ import annotations

import pytest
import torch

from streammerge.kernels import tridiagonal

Tensor = torch.Tensor


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    """Returns a matrix with these eigenvalues."""
    drawn = torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(drawn).Q
    made = (basis * values) @ basis.T
    return (made + made.T) / 2


def check(matrix: Tensor, count: int) -> None:
    values, vectors = tridiagonal.leading(matrix.clone(), count)
    wanted = torch.linalg.eigvalsh(matrix).flip(0)[:count]
    scale = float(wanted[0]) or 1.0
    torch.testing.assert_close(values / scale, wanted / scale, rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors @ (matrix / scale), (values / scale).unsqueeze(1) * vectors, rtol=0, atol=1e-10)


COUNTED = torch.arange(200, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 30, 200])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(1 + COUNTED, id="apart"),
        pytest.param(torch.ones_like(COUNTED), id="equal"),
        pytest.param(1 + COUNTED // 40, id="groups of equal ones"),
        pytest.param(1 + 1e-8 * COUNTED, id="near"),
        pytest.param(1 + 1e-14 * COUNTED, id="nearer than rounding"),
        pytest.param((COUNTED < 5) * (1 + COUNTED), id="low rank"),
        pytest.param(10.0 ** (-COUNTED / 8), id="graded"),
        pytest.param(1e-200 * (1 + COUNTED), id="tiny"),
        pytest.param(1e200 * (1 + COUNTED), id="huge"),
    ],
)
@pytest.mark.sampled(2)
def test_eigenvalues_of_every_kind(values: Tensor, count: int) -> None:
    check(rotated(values), count)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 66, 129, 300])
def test_sizes(size: int) -> None:
    drawn = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    for count in {1, -(-size // 3), size}:
        check(drawn.T @ drawn, count)


def test_matrices_that_are_tridiagonal_before() -> None:
    size = 100
    beside = torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    for matrix in (
        torch.zeros(size, size, dtype=torch.float64),
        torch.eye(size, dtype=torch.float64),
        torch.diag(torch.arange(size, dtype=torch.float64) // 10),
        torch.diag((torch.arange(size) - size // 2).abs().double() + 2) + beside + beside.T,  # Wilkinson's pairs
    ):
        check(matrix, size // 4)


@pytest.mark.parametrize("size", [3, 41, 301])
def test_a_pivot_of_zero(size: int) -> None:
    """The number in the middle of the eigenvalues is on the diagonal, so that elimination begins with zero."""
    beside = torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    check(2 * torch.eye(size, dtype=torch.float64) + beside + beside.T, size)


def test_the_same_in_each_run() -> None:
    matrix = rotated(torch.ones(200, dtype=torch.float64))
    first, second = (tridiagonal.leading(matrix.clone(), 20)[1] for _ in range(2))
    assert torch.equal(first, second)
