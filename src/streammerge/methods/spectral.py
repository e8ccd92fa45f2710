r"""Merges by singular values: Iso-C, Iso-CTS, TSV-M, KnOTS.

A tensor of two axes or more is a matrix here, its first axis by all others together (a convolution is out by in * height *
width). A is a delta, or a sum of deltas, with its longer side as rows. Its Gram matrix :math:`G = A^\top A = V S^2
V^\top` is summed in one pass, in float64. The left singular vectors are :math:`U = A V S^{-1}`, so every result is
made of rows of A times small matrices. An engine that reads rows gets a wide matrix turned (``turns``). A complex tensor
has its real and imaginary parts as one more axis, and is not turned.

*Tiny* singular values, at most a millionth of the largest, count as zero, and their vectors are left out everywhere. So a
matrix of lower rank has the polar factor :math:`U V^\top` of its row space: a continuous function of the matrix as long as
its rank stays, also where singular values are equal. ``tsv``, ``iso_cts`` and ``knots`` choose single vectors. Where
singular values are equal, these are those of the solver, and the same in each run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import OPERAND, Chunk, Kernel, Slot
from streammerge.kernels.compact import STRIP_COLUMNS, Compact
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.spectral import (
    block_rows,
    eigen,
    eigen_bytes,
    inverse_root,
    is_exact,
    is_finite,
    products,
    sides,
    singular,
)
from streammerge.methods.contracts import PerModel, Values, merge_method
from streammerge.methods.linear import scaled
from streammerge.methods.sparsify import check_density
from streammerge.methods.task_arithmetic import winners
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
_MOST_AT_ONCE = 1 << 24
"""Most numbers of Gram matrices that one pass sums. More matrices need more passes."""
_SUM = -1
"""Stands for the sum of the deltas, among the numbers of models."""
_PROJECTED = 512
"""Columns of a Gram matrix that are projected at once."""


def _is_matrix(shape: Shape) -> bool:
    return len(shape) > 1 and 0 not in shape


def _is_wide(shape: Shape, values: Values) -> bool:
    return _is_matrix(shape) and math.prod(shape[1:]) > shape[0]


def _row(shape: Shape, values: Values) -> int:
    if not _is_matrix(shape):
        return 1
    rows, columns = sides(shape)
    return block_rows(rows, columns) * columns


def _delta(chunk: Chunk, model: int, weight: Sequence[float], slot: Slot = OPERAND) -> torch.Tensor:
    """Returns the weighted delta of a chunk, in float64."""
    import torch

    return scaled(chunk.delta(model, slot, torch.float64), weight[model])


def _sum(chunk: Chunk, weight: Sequence[float]) -> torch.Tensor:
    """Returns the sum of the weighted deltas of a chunk, in float64."""
    total = _delta(chunk, 0, weight, "sum")
    for model in range(1, len(weight)):
        total.add_(_delta(chunk, model, weight))
    return total


def _on_base(chunk: Chunk, change: torch.Tensor) -> torch.Tensor:
    import torch

    return change.view(-1).add_(chunk.base_as(torch.float64))


def _mean(weight: Sequence[float], scale: float) -> Kernel:
    return lambda chunk: _on_base(chunk, _sum(chunk, weight).mul_(scale / len(weight)))


def _all_nan(chunk: Chunk) -> torch.Tensor:
    """The result where a delta has NaN or infinity, which reaches every number."""
    import torch

    return chunk.empty("sum", torch.float64).fill_(torch.nan)


def _iso_c_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not _is_matrix(shape):
        return 0
    rows, columns = sides(shape)
    return 8 * columns * columns + eigen_bytes(columns) + 16 * columns * block_rows(rows, columns)


@merge_method("iso_c", base="required", row=_row, buffers=4, compute="float64", whole=_iso_c_bytes, turns=_is_wide)
def iso_c(group: TensorGroup, *, weight: PerModel = (1.0,), lambda_: float = 1.0) -> Kernel:
    r"""Sums the deltas and makes all singular values of the sum equal.

    .. math:: y = b + \lambda\, \bar\sigma\, U V^\top, \qquad \sum_m w_m (x_m - b) = U S V^\top, \qquad
              \bar\sigma = \operatorname{mean}(\sigma)

    Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces*, 2025
    (arXiv:2502.04959), as its authors' code computes it. ``weight`` per model; ``lambda`` is the paper's alpha. One model
    or more.

    The first axis by all others is the matrix. A vector or a number is the mean of the weighted deltas, times lambda, as
    in the paper. All is computed in float64, in two passes over the tensor. A Gram matrix of the shorter side is held,
    and up to 2048 columns four more of its size.

    Edge cases: singular values of at most a millionth of the largest count as zero and stay zero, so the result is the
    polar factor of the row space; the mean is over all singular values. Equal singular values make no difference.
    Deviation from the authors' code: layers with text_projection in their name are no exception.
    """
    import torch

    if not _is_matrix(group.shape):
        return _mean(weight, lambda_)
    rows, columns = sides(group.shape)
    block = block_rows(rows, columns)

    def twice(chunk: Chunk) -> Iterator[torch.Tensor]:
        yield (added := _sum(chunk, weight).view(-1, columns))
        yield added

    (gram,) = products(group, twice, block)
    if not is_finite(gram):
        return _all_nan
    values, basis = eigen(gram)
    sigma, inverse = singular(values)
    factors = inverse.mul_(lambda_ * float(sigma.sum()) / min(rows, columns))

    def kernel(chunk: Chunk) -> torch.Tensor:
        added = _sum(chunk, weight).view(-1, columns)
        for start, stop in ranges(len(added), block):
            part = added[start:stop]
            torch.mm((part @ basis.T).mul_(factors), basis, out=part)
        return _on_base(chunk, added)

    return kernel


class _Vectors:
    """Right singular vectors of some of the deltas, or of their sum, as rows of ``basis``; one range of rows for each.

    ``inverse`` has the inverses of their singular values, and zero for those that are left out. ``shared``: what is taken
    off the left singular vectors of each model: these combinations of the left singular vectors of the sum.
    """

    def __init__(self, count: int, columns: int) -> None:
        import torch

        self.basis = Compact(count, columns, is_exact(columns))
        self.sigma, self.inverse = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        self.places: list[tuple[int, int, int]] = []
        self.shared: dict[int, torch.Tensor] = {}
        self._next = 0

    def add(self, model: int, values: torch.Tensor, basis: torch.Tensor, largest: float | None = None) -> tuple[int, int]:
        """Adds vectors of a model. ``largest``: see :func:`singular`. Returns the range of their rows."""
        start, stop = self._next, self._next + len(basis)
        self.sigma[start:stop], self.inverse[start:stop] = singular(values, largest)
        self.basis.put_rows(basis.mul_((self.inverse[start:stop] > 0).unsqueeze(1)), start)
        self.places.append((model, start, stop))
        self._next = stop
        return start, stop

    def left(self, chunk: Chunk, weight: Sequence[float], block: int) -> torch.Tensor:
        """Returns the left singular vectors in the rows of a chunk: one vector in each column."""
        import torch

        count, columns = self.basis.shape
        added = _sum(chunk, weight) if self.places[0][0] == _SUM else None
        rows = chunk.elems // columns
        made = chunk.empty("left", torch.float64)[: rows * count].view(rows, count).zero_()
        for model, start, stop in self.places:
            delta = added if added is not None and model == _SUM else _delta(chunk, model, weight)
            _add_products(made[:, start:stop], delta.view(-1, columns), self.basis, start, block)
            made[:, start:stop].mul_(self.inverse[start:stop])
            shared = self.shared.get(model)
            if shared is not None:
                for a, b in ranges(rows, block):
                    made[a:b, start:stop].addmm_(made[a:b, : len(shared)], shared, alpha=-1)
        return made

    def merged(self, group: TensorGroup, weight: Sequence[float], factors: torch.Tensor, block: int) -> Kernel:
        """Returns the kernel of the orthogonalised left vectors, times the factors, times the orthogonalised right ones."""
        import torch

        count, columns = self.basis.shape

        def twice(chunk: Chunk) -> Iterator[torch.Tensor]:
            yield (left := self.left(chunk, weight, block))
            yield left

        (gram,) = products(group, twice, block)
        if not is_finite(gram):
            return _all_nan
        left_root = inverse_root(gram)
        del gram
        right_root, joined = inverse_root(self.basis.gram_rows()), Compact(count, columns, self.basis.exact)
        for number in range(len(joined.strips)):
            right = right_root.times(self.basis.get(number)).mul_(factors.unsqueeze(1))
            joined.put(number, left_root.times(right))
        del left_root, right_root

        def kernel(chunk: Chunk) -> torch.Tensor:
            left = self.left(chunk, weight, block)
            made = chunk.empty("sum", torch.float64).view(-1, columns).zero_()
            for number, (c, d) in enumerate(joined.strips):
                strip = joined.get(number)
                for a, b in ranges(len(left), block):
                    made[a:b, c:d].addmm_(left[a:b], strip)
            return _on_base(chunk, made)

        return kernel


def _add_products(made: torch.Tensor, delta: torch.Tensor, basis: Compact, start: int, block: int) -> None:
    """Adds the products of a delta's rows and of rows of the basis from ``start`` on, in blocks of rows."""
    for number, (c, d) in enumerate(basis.strips):
        strip = basis.get(number, start, start + made.shape[1])
        for a, b in ranges(len(delta), block):
            made[a:b].addmm_(delta[a:b, c:d], strip.T)


