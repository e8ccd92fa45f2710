"""Matrix products over all rows of a group, and eigenvectors of symmetric matrices.

A matrix is *tall* here: it has its rows one after the other in memory, and its Gram matrix has a row for each column. All
arithmetic is in float64, in blocks of a fixed number of rows, so that neither chunk nor worker shows in a result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from streammerge.kernels.compact import STRIP_COLUMNS, Compact
from streammerge.kernels.spill import Half
from streammerge.kernels.tridiagonal import leading, leading_bytes
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.chunk import Chunk, Look, Swept

    Sum = torch.Tensor | Half

_BLOCK_ELEMS = 1 << 17
_LEAST_ROWS = 64
"""Fewer rows at once would make the product with a large Gram matrix wait for memory."""
_AT_ONCE = 2048
"""Most rows of a matrix whose eigenvectors LAPACK computes at once, which takes four more matrices. Larger matrices are
rotated in place."""
_FEW = 8
"""One of so many eigenvectors is found faster alone than by rotations of all."""
_APART = 128
"""Of so many vectors of an inverse root, one is held in float64."""
_PAIR_ROWS = 256
_MOST_SWEEPS = 40
_CONVERGED = 1e-14
_SPARE_BYTES = 8 << 20
"""Buffers of the library that multiplies matrices."""
TINY = 1e-6
"""A singular value counts as zero if it is at most this share of the largest. A Gram matrix in float64 does not tell
smaller ones from rounding errors."""


def block_rows(rows: int, columns: int) -> int:
    """Returns how many rows are multiplied at once. It is a multiple of 8, so that each block begins aligned alike."""
    return min(max(_BLOCK_ELEMS // max(columns, 1), _LEAST_ROWS) // 8 * 8, rows)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Adds up the product of the transposed first and of the second of each two matrices that a look yields, ``rows`` rows
    at once. ``count``: how many sums there are; the products belong to them in turn. 0: one for each product. Of a matrix
    times itself the lower half is enough."""

    rows: int
    count: int

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> list[Sum]:
        import torch

        totals: list[Sum] = []
        for chunk in chunks:
            matrices = iter(look(chunk))
            for place, (x, y) in enumerate(zip(matrices, matrices, strict=True)):
                number = place % self.count if self.count else place
                if number == len(totals):
                    size = x.shape[1]
                    totals.append(Half(size) if _is_gram(x, y) else torch.zeros(size, y.shape[1], dtype=torch.float64))
                total = totals[number]
                for start, stop in ranges(len(x), self.rows):
                    if isinstance(total, Half):
                        total.add_gram(x[start:stop])
                    else:
                        total.addmm_(x[start:stop].T, y[start:stop])
        return totals


