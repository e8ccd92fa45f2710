"""Products over all rows, eigenvectors and orthogonal rows, against LAPACK."""

from __future__ import annotations

import pytest
import torch

from streammerge.kernels import compact, spectral
from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.tensors.spec import GRAIN

Tensor = torch.Tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["at once", "in place"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """LAPACK on the whole matrix, or rotations in pairs of few rows."""
    if request.param == "in place":
        monkeypatch.setattr(spectral, "_AT_ONCE", 0)
        monkeypatch.setattr(spectral, "_PAIR_ROWS", 16)
        monkeypatch.setattr(spectral, "STRIP_COLUMNS", 24)
        monkeypatch.setattr(compact, "STRIP_COLUMNS", 24)
    return str(request.param)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 33, 100])
@pytest.mark.parametrize("rank", [1, 3, 200])
def test_eigenvectors(size: int, rank: int, solver: str) -> None:
    rank = min(size, rank)
    factor = drawn(2 * size + 1, rank) @ drawn(rank, size, seed=1)
    gram = factor.T @ factor
    values, vectors = spectral.eigen(gram.clone())
    wanted = torch.linalg.eigvalsh(gram).flip(0)
    torch.testing.assert_close(values, wanted.clamp(min=0), rtol=0, atol=1e-12 * float(wanted[0]))
    vectors = vectors[:rank]
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-8)
    again = vectors.T @ (values[:rank].unsqueeze(1) * vectors)
    torch.testing.assert_close(again, gram, rtol=0, atol=1e-12 * float(wanted[0]))


def test_equal_and_zero_eigenvalues(solver: str) -> None:
    for matrix in (torch.zeros(40, 40), torch.eye(40), torch.diag(torch.arange(40) // 10)):
        gram = matrix.double()
        values, vectors = spectral.eigen(gram.clone())
        assert torch.equal(values, gram.diagonal().sort(descending=True).values)
        kept = vectors[values > 0]
        torch.testing.assert_close(kept @ kept.T, torch.eye(len(kept), dtype=torch.float64))


def test_the_polar_factor(solver: str) -> None:
    for matrix in (drawn(70, 40), drawn(70, 5) @ drawn(5, 40, seed=1)):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        wanted = (u * (s > spectral.TINY * s[0])) @ v
        gram = matrix.T @ matrix
        for given in (gram.clone(), [strip.clone() for strip in gram.split(compact.STRIP_COLUMNS)]):
            made = spectral.inverse_root(given).times(matrix.T.contiguous())
            torch.testing.assert_close(made.T, wanted, rtol=0, atol=1e-9 if solver == "at once" else 1e-8)


def test_a_singular_value_near_zero_spoils_no_other_direction(solver: str) -> None:
    """Vectors that are joined from several models have such values: the least of n is about 1/n of the largest."""
    left, right = (torch.linalg.qr(drawn(300, 300, seed=seed)).Q for seed in (0, 1))
    sigma = torch.linspace(1.5, 0.02, 300, dtype=torch.float64)
    sigma[-1] = 2e-5
    matrix = (left * sigma) @ right
    for given in (matrix.T @ matrix, list((matrix.T @ matrix).split(compact.STRIP_COLUMNS))):
        made = spectral.inverse_root([strip.clone() for strip in given] if isinstance(given, list) else given)
        others = left[:, :-1].T @ made.times(matrix.T.contiguous()).T
        torch.testing.assert_close(others, right[:-1], rtol=0, atol=3e-9)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (700, 300), (3001, 257), (70_001, 3)])
def test_products_depend_on_no_chunk(shape: tuple[int, int]) -> None:
    rows, columns = shape
    one, two = drawn(*shape), drawn(*shape, seed=1)
    block = spectral.block_rows(rows, columns)
    made = []
    for chunk_elems in (1, GRAIN, 5 * GRAIN):
        group = TensorGroup.of(one, two, row=block * columns, chunk_elems=chunk_elems)

        def look(chunk: Chunk) -> list[Tensor]:
            x, y = (values.view(-1, columns) for values in chunk.models)
            return [x, x, x, y]

        made.append(spectral.products(group, look, block))
    for first, second in made:
        assert torch.equal(first, made[0][0])
        assert torch.equal(second, made[0][1])
        torch.testing.assert_close(first, one.T @ one, rtol=1e-11, atol=1e-9)
        torch.testing.assert_close(second, one.T @ two, rtol=1e-11, atol=1e-9)


def test_a_block_begins_aligned() -> None:
    for rows, columns in ((10_000_000, 1), (5000, 433), (9000, 8192), (3, 100_000)):
        block = spectral.block_rows(rows, columns)
        assert 0 < block <= rows
        assert block == rows or block % 8 == 0
