r"""The truncated singular value decomposition of a matrix that is read by blocks of rows.

A matrix D [n, m] becomes :math:`L R` with L [n, r] and R [r, m]: :math:`L = U \sqrt{S}`, :math:`R = \sqrt{S} V^\top`. All
arithmetic is in float64, and the blocks follow from the shape, so neither memory nor workers show in a result.

A matrix whose shorter side has at most 1024 numbers, or at most twice the rank, is decomposed exactly: by the eigenvectors
of the Gram matrix of its shorter side. Their products with D are computed from D itself, so small singular values lose
nothing. Others are decomposed in a random subspace of 16 more dimensions than the rank, which three passes turn towards
the largest singular values: Halko, Martinsson and Tropp, *Finding structure with randomness*, 2011. The error was at
most 1.001 times the smallest possible.

The largest number of each singular vector of the shorter side is positive. Of equal ones the first counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from streammerge.kernels.spectral import block_rows, eigen, eigen_bytes
from streammerge.sources.base import COPY_BYTES, Needs, Room, Source
from streammerge.sources.wide import Wide, wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

_EXACT_SIDE = 1024
_OVERSAMPLED = 16
_PASSES = 3
_BLOCK_ELEMS = 1 << 22
"""Most numbers of a block of rows of a wide matrix. Each two blocks are multiplied."""
_STRIP_ROWS = 256
_TINY = 1e-7
"""A singular value of at most this share of the largest counts as zero: float32 factors do not hold more."""
_UNITS = {DType.F32: 2.0**-24, DType.F64: 2.0**-53}
"""Relative error of a rounded number. Differences of 16-bit numbers are what they are: there, steps of rounding are all
that a training changes."""
_SPARE_BYTES = 8 << 20
"""Buffers of the library that multiplies matrices."""


class Wanted(NamedTuple):
    """How much of a matrix is kept. ``rank``: the most; 0 for no limit. ``energy``: the least share of the sum of squares;
    0 for all that the rank holds. ``dtype``: of the factors."""

    rank: int
    energy: float
    dtype: DType

    def most(self, shape: tuple[int, int]) -> int:
        """Returns the highest rank that the factors of a matrix may have."""
        return min(self.rank or min(shape), *shape)


class Factors(NamedTuple):
    """``left`` [n, r] and ``right`` [r, m], in the wanted dtype. ``total`` and ``rest``: the sums of the squares of the
    matrix, and of what the factors lack of it before they are rounded."""

    left: torch.Tensor
    right: torch.Tensor
    total: float
    rest: float

    @property
    def rank(self) -> int:
        return len(self.right)


@dataclass(frozen=True, slots=True)
class Rows:
    """A source as a matrix. ``reference``: the numbers that the matrix is a difference of, if their rounding errors count
    as zero."""

    source: Source
    shape: tuple[int, int]
    reference: Source | None = None

    @property
    def block(self) -> int:
        """Rows that are read at once."""
        rows, columns = self.shape
        if rows >= columns:
            return block_rows(rows, columns)
        return min(max(_BLOCK_ELEMS // max(columns, 1), 8) // 8 * 8, rows)

    @property
    def span(self) -> int:
        return min(GRAIN, self.source.spec.numel)

    def reading_bytes(self) -> int:
        """Returns the memory of a reader, and of two blocks."""
        needs = wide_needs(self.source, self.span)
        if self.reference is not None:
            needs += wide_needs(self.reference, self.span)
        return held_bytes(needs) + 16 * self.block * self.shape[1]


def held_bytes(needs: Needs) -> int:
    """Returns all memory of a reader that has no worker's buffers."""
    return needs.scratch_bytes + needs.shared_bytes + needs.tiles * COPY_BYTES + needs.held_bytes


def is_exact(shape: tuple[int, int], rank: int) -> bool:
    """Whether a matrix is decomposed by its Gram matrix."""
    short = min(shape)
    return short <= _EXACT_SIDE or 2 * (rank + _OVERSAMPLED) >= short


def decomposing_bytes(rows: Rows, wanted: Wanted) -> int:
    """Returns the memory that :func:`truncated` needs for a matrix."""
    (n, m), most = rows.shape, wanted.most(rows.shape)
    short, item = min(n, m), wanted.dtype.element_bytes
    factors = item * most * (n + m)
    exact = 8 * short * short + eigen_bytes(short) + 16 * min(most, _STRIP_ROWS) * (m + rows.block)
    tried = _sizes(rows.shape, wanted)
    sketched = max((8 * k * (5 * m + 2 * n + rows.block) + 40 * k * k for k in tried), default=0) + _SPARE_BYTES
    worst = max(exact if _ends_exact(rows.shape, wanted) else 0, sketched)
    return rows.reading_bytes() + factors + worst