def _grams(
    group: TensorGroup, weight: Sequence[float], wanted: Sequence[tuple[int, int]], block: int
) -> Iterator[torch.Tensor]:
    """Yields the product of the transposed first delta and of the second for each wanted pair of models.

    As many are summed in one pass as fit. The caller may overwrite a matrix that it got.
    """
    columns = sides(group.shape)[1]
    most = max(_MOST_AT_ONCE // (columns * columns), 1)
    for begin, end in ranges(len(wanted), most):
        pairs = wanted[begin:end]

        def look(chunk: Chunk, pairs: Sequence[tuple[int, int]] = pairs) -> Iterator[torch.Tensor]:
            added = _sum(chunk, weight) if any(_SUM in pair for pair in pairs) else None
            for pair in pairs:
                of = [added if added is not None and m == _SUM else _delta(chunk, m, weight) for m in dict.fromkeys(pair)]
                yield of[0].view(-1, columns)
                yield of[-1].view(-1, columns)

        made = products(group, look, block)
        while made:
            yield made.pop(0)


def _joined_bytes(shape: Shape, matrices: int, more: float = 0.0) -> int:
    """Returns the bytes of a method that joins vectors of several models, and sums ``matrices`` Gram matrices."""
    if not _is_matrix(shape):
        return 0
    columns = sides(shape)[1]
    square = 8 * columns * columns
    at_once = min(max(_MOST_AT_ONCE // (columns * columns), 1), matrices)
    if is_exact(columns):
        # The vectors, and Gram matrices of deltas with ``more`` beside them; or the vectors of both sides and three roots.
        return int(square * max(2 + at_once + more, 5)) + eigen_bytes(columns)
    # The vectors and Gram matrices; the vectors, a root, and a Gram matrix; the vectors of both sides, and two roots.
    vectors, strip = square // 2, 8 * columns * STRIP_COLUMNS
    root = vectors // 2 + strip // 4
    finding = vectors + int(square * (at_once + more)) + eigen_bytes(columns, few=True)
    joining = vectors + root + square + eigen_bytes(columns) + strip
    return max(finding, joining, 2 * (vectors + root) + 5 * strip)


def _tsv_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    return _joined_bytes(shape, models)


def _check_rank(values: Values) -> None:
    if values["rank"] < 0:
        raise RecipeError(f"tsv takes a rank of 0 or more, not {values['rank']}")


@merge_method(
    "tsv",
    base="required",
    row=_row,
    buffers=5,
    compute="float64",
    whole=_tsv_bytes,
    turns=_is_wide,
    check=_check_rank,
)
def tsv(group: TensorGroup, *, weight: PerModel = (1.0,), rank: int = 0, lambda_: float = 1.0) -> Kernel:
    r"""Joins the first singular vectors of each model's delta, and makes those of all models orthogonal to each other.

    .. math:: y = b + \lambda\, U_\perp S V_\perp^\top, \qquad w_m (x_m - b) \approx U_m S_m V_m^\top, \qquad
              U = [U_0 \ldots U_{N-1}], \quad V = [V_0 \ldots V_{N-1}]

    :math:`U_\perp` is the polar factor of U, and :math:`V_\perp` that of V. Each model has the ``rank`` first singular
    vectors; 0, and more than that, means the number of singular values divided by that of the models. Gargiulo et al.,
    *Task Singular Vectors: Reducing Task Interference in Model Merging*, 2025 (arXiv:2412.00081): TSV-M, as its authors'
    code computes it. ``weight`` per model; ``lambda`` is the paper's alpha. One model or more.

    The first axis by all others is the matrix. Vectors and numbers are the mean of the weighted deltas, times lambda, as
    in the paper. All is computed in float64. Each model is read three times; the base more often if the shorter side is
    so long that the Gram matrices do not fit together: with 8192, twice and once more for each model. Beyond 2048 vectors
    are held in 32 bits, with an error of about 1e-9 of their length.

    Edge cases: singular values of at most a millionth of the model's largest count as zero. Directions that models have in
    common get the polar factors of lower rank; the authors' code fills these up with arbitrary vectors. Which vectors stand
    for equal singular values is the solver's choice, and the same in each run. Deviations: layers with text_projection in
    their name are no exception; a matrix with fewer singular values than there are models is the mean of the weighted
    deltas, times lambda, where the authors' code leaves the base and loses what the models have learned.
    """
    if not _is_matrix(group.shape):
        return _mean(weight, lambda_)
    rows, columns = sides(group.shape)
    each, block = min(rows, columns) // group.models, block_rows(rows, columns)
    if not each:
        return _mean(weight, lambda_)
    count = min(rank or each, each)
    vectors = _Vectors(count * group.models, columns)
    for model, gram in enumerate(_grams(group, weight, [(m, m) for m in range(group.models)], block)):
        if not is_finite(gram):
            return _all_nan
        values, basis = eigen(gram, count)
        vectors.add(model, values[:count], basis[:count])
        del gram, basis  # before the next one is made
    return vectors.merged(group, weight, vectors.sigma * lambda_, block)


def _take_off(matrix: torch.Tensor, basis: Compact, start: int, stop: int) -> None:
    """Projects the columns of a matrix onto what is orthogonal to rows ``start`` to ``stop`` of a basis, in place."""
    along = basis.product(matrix, start, stop)
    for number, (a, b) in enumerate(basis.strips):
        matrix[a:b].addmm_(basis.get(number, start, stop).T, along, alpha=-1)


def _iso_cts_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    return _joined_bytes(shape, models + 1) if turned else _joined_bytes(shape, 2 * models + 1, 2.25)


def _check_fraction(values: Values) -> None:
    if not 0 <= values["common_space_fraction"] <= 1:
        raise RecipeError(f"common_space_fraction goes from 0 to 1, not {values['common_space_fraction']:g}")


@merge_method(
    "iso_cts",
    base="required",
    row=_row,
    buffers=5,
    compute="float64",
    whole=_iso_cts_bytes,
    turns=_is_wide,
    check=_check_fraction,
)
def iso_cts(
    group: TensorGroup, *, weight: PerModel = (1.0,), common_space_fraction: float = 0.8, lambda_: float = 1.0
) -> Kernel:
    r"""Iso-C that replaces the last singular vectors of the sum by those of each model outside the first ones.

    .. math:: y = b + \lambda\, \bar\sigma\, U_\perp V_\perp^\top, \qquad U = [U_0 \ldots U_{N-1}\, U_c], \quad
              V = [V_0 \ldots V_{N-1}\, V_c], \qquad (I - U_c U_c^\top)\, w_m (x_m - b) \approx U_m S_m V_m^\top

    :math:`U_c S_c V_c^\top` has the first singular vectors of the sum of the weighted deltas: the share
    ``common_space_fraction`` of all. The rest is divided equally among the models; the common share takes what rounding
    leaves. :math:`U_\perp` is the polar factor of U, :math:`V_\perp` that of V, and :math:`\bar\sigma` the mean of all
    :math:`S_c, S_m`. Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces*, 2025 (arXiv:2502.04959), as its authors' code computes it. One model or more.

    The first axis by all others is the matrix. Vectors and numbers are the mean of the weighted deltas, times lambda, as
    in the paper. All is computed in float64. Each model is read three times, and more often if the shorter side is so
    long that the Gram matrices do not fit together. A shorter side that is the first axis needs less memory.

    Edge cases: a singular value of the sum counts as zero if it is at most a millionth of the largest, one of a model if
    it is at most a millionth of the norm of the model's delta. The rest is as in ``tsv``.
    """
    import torch

    if not _is_matrix(group.shape):
        return _mean(weight, lambda_)
    rows, columns = sides(group.shape)
    block, number = block_rows(rows, columns), min(rows, columns)
    each = round((number - int(number * common_space_fraction)) / group.models)
    each = min(each, number // group.models)
    common = number - each * group.models
    vectors, models = _Vectors(number, columns), range(group.models if each else 0)
    crossed = not group.turned  # the common left singular vectors are those of the long side
    wanted = [(_SUM, _SUM), *(pair for m in models for pair in ([(m, m), (_SUM, m)] if crossed else [(m, m)]))]
    grams = _grams(group, weight, wanted, block)
    first = next(grams)
    if not is_finite(first):
        return _all_nan
    values, basis = eigen(first)
    start, stop = vectors.add(_SUM, values[:common], basis[:common])
    shared, inverse = vectors.basis, vectors.inverse[start:stop].unsqueeze(1)
    del first, basis
    for model in models:
        gram = next(grams)
        if not is_finite(gram):
            return _all_nan
        norm = math.sqrt(float(gram.diagonal().sum()))
        if crossed:
            # the common left vectors, transposed, times the delta
            along = shared.product(next(grams), start, stop).mul_(inverse)
            gram.addmm_(along.T, along, alpha=-1)
        else:
            for matrix in (gram, gram.T):
                for a, b in ranges(columns, _PROJECTED):
                    _take_off(matrix[:, a:b], shared, start, stop)
        values, basis = eigen(gram, each)
        begin, end = vectors.add(model, values[:each], basis[:each], largest=norm)
        if crossed:
            part = torch.zeros(stop - start, end - begin, dtype=torch.float64)
            _add_products(part, along, shared, begin, len(along))
            vectors.shared[model] = part.mul_(vectors.inverse[begin:end])
        del gram, basis
    sigma = vectors.sigma.mean().mul_(lambda_).expand(number)
    return vectors.merged(group, weight, sigma, block)


def _is_dual(shape: Shape, values: Values) -> bool:
    """Whether the other sides of all deltas together are shorter than the side that they share."""
    shared, other = shape[0], math.prod(shape[1:])
    if not values["concat_across_output"]:
        shared, other = other, shared
    return other * len(values["weight"]) < shared


def _turns_for_knots(shape: Shape, values: Values) -> bool:
    """Whether rows are to go along the second side, which is so if the Gram matrix is that of the first."""
    return _is_matrix(shape) and bool(values["concat_across_output"]) is not _is_dual(shape, values)


def _knots_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not _is_matrix(shape):
        return 0
    rows, columns = sides(shape)
    size = columns if turned is bool(values["concat_across_output"]) else columns * models
    block = 8 * block_rows(rows, columns)
    if size == columns:
        return 8 * size * size + eigen_bytes(size) + 2 * columns * block
    return 8 * 4 * size * size + eigen_bytes(size) + 3 * size * block + (10 + models) * 8 * GRAIN


def _check_knots(values: Values) -> None:
    check_density(values)
    if values["consensus"] not in ("ties", "linear"):
        raise RecipeError(f"the consensus of knots is ties or linear, not {printable(values['consensus'])}")


@merge_method(
    "knots",
    base="required",
    row=_row,
    buffers=11,
    buffers_per_model=1,
    searches=1,
    compute="float64",
    whole=_knots_bytes,
    turns=_turns_for_knots,
    check=_check_knots,
)
def knots(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    consensus: str = "ties",
    normalize: bool = True,
    concat_across_output: bool = True,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Aligns the deltas by a singular value decomposition of all of them side by side, then merges them by TIES.

    .. math:: y = b + \lambda\, U\, \operatorname{merge}(S V_0^\top, \ldots, S V_{N-1}^\top), \qquad
              [\delta_0 \ldots \delta_{N-1}] = U S\, [V_0^\top \ldots V_{N-1}^\top], \quad \delta_m = x_m - b

    Stoica et al., *Model merging with SVD to tie the KnOTS*, 2024 (arXiv:2410.19735), as its authors' code computes it.
    *merge* is that of ``ties`` with its ``weight``, ``density`` (the authors' topK, as a share) and ``normalize``, or with
    ``consensus`` linear the weighted mean. Without ``concat_across_output`` the deltas lie one below the other and V is
    shared, as if all were transposed. One model or more.

    The first axis by all others is the matrix; of vectors and numbers the deltas are merged as they are. A Gram matrix is
    held of the shared side, which is the first axis, or all others without ``concat_across_output``; or of the other
    sides of all deltas together if they are shorter. All is computed in float64, in two passes, or three with a density
    below 1.

    Edge cases: singular values of at most a millionth of the largest count as zero. Which vectors stand for equal
    singular values is the solver's choice, and the same in each run. Deviations from the authors' code: elements are
    selected in each tensor, not in all together; weights that agree are divided by, not their number; a zero sum elects
    plus.
    """
    if not _is_matrix(group.shape):
        return _consensus(group, _Aligned(None, 1, 1, group.elems), weight, density, consensus, normalize, lambda_)
    rows, columns = sides(group.shape)
    block = block_rows(rows, columns)
    if group.turned is not concat_across_output:
        return _side_by_side(group, weight, density, consensus, normalize, lambda_)

    def twice(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        deltas = [chunk.delta(m, f"delta {m}", torch.float64).view(-1, columns) for m in range(group.models)]
        for start, stop in ranges(chunk.elems // columns, block):
            for delta in deltas:
                yield delta[start:stop]
                yield delta[start:stop]

    (gram,) = products(group, twice, block, 1)
    if not is_finite(gram):
        return _all_nan
    values, basis = eigen(gram)
    kept = singular(values)[0] > 0
    basis.mul_(kept.unsqueeze(1))
    aligned = _Aligned(basis, columns, block, rows * int(kept.sum()))
    return _consensus(group, aligned, weight, density, consensus, normalize, lambda_)


def _side_by_side(
    group: TensorGroup,
    weight: Sequence[float],
    density: Sequence[float],
    consensus: str,
    normalize: bool,
    scale: float,
) -> Kernel:
    """Returns the kernel of ``knots`` from the Gram matrix of all columns of all deltas. The aligned deltas are small then,
    and are merged in memory."""
    import torch

    rows, columns = sides(group.shape)
    block = block_rows(rows, columns)

    def beside(chunk: Chunk) -> Iterator[torch.Tensor]:
        deltas = [chunk.delta(m, f"delta {m}", torch.float64).view(-1, columns) for m in range(group.models)]
        for start, stop in ranges(chunk.elems // columns, block):
            yield torch.cat([delta[start:stop] for delta in deltas], 1)

    (gram,) = products(group, lambda chunk: (part for part in beside(chunk) for _ in range(2)), block, 1)
    if not is_finite(gram):
        return _all_nan
    values, basis = eigen(gram)
    sigma, inverse = singular(values)
    count = int((sigma > 0).sum())
    basis = basis[:count]
    aligned = [(basis[:, start:stop] * sigma[:count].unsqueeze(1)).view(-1) for start, stop in ranges(len(sigma), columns)]
    if count:
        small = TensorGroup.of(*aligned, base=torch.zeros_like(aligned[0]))
        known = _Aligned(None, 1, 1, small.elems)
        mixed = small.merged(_consensus(small, known, weight, density, consensus, normalize, scale)).view(count, columns)
        back = basis.T @ mixed.mul_(inverse[:count].unsqueeze(1))
    else:
        back = torch.zeros(len(sigma), columns, dtype=torch.float64)

    def kernel(chunk: Chunk) -> torch.Tensor:
        made = chunk.empty("plain", torch.float64).view(-1, columns)
        for (start, stop), part in zip(ranges(len(made), block), beside(chunk), strict=True):
            torch.mm(part, back, out=made[start:stop])
        return _on_base(chunk, made)

    return kernel


@dataclass(frozen=True, slots=True)
class _Aligned:
    """Deltas in the coordinates of a basis, whose vectors are the rows; as they are without a basis. ``elems``: how many
    coordinates a delta has that are not left out."""

    basis: torch.Tensor | None
    columns: int
    block: int
    elems: int

    def delta(self, chunk: Chunk, model: int, slot: Slot) -> torch.Tensor:
        """Returns the aligned delta of a chunk, in the compute dtype."""
        import torch

        if self.basis is None:
            return chunk.delta(model, slot)
        delta = chunk.delta(model, "plain", torch.float64).view(-1, self.columns)
        made = chunk.empty(slot).view(-1, self.columns)
        for start, stop in ranges(len(delta), self.block):
            made[start:stop] = delta[start:stop] @ self.basis.T
        return made.view(-1)

    def plain(self, chunk: Chunk, mixed: torch.Tensor) -> torch.Tensor:
        """Returns an aligned delta as it is without the basis, in float64."""
        import torch

        made = chunk.empty("plain", torch.float64).copy_(mixed)
        if self.basis is not None:
            matrix = made.view(-1, self.columns)
            for start, stop in ranges(len(matrix), self.block):
                matrix[start:stop] = matrix[start:stop] @ self.basis
        return made


def _consensus(
    group: TensorGroup,
    aligned: _Aligned,
    weight: Sequence[float],
    density: Sequence[float],
    consensus: str,
    normalize: bool,
    scale: float,
) -> Kernel:
    """Returns the kernel that merges aligned deltas as ``ties`` or ``task_arithmetic`` do."""
    n, total = aligned.elems, sum(weight)
    ranks = [[group.elems if d >= 1 else max(int(d * n), 1) if d else 0] for d in density]

    def magnitudes(chunk: Chunk) -> Iterator[torch.Tensor]:
        return (aligned.delta(chunk, model, OPERAND).abs_() for model in range(group.models))

    cuts = group.kth_largest(magnitudes, ranks) if any(d < 1 for d in density) else None

    def kernel(chunk: Chunk) -> torch.Tensor:
        deltas = []
        for model, w in enumerate(weight):
            delta = aligned.delta(chunk, model, f"delta {model}")
            deltas.append(scaled(cuts[model][0].keep(delta, chunk.start) if cuts else delta, w))
        if consensus == "ties":
            mixed = winners(chunk, deltas, weight, normalize)
        else:
            mixed = deltas[0]
            for delta in deltas[1:]:
                mixed.add_(delta)
            if normalize and abs(total) >= 1e-8:
                mixed.div_(total)
        return _on_base(chunk, aligned.plain(chunk, mixed).mul_(scale))

    return kernel
