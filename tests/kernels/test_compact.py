"""A matrix in 32 bits, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from streammerge.kernels.compact import STRIP_COLUMNS, Compact

Tensor = torch.Tensor
SHAPES = [(1, 1), (3, 1), (1, 255), (5, 256), (4, 257), (1100, 600)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(matrix: Tensor, exact: bool) -> Compact:
    made = Compact(*matrix.shape, exact)
    half = len(matrix) // 2
    made.put_rows(matrix[half:], half)
    made.put_rows(matrix[:half], 0)
    return made


def whole(made: Compact) -> Tensor:
    return torch.cat([made.get(number) for number in range(len(made.strips))], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [True, False])
def test_numbers(shape: tuple[int, int], exact: bool) -> None:
    matrix = drawn(*shape)
    matrix[0, 0] = 1e5
    matrix[-1] = 0 if shape[0] > 1 else matrix[-1]
    made = whole(filled(matrix, exact))
    if exact:
        assert torch.equal(made, matrix)
    for a in range(0, shape[1], STRIP_COLUMNS):
        strip = slice(a, a + STRIP_COLUMNS)
        most = matrix[:, strip].abs().amax(1, keepdim=True) * 2.0**-31
        assert bool(((made - matrix)[:, strip].abs() <= most).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int]) -> None:
    matrix, other = drawn(*shape), drawn(shape[1], 7, seed=1)
    made = filled(matrix, exact=False)
    start, stop = shape[0] // 3, shape[0]
    torch.testing.assert_close(made.product(other, start, stop), matrix[start:stop] @ other, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(made.gram_rows()), matrix @ matrix.T, rtol=0, atol=1e-5)
    assert torch.equal(whole(Compact.over(matrix)), matrix)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])
def test_half_of_a_symmetric_matrix(size: int) -> None:
    matrix = drawn(size, size)
    matrix = matrix + matrix.T
    made = Compact(size, size, exact=False, lower=True)
    for number, (a, b) in enumerate(made.strips):
        made.put(number, matrix[a:, a:b])
    other = drawn(size, 7, seed=1)
    torch.testing.assert_close(made.times(other), matrix @ other, rtol=0, atol=1e-6)
