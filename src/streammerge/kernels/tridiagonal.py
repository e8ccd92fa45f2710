"""The first eigenvectors of a symmetric matrix that is too large for LAPACK beside other matrices.

The matrix is made tridiagonal by Householder's reflections, which take its place in memory. Bisection finds the largest
eigenvalues of the tridiagonal matrix, and inverse iteration their vectors, many at once. These are made orthogonal to each
other, and reflected back. Beside the matrix only these vectors are held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_PANEL_ROWS = 64
"""Reflections that are applied at once."""
_VECTORS = 128
"""Eigenvectors that inverse iteration makes at once."""
_HALVINGS = 56
_EPS = 2.0**-52
"""Least pivot of a matrix whose numbers are about 1."""


def leading(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ``count`` largest eigenvalues of a positive semidefinite float64 matrix, the largest first, and their
    vectors as rows.

    ``matrix`` is overwritten. Of equal eigenvalues any orthogonal vectors are given, the same in each run.
    """
    import torch

    scale = float(matrix.diagonal().abs().max())
    matrix.div_(scale or 1.0)
    diagonal, beside, factors = _reduce(matrix)
    a, e = diagonal.numpy(), beside.numpy()
    values = _largest(a, e, count)
    vectors = torch.empty(count, len(a), dtype=torch.float64)
    make = torch.Generator().manual_seed(0)
    for start, stop in ranges(count, _VECTORS):
        drawn = torch.randn(len(a), stop - start, dtype=torch.float64, generator=make).numpy()
        vectors[start:stop] = torch.from_numpy(_solved(a, e, values[start:stop], drawn)).T
    for shift in (1e-10, 0.0, 0.0):
        _make_orthonormal(vectors, shift)
    _reflect_back(vectors, matrix, factors)
    return torch.from_numpy(values).mul_(scale), vectors


def leading_bytes(size: int, count: int) -> int:
    """Returns the memory that :func:`leading` needs beside the matrix."""
    return 8 * (size * (count + 2 * _PANEL_ROWS + 8 * _VECTORS) + 3 * count * count + 4 * count * _PANEL_ROWS)