def _sizes(shape: tuple[int, int], wanted: Wanted) -> list[int]:
    """Returns the dimensions of the random subspaces that are tried, one after the other."""
    most, rank, sizes = wanted.most(shape), wanted.most(shape), list[int]()
    if wanted.energy:
        rank = min(64, most)
    while not is_exact(shape, rank):
        sizes.append(rank + _OVERSAMPLED)
        if rank == most:
            break
        rank = min(2 * rank, most)
    return sizes


def _ends_exact(shape: tuple[int, int], wanted: Wanted) -> bool:
    return is_exact(shape, wanted.most(shape))


def truncated(rows: Rows, wanted: Wanted, room: Room) -> Factors:
    """Returns the factors of a matrix. Raises ValueError for a matrix with NaN or infinity."""
    matrix = _Matrix(rows, room)
    for size in _sizes(rows.shape, wanted):
        made = _sketched(matrix, wanted, size)
        if made is not None:
            return made
    return _exact_tall(matrix, wanted) if rows.shape[0] >= rows.shape[1] else _exact_wide(matrix, wanted)


class _Matrix:
    """Reads a matrix by blocks of rows. ``total``: its sum of squares, ``noise``: the singular value up to which rounding
    errors of the reference explain it; both known after the first pass."""

    def __init__(self, rows: Rows, room: Room) -> None:
        self.shape, self.block = rows.shape, rows.block
        self._rows, self._room, self._wide = rows, room, Wide(rows.source, room, rows.span)
        reference = rows.reference
        self._reference = Wide(reference, room, rows.span) if reference is not None else None
        self._unit = _UNITS.get(reference.spec.dtype, 0.0) if reference is not None else 0.0
        self.total = self.noise = -1.0

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields each block of rows with its range, once."""
        first = self.total < 0
        total = squares = 0.0
        for start, stop in ranges(self.shape[0], self.block):
            part = self.read(start, stop)
            if first:
                total += float(part.square().sum())
                squares += self._squares(start, stop)
            yield start, stop, part
        if first:
            self.measured(total, squares)

    def measured(self, total: float, squares: float) -> None:
        rows, columns = self.shape
        if not math.isfinite(total):
            raise ValueError("NaN or infinity")
        self.total = total
        self.noise = self._unit * math.sqrt(squares) * (rows**-0.5 + columns**-0.5) if total else 0.0

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        columns = self.shape[1]
        part = torch.empty((stop - start) * columns, dtype=torch.float64)
        begin = start * columns
        for a, b in ranges(len(part), self._rows.span):
            self._room.halt()
            part[a:b] = self._wide.read(begin + a, begin + b)
        return part.view(-1, columns)

    def squares(self, start: int, stop: int) -> float:
        return self._squares(start, stop)

    def _squares(self, start: int, stop: int) -> float:
        if self._reference is None or not self._unit:
            return 0.0
        columns = self.shape[1]
        begin, end = start * columns, stop * columns
        spans = ranges(end - begin, self._rows.span)
        return sum(float(self._reference.read(begin + a, begin + b).square().sum()) for a, b in spans)

    def rank(self, sigma: torch.Tensor, wanted: Wanted) -> int:
        """Returns the rank for these singular values, the largest first."""
        if not self.total or not len(sigma):
            return 0
        kept = int((sigma > max(_TINY * float(sigma[0]), self.noise)).sum())
        if wanted.energy:
            sums = sigma.square().cumsum(0)
            kept = min(kept, int((sums < wanted.energy * self.total).sum()) + 1)
        return min(kept, wanted.most(self.shape))


def _signs(vectors: torch.Tensor) -> torch.Tensor:
    """Returns the sign of the largest number of each row."""
    import torch

    largest = vectors.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(vectors.gather(1, largest) < 0, -1.0, 1.0)
    return signs.double()


def _exact_tall(matrix: _Matrix, wanted: Wanted) -> Factors:
    import torch

    (rows, columns), into = matrix.shape, wanted.dtype.torch
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    for _, _, part in matrix.blocks():
        gram.addmm_(part.T, part)
    values, basis = eigen(gram)
    sigma = values.sqrt()
    rank = matrix.rank(sigma, wanted)
    roots = sigma[:rank].sqrt()
    basis = basis[:rank].mul_(_signs(basis[:rank])) if rank else basis[:0]
    left, right, kept = torch.empty(rows, rank, dtype=into), torch.empty(rank, columns, dtype=into), 0.0
    for a, b in ranges(rank, _STRIP_ROWS):
        right[a:b] = basis[a:b] * roots[a:b, None]
    if rank:
        for start, stop, part in matrix.blocks():
            for a, b in ranges(rank, _STRIP_ROWS):
                made = part @ basis[a:b].T
                kept += float(made.square().sum())
                left[start:stop, a:b] = made / roots[a:b]
    return Factors(left, right, matrix.total, max(matrix.total - kept, 0.0))


def _exact_wide(matrix: _Matrix, wanted: Wanted) -> Factors:
    import torch

    (rows, columns), into = matrix.shape, wanted.dtype.torch
    gram = torch.empty(rows, rows, dtype=torch.float64)
    total = squares = 0.0
    spans = list(ranges(rows, matrix.block))
    for number, (a, b) in enumerate(spans):
        part = matrix.read(a, b)
        total += float(part.square().sum())
        squares += matrix.squares(a, b)
        gram[a:b, a:b] = part @ part.T
        for c, d in spans[number + 1 :]:
            made = part @ matrix.read(c, d).T
            gram[a:b, c:d] = made
            gram[c:d, a:b] = made.T
    matrix.measured(total, squares)
    values, basis = eigen(gram)
    sigma = values.sqrt()
    rank = matrix.rank(sigma, wanted)
    roots = sigma[:rank].sqrt()
    basis = basis[:rank].mul_(_signs(basis[:rank])) if rank else basis[:0]
    left, right, kept = torch.empty(rows, rank, dtype=into), torch.empty(rank, columns, dtype=into), 0.0
    for a, b in ranges(rank, _STRIP_ROWS):
        left[:, a:b] = (basis[a:b] * roots[a:b, None]).T
        made = torch.zeros(b - a, columns, dtype=torch.float64)
        for start, stop, part in matrix.blocks():
            made.addmm_(basis[a:b, start:stop], part)
        kept += float(made.square().sum())
        right[a:b] = made.div_(roots[a:b, None])
    return Factors(left, right, matrix.total, max(matrix.total - kept, 0.0))


def _sketched(matrix: _Matrix, wanted: Wanted, size: int) -> Factors | None:
    """Returns the factors from a random subspace; None if it does not hold the wanted energy and a larger one may."""
    import torch

    (rows, columns), into = matrix.shape, wanted.dtype.torch
    drawn = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, size, generator=drawn, dtype=torch.float64)
    for _ in range(_PASSES):
        turned = torch.zeros(columns, size, dtype=torch.float64)
        for _, _, part in matrix.blocks():
            turned.addmm_(part.T, part @ basis)
        basis = torch.linalg.qr(turned).Q
        del turned
    seen = torch.empty(rows, size, dtype=torch.float64)
    gram = torch.zeros(size, size, dtype=torch.float64)
    for start, stop, part in matrix.blocks():
        seen[start:stop] = part @ basis
        gram.addmm_(seen[start:stop].T, seen[start:stop])
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_(min=0), vectors.flip(1)
    most = wanted.most(matrix.shape)
    if wanted.energy and size - _OVERSAMPLED < most:
        held = float(values[: size - _OVERSAMPLED].sum())
        if held < wanted.energy * matrix.total:
            return None
    sigma = values[: size - _OVERSAMPLED].sqrt()
    rank = matrix.rank(sigma, wanted)
    roots, vectors = sigma[:rank].sqrt(), vectors[:, :rank]
    left, right = torch.empty(rows, rank, dtype=into), torch.empty(rank, columns, dtype=into)
    if rank:
        turned = vectors.T @ basis.T
        signs = _signs(turned) if columns <= rows else _signs(vectors.T @ seen.T)
        vectors = vectors * signs.T
        right.copy_(turned.mul_(signs * roots[:, None]))
        for a, b in ranges(rows, matrix.block):
            left[a:b] = (seen[a:b] @ vectors).div_(roots)
    return Factors(left, right, matrix.total, max(matrix.total - float(values[:rank].sum()), 0.0))


def of_product(left: torch.Tensor, right: torch.Tensor, rank: int, dtype: DType) -> Factors:
    """Returns factors of the product of ``left`` [n, k] and ``right`` [k, m], which is never formed.

    The singular values are those of a small matrix: the product of what the QR decompositions of both leave.
    Both are in float64. Raises ValueError for NaN and infinity.
    """
    import torch

    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError("NaN or infinity")
    one, core = torch.linalg.qr(left)
    other, across = torch.linalg.qr(right.T)
    u, sigma, v = torch.linalg.svd(core @ across.T, full_matrices=False)
    kept = int((sigma > _TINY * float(sigma[0])).sum()) if len(sigma) else 0
    kept = min(kept, rank)
    roots, u, v = sigma[:kept].sqrt(), u[:, :kept], v[:kept]
    if kept:
        vectors = v @ other.T if len(other) <= len(one) else u.T @ one.T
        signs = _signs(vectors)
        u, v = u * signs.T, v * signs
    squares = sigma.square()
    made_left, made_right = (one @ (u * roots)).to(dtype.torch), ((v * roots[:, None]) @ other.T).to(dtype.torch)
    return Factors(made_left, made_right, float(squares.sum()), float(squares[kept:].sum()))


def product_bytes(shape: tuple[int, int], rank: int) -> int:
    """Returns the memory of :func:`of_product` for factors of this rank in all."""
    rows, columns = shape
    return 8 * (5 * rank * (rows + columns) + 8 * rank * rank) + _SPARE_BYTES