def _is_gram(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def sums(group: Swept, look: Look, rows: int, count: int = 0) -> list[Sum]:
    """Returns the sum over all rows of :math:`x^T y` for each two matrices x and y that ``look(chunk)`` yields; its lower
    half where x is y.

    x and y are in float64, and not used any more when the next two are asked for. ``count``: how many sums there are, if a
    chunk gives more products; then x and y must have ``rows`` rows, since the order of products shows in a sum.
    If a sum is not finite, all are made again without agreed elements.
    """

    def added(swept: Swept) -> list[Sum]:
        return functools.reduce(_added, swept.sweep(look, _Sums(rows, count), 0, group.elems))

    totals = added(group)
    if all(map(is_finite, totals)):
        return totals
    totals.clear()
    return added(group.hiding())


def grams(group: Swept, look: Look, rows: int) -> list[Half]:
    """Returns the halves of :func:`sums` for a look that yields each matrix twice."""
    return [total for total in sums(group, look, rows) if isinstance(total, Half)]


def gram_and_product(group: Swept, look: Look, rows: int) -> tuple[Half, torch.Tensor]:
    """Returns the two results of :func:`sums` for a look that yields one matrix twice, and two others."""
    half, product = sums(group, look, rows)
    return cast("Half", half), cast("torch.Tensor", product)


def products(group: Swept, look: Look, rows: int, count: int = 0) -> list[torch.Tensor]:
    """Returns what :func:`sums` does, as whole matrices."""
    totals, made = sums(group, look, rows, count), list["torch.Tensor"]()
    while totals:
        total = totals.pop(0)
        made.append(total.square() if isinstance(total, Half) else total)
        del total
    return made


def _added(totals: list[Sum], more: list[Sum]) -> list[Sum]:
    for total, one in zip(totals, more, strict=True):
        total.add_(one)  # type: ignore[arg-type]
    return totals


def is_finite(total: Sum) -> bool:
    """Whether a sum of products is finite. A number that is not finite in a column shows on the diagonal."""
    return bool(total.diagonal().isfinite().all())


def is_exact(size: int) -> bool:
    """Whether matrices with so many columns are held in float64. Larger ones are held as :class:`Compact`."""
    return size <= _AT_ONCE


def eigen(matrix: torch.Tensor, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the eigenvalues of a positive semidefinite matrix, the largest first, and the eigenvectors as rows.

    The memory of ``matrix`` holds the eigenvectors afterwards. ``count``: as many are wanted, and there may be more. Of a
    large matrix they then have their own memory, if they are an eighth of all or fewer.
    """
    import torch

    if count is not None and len(matrix) > _AT_ONCE and count * _FEW <= len(matrix):
        return leading(matrix, count)
    if len(matrix) > _AT_ONCE:
        return _rotated([matrix]), matrix
    values, vectors = torch.linalg.eigh(matrix)
    matrix.copy_(vectors.flip(1).T)
    return values.flip(0).clamp_(min=0), matrix


def eigen_bytes(size: int, few: bool = False) -> int:
    """Returns the memory that :func:`eigen` needs beside a matrix of ``size`` rows. ``few``: for few of many vectors."""
    if few and size > _AT_ONCE:
        return max(leading_bytes(size, size // _FEW) + _SPARE_BYTES, eigen_bytes(size))
    if size <= _AT_ONCE:
        return 4 * 8 * size * size + _SPARE_BYTES
    pair = 2 * _PAIR_ROWS
    return 8 * (6 * pair * pair + 3 * pair * STRIP_COLUMNS) + 8 * size * 2 * _LEAST_ROWS + _SPARE_BYTES


def _rotated(strips: list[torch.Tensor]) -> torch.Tensor:
    """Makes the rows of a symmetric matrix orthogonal by rotations among them, in place: one-sided block Jacobi.

    The matrix is given as strips of its rows. The rows end as the eigenvectors, the first for the largest eigenvalue.
    Returns the eigenvalues. Hestenes, *Inversion of matrices by biorthogonalization*, 1958.
    """
    import torch

    blocks = [strip[a:b] for strip in strips for a, b in ranges(len(strip), _PAIR_ROWS)]
    buffers = torch.empty(2, 2 * _PAIR_ROWS * STRIP_COLUMNS, dtype=torch.float64)
    for _ in range(_MOST_SWEEPS):
        largest, off = float(_lengths(strips).max()), 0.0
        for number, one in enumerate(blocks):
            for other in blocks[number + 1 :] if len(blocks) > 1 else [one[:0]]:
                off = max(off, _made_orthogonal(one, other, largest, buffers))
        if off <= _CONVERGED:
            break
    values = _lengths(strips)
    start = 0
    for strip in strips:
        lengths = values[start : start + len(strip)].clamp(min=torch.finfo(torch.float64).tiny)
        strip.div_(lengths.unsqueeze(1))
        start += len(strip)
    order = values.argsort(descending=True, stable=True)
    _permute([row for strip in strips for row in strip.unbind()], order.tolist())
    return values[order]


def _lengths(strips: list[torch.Tensor]) -> torch.Tensor:
    import torch

    made, start = torch.empty(sum(map(len, strips)), dtype=torch.float64), 0
    for strip in strips:
        for a, b in ranges(len(strip), _LEAST_ROWS):
            torch.linalg.vector_norm(strip[a:b], dim=1, out=made[start + a : start + b])
        start += len(strip)
    return made


def _made_orthogonal(first: torch.Tensor, second: torch.Tensor, largest: float, buffers: torch.Tensor) -> float:
    """Rotates the rows of two blocks so that they are orthogonal. Returns how far they were from it, as a share of
    ``largest``, the length of the longest row of the matrix. ``buffers``: two, with room for a strip of both."""
    import torch

    strips = list(ranges(first.shape[1], STRIP_COLUMNS))
    count, rows = len(first), len(first) + len(second)

    def part_of(a: int, b: int, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[: rows * (b - a)].view(rows, b - a)

    gram = torch.zeros(rows, rows, dtype=torch.float64)
    for a, b in strips:
        part = torch.cat([first[:, a:b], second[:, a:b]], out=part_of(a, b, buffers[0]))
        gram.addmm_(part, part.T)
    lengths = gram.diagonal().sqrt()
    # The share of a shorter row along a longer one counts, as in the error bound of an eigenvalue.
    along = gram.abs().fill_diagonal_(0).div_(torch.maximum(lengths.unsqueeze(0), lengths.unsqueeze(1)).clamp_(min=1e-300))
    off = float(along.max()) / largest if largest > 0 else 0.0
    if off <= _CONVERGED:
        return off
    del along
    turn = torch.linalg.eigh(gram).eigenvectors.flip(1).T.contiguous()
    for a, b in strips:
        part = torch.cat([first[:, a:b], second[:, a:b]], out=part_of(a, b, buffers[0]))
        part = torch.mm(turn, part, out=part_of(a, b, buffers[1]))
        first[:, a:b], second[:, a:b] = part[:count], part[count:]
    return off


def _permute(rows: list[torch.Tensor], order: list[int]) -> None:
    """Puts row ``order[i]`` at place i, in place."""
    done = [False] * len(order)
    for begin in range(len(order)):
        if done[begin] or order[begin] == begin:
            continue
        held, at = rows[begin].clone(), begin
        while True:
            done[at] = True
            source = order[at]
            if source == begin:
                rows[at].copy_(held)
                break
            rows[at].copy_(rows[source])
            at = source


def singular(values: torch.Tensor, largest: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the singular values that belong to eigenvalues of a Gram matrix, and their inverses; zero for tiny ones.

    ``largest``: the singular value that others are compared with; by default the first.
    """
    import torch

    roots = values.clamp(min=0).sqrt()
    most = largest if largest is not None else float(roots[0]) if len(roots) else 0.0
    kept = roots > TINY * most
    return torch.where(kept, roots, 0.0), torch.where(kept, 1 / roots.clamp(min=1e-300), 0.0)


class InverseRoot:
    """The symmetric matrix :math:`G^{-1/2}`: its lower half, and the part of the few smallest singular values apart.

    These have the largest factors by far. In 32 bits their part would leave to all other numbers an error that grows with
    the side, since the smallest of n singular values is about 1/n of the largest. So their vectors, ``few``, are held in
    float64.
    """

    def __init__(self, rest: Compact, few: torch.Tensor, factors: torch.Tensor) -> None:
        self._rest, self._few, self._factors = rest, few, factors

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Returns the product with a matrix of float64."""
        made = self._rest.times(matrix)
        return made.addmm_(self._few.T, (self._few @ matrix).mul_(self._factors.unsqueeze(1)))


def inverse_root(gram: torch.Tensor | list[torch.Tensor]) -> InverseRoot:
    """Returns :math:`G^{-1/2}` without tiny singular values of G's factor.

    The polar factor of a matrix is what this makes of it, if G is its own Gram matrix. ``gram`` is overwritten. Strips of
    its rows are taken out of their list, so that their memory is free for the result.
    """
    import torch

    if isinstance(gram, list) and is_exact(sum(map(len, gram))):
        gram = torch.cat(gram)
    values = _rotated(gram) if isinstance(gram, list) else eigen(gram)[0]  # the rows are the vectors now
    size, factors = len(values), singular(values)[1]
    kept = int((factors > 0).sum())
    apart = slice(max(kept - few_vectors(size), 0), kept)
    few, few_factors = _apart(gram if isinstance(gram, list) else [gram], apart), factors[apart].clone()
    factors[apart] = 0
    if isinstance(gram, list):
        vectors, start = Compact(size, size, exact=False), 0
        while gram:
            strip = gram.pop(0)
            vectors.put_rows(strip, start)
            start += len(strip)
            del strip
    else:
        vectors = Compact.over(gram)
    return InverseRoot(_mixed(vectors, factors), few, few_factors)


def _apart(strips: Sequence[torch.Tensor], rows: slice) -> torch.Tensor:
    """Returns a copy of some of the last rows of a matrix, made orthogonal to the rows before them and to each other.

    Rotations leave to each vector an error of about 1e-15 divided by its eigenvalue, which is large for the smallest. Those
    before it are exact enough to take it off.
    """
    import torch

    count, start = rows.stop - rows.start, 0
    made, others = torch.empty(count, strips[0].shape[1], dtype=torch.float64), list["torch.Tensor"]()
    for strip in strips:
        begin, end = max(start, rows.start), min(start + len(strip), rows.stop)
        if begin < end:
            made[begin - rows.start : end - rows.start] = strip[begin - start : end - start]
        others += [strip[a:b] for a, b in ranges(min(max(rows.start - start, 0), len(strip)), STRIP_COLUMNS)]
        start += len(strip)
    for _ in range(2 if count else 0):
        for part in others:
            made.addmm_(made @ part.T, part, alpha=-1)
        made = torch.linalg.qr(made.T).Q.T.contiguous()  # each row keeps what is orthogonal to those before it
    return made


def few_vectors(size: int) -> int:
    """Returns how many vectors of the smallest singular values :class:`InverseRoot` holds in float64."""
    return 0 if is_exact(size) else max(size // _APART, 1)


def _mixed(vectors: Compact, factors: torch.Tensor) -> Compact:
    """Returns the lower half of :math:`V^T F V` of vectors that are rows, and of a diagonal matrix F."""
    import torch

    size = vectors.shape[1]
    made = Compact(size, size, is_exact(size), lower=True)
    for number, (a, b) in enumerate(made.strips):
        part = torch.zeros(size - a, b - a, dtype=torch.float64)
        for start, stop in ranges(len(factors), STRIP_COLUMNS):
            scaled = vectors.get(number, start, stop) * factors[start:stop].unsqueeze(1)
            for other, (c, d) in enumerate(made.strips[number:], number):
                part[c - a : d - a].addmm_(vectors.get(other, start, stop).T, scaled)
        made.put(number, part)
    return made


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of a tensor as a matrix: the first axis, and all others together."""
    return shape[0], math.prod(shape[1:])