def _reduce(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes a matrix tridiagonal. Returns its diagonal, the numbers beside it, and the factor of each reflection.

    Row j of ``matrix`` ends with the vector of reflection j, from column j + 1 on.
    """
    import torch

    size = len(matrix)
    diagonal, beside, factors = (torch.zeros(n, dtype=torch.float64) for n in (size, max(size - 1, 0), size))
    v, w = (torch.zeros(size, _PANEL_ROWS, dtype=torch.float64) for _ in range(2))
    for begin, end in ranges(size, _PANEL_ROWS):
        for row in range(begin, end):
            done = row - begin
            line = matrix[row, row:]
            if done:
                line = line - v[row:, :done] @ w[row, :done] - w[row:, :done] @ v[row, :done]
            diagonal[row] = line[0]
            rest = line[1:]
            if not len(rest):
                break
            first, length = float(rest[0]), float(torch.linalg.vector_norm(rest))
            below = float(torch.linalg.vector_norm(rest[1:])) if len(rest) > 1 else 0.0
            if below == 0.0:
                factor, beside[row] = 0.0, first
                rest = torch.zeros_like(rest)
            else:
                end_of = -length if first >= 0 else length
                factor, beside[row] = (end_of - first) / end_of, end_of
                rest = rest / (first - end_of)
            rest[0] = 1.0
            factors[row] = factor
            matrix[row, row + 1 :] = rest
            inner, outer = v[row + 1 :, :done], w[row + 1 :, :done]
            made = matrix[row + 1 :, row + 1 :] @ rest
            made -= inner @ (outer.T @ rest) + outer @ (inner.T @ rest)
            made *= factor
            made -= rest * (0.5 * factor * float(made @ rest))
            v[: row + 1, done], w[: row + 1, done] = 0, 0
            v[row + 1 :, done], w[row + 1 :, done] = rest, made
        else:
            if end < size:
                left = matrix[end:, end:]
                left.addmm_(v[end:, : end - begin], w[end:, : end - begin].T, alpha=-1)
                left.addmm_(w[end:, : end - begin], v[end:, : end - begin].T, alpha=-1)
    return diagonal, beside, factors


def _largest(a: Array, e: Array, count: int) -> Array:
    """Returns the largest eigenvalues of a tridiagonal matrix by bisection; ``a`` is its diagonal, ``e`` beside it."""
    import numpy as np

    size = len(a)
    reach = np.abs(a)
    reach[1:] += np.abs(e)
    reach[:-1] += np.abs(e)
    low, high = np.full(count, -reach.max() * 1.01), np.full(count, reach.max() * 1.01)
    most = np.arange(size - 1, size - 1 - count, -1)
    squares = [1e-300, *np.maximum(e * e, 1e-300).tolist()]
    quotient, below = np.empty(count), np.empty(count, dtype=bool)
    with np.errstate(divide="ignore"):
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            smaller, pivot = np.zeros(count, dtype=np.int64), np.ones(count)
            for number, square in zip(a.tolist(), squares, strict=True):
                np.divide(square, pivot, out=quotient)
                quotient += middle
                np.subtract(number, quotient, out=pivot)
                np.less(pivot, 0.0, out=below)
                smaller += below
            under = smaller <= most
            low, high = np.where(under, middle, low), np.where(under, high, middle)
    found: Array = 0.5 * (low + high)
    return found


def _solved(a: Array, e: Array, values: Array, x: Array) -> Array:
    """Returns eigenvectors of a tridiagonal matrix as columns: two inverse iterations from ``x``, with pivots by size."""
    import numpy as np

    size = len(a)
    d, u, over, f = (np.zeros((size, len(values))) for _ in range(4))
    swapped = np.zeros((size, len(values)), dtype=bool)
    now, after = a[0] - values, np.full(len(values), e[0] if size > 1 else 0.0)
    for i in range(size - 1):
        beside, more, there = e[i], e[i + 1] if i + 2 < size else 0.0, a[i + 1] - values
        swap = np.abs(now) < abs(beside)
        top = np.where(swap, beside, now)
        top = np.where(np.abs(top) < _EPS, _EPS, top)
        ratio = np.where(swap, now, beside) / top
        d[i], f[i], swapped[i] = top, ratio, swap
        u[i], over[i] = np.where(swap, there, after), np.where(swap, more, 0.0)
        now = np.where(swap, after, there) - ratio * u[i]
        after = np.where(swap, -ratio * more, more)
    d[-1] = np.where(np.abs(now) < _EPS, _EPS, now)
    for _ in range(2):
        for i in range(size - 1):
            first, second, swap = x[i].copy(), x[i + 1], swapped[i]
            x[i] = np.where(swap, second, first)
            x[i + 1] = np.where(swap, first, second) - f[i] * x[i]
        x[-1] /= d[-1]
        if size > 1:
            x[-2] = (x[-2] - u[-2] * x[-1]) / d[-2]
        for i in range(size - 3, -1, -1):
            x[i] = (x[i] - u[i] * x[i + 1] - over[i] * x[i + 2]) / d[i]
        x /= np.sqrt(np.einsum("ij,ij->j", x, x))
    return x


def _make_orthonormal(vectors: torch.Tensor, shift: float) -> None:
    """Makes rows orthogonal by Cholesky's factor of their Gram matrix. A shift makes it safe for rows that are nearly
    dependent; it is to be repeated without a shift then. Yamazaki, Nakatsukasa et al., *Shifted Cholesky QR*, 2020."""
    import torch

    gram = vectors @ vectors.T
    gram.diagonal().add_(shift)
    factor = torch.linalg.cholesky(gram)
    for start, stop in ranges(vectors.shape[1], _PANEL_ROWS):
        vectors[:, start:stop] = torch.linalg.solve_triangular(factor, vectors[:, start:stop], upper=False)


def _reflect_back(vectors: torch.Tensor, matrix: torch.Tensor, factors: torch.Tensor) -> None:
    """Takes rows from the basis of the tridiagonal matrix into that of the whole one, a panel of reflections at once."""
    import torch

    for begin, end in reversed(list(ranges(len(matrix), _PANEL_ROWS))):
        # Row i of the panel is zero before column i + 1, which is column i of what remains.
        panel = matrix[begin:end, begin + 1 :].triu()
        inner = panel @ panel.T
        joined = torch.zeros(end - begin, end - begin, dtype=torch.float64)
        for i, factor in enumerate(factors[begin:end].tolist()):
            joined[:i, i] = (joined[:i, :i] @ inner[:i, i]).mul_(-factor)
            joined[i, i] = factor
        vectors[:, begin + 1 :] -= ((vectors[:, begin + 1 :] @ panel.T) @ joined.T) @ panel
