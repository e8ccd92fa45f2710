r"""Merges by singular values: Iso-C, Iso-CTS, TSV-M.

A tensor of two axes or more is a matrix here, its first axis by all others together (a convolution is out by in * height *
width). A is a delta, or a sum of deltas, with its longer side as rows. Its Gram matrix :math:`G = A^\top A = V S^2
V^\top` is summed in one pass, in float64. The left singular vectors are :math:`U = A V S^{-1}`, so every result is
made of rows of A times small matrices. An engine that reads rows gets a wide matrix turned (``turns``). A complex tensor
has its real and imaginary parts as one more axis, and is not turned.

*Tiny* singular values, at most a millionth of the largest, count as zero, and their vectors are left out everywhere. So a
matrix of lower rank has the polar factor :math:`U V^\top` of its row space: a continuous function of the matrix as long as
its rank stays, also where singular values are equal. ``tsv``, ``iso_cts`` and ``knots`` choose single vectors. Where
singular values are equal, these are those of the solver, and the same in each run.

What a later pass needs is spilled instead of computed again: Gram matrices that do not fit beside each other, and the left
singular vectors. So no method reads a delta more than three times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.chunk import OPERAND, Chunk, Kernel, Slot
from streammerge.kernels.compact import STRIP_COLUMNS, Compact
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.spectral import (
    block_rows,
    eigen,
    eigen_bytes,
    few_vectors,
    gram_and_product,
    grams,
    inverse_root,
    is_exact,
    is_finite,
    products,
    sides,
    singular,
)
from streammerge.kernels.spill import Half, Spill, SpilledRows, half_bytes, square_of
from streammerge.methods.contracts import PerModel, Values, merge_method
from streammerge.methods.linear import scaled
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
_MOST_AT_ONCE = 1 << 24
"""Most numbers of halves of Gram matrices that one pass sums, if these are more than :data:`_LEAST_AT_ONCE`. The base is
read again for the next ones."""
_LEAST_AT_ONCE = 3
_SUM = -1
"""Stands for the sum of the deltas, among the numbers of models."""
_PROJECTED = 512
"""Columns of a Gram matrix that are projected at once."""
_STEP_ROWS = 256
"""Spilled rows that are computed at once."""


def is_matrix(shape: Shape) -> bool:
    return len(shape) > 1 and 0 not in shape


def _is_wide(shape: Shape, values: Values) -> bool:
    return is_matrix(shape) and math.prod(shape[1:]) > shape[0]


def row_elems(shape: Shape, values: Values) -> int:
    if not is_matrix(shape):
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


def on_base(chunk: Chunk, change: torch.Tensor) -> torch.Tensor:
    import torch

    return change.view(-1).add_(chunk.base_as(torch.float64))


def _mean(weight: Sequence[float], scale: float) -> Kernel:
    return lambda chunk: on_base(chunk, _sum(chunk, weight).mul_(scale / len(weight)))


def all_nan(chunk: Chunk) -> torch.Tensor:
    """The result where a delta has NaN or infinity, which reaches every number."""
    import torch

    return chunk.empty("sum", torch.float64).fill_(torch.nan)


def _iso_c_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not is_matrix(shape):
        return 0
    rows, columns = sides(shape)
    return 8 * columns * columns + eigen_bytes(columns) + 16 * columns * block_rows(rows, columns)


@merge_method("iso_c", base="required", row=row_elems, buffers=4, compute="float64", whole=_iso_c_bytes, turns=_is_wide)
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

    if not is_matrix(group.shape):
        return _mean(weight, lambda_)
    rows, columns = sides(group.shape)
    block = block_rows(rows, columns)

    def twice(chunk: Chunk) -> Iterator[torch.Tensor]:
        yield (added := _sum(chunk, weight).view(-1, columns))
        yield added

    (gram,) = products(group, twice, block)
    if not is_finite(gram):
        return all_nan
    values, basis = eigen(gram)
    sigma, inverse = singular(values)
    factors = inverse.mul_(lambda_ * float(sigma.sum()) / min(rows, columns))

    def kernel(chunk: Chunk) -> torch.Tensor:
        added = _sum(chunk, weight).view(-1, columns)
        for start, stop in ranges(len(added), block):
            part = added[start:stop]
            torch.mm((part @ basis.T).mul_(factors), basis, out=part)
        return on_base(chunk, added)

    return kernel


class _Vectors:
    """Right singular vectors of some of the deltas, or of their sum, as rows of ``basis``; one range of rows for each.

    ``inverse`` has the inverses of their singular values, and zero for those that are left out.
    """

    def __init__(self, count: int, columns: int) -> None:
        import torch

        self.basis = Compact(count, columns, is_exact(columns))
        self.sigma, self.inverse = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        self.places: dict[int, tuple[int, int]] = {}
        self._next = 0

    def add(self, model: int, values: torch.Tensor, basis: torch.Tensor, largest: float | None = None) -> tuple[int, int]:
        """Adds vectors of a model. ``largest``: see :func:`singular`. Returns the range of their rows."""
        start, stop = self._next, self._next + len(basis)
        self.sigma[start:stop], self.inverse[start:stop] = singular(values, largest)
        self.basis.put_rows(basis.mul_((self.inverse[start:stop] > 0).unsqueeze(1)), start)
        self.places[model] = start, stop
        self._next = stop
        return start, stop

    def project(self, made: torch.Tensor, model: int, delta: torch.Tensor, block: int) -> None:
        """Puts the left singular vectors of a model into their columns of ``made``, for some rows of its delta."""
        if model not in self.places:
            return
        start, stop = self.places[model]
        part = made[:, start:stop].zero_()
        for number, (c, d) in enumerate(self.basis.strips):
            strip = self.basis.get(number, start, stop)
            for a, b in ranges(len(delta), block):
                part[a:b].addmm_(delta[a:b, c:d], strip.T)
        part.mul_(self.inverse[start:stop])

    def spilled(self, group: TensorGroup, weight: Sequence[float], left: SpilledRows, block: int) -> torch.Tensor:
        """Spills the left singular vectors: one vector in each column. Returns their Gram matrix."""
        columns = self.basis.shape[1]

        def twice(chunk: Chunk) -> Iterator[torch.Tensor]:
            made = _rows_of(chunk, left, columns)
            for model, delta in _deltas(chunk, weight, self.places):
                self.project(made, model, delta.view(-1, columns), block)
            left.put(chunk.start // columns, made)
            yield made
            yield made

        return products(group, twice, block)[0]

    def merged(self, factors: torch.Tensor, left: SpilledRows, block: int, summed: Callable[[], torch.Tensor]) -> Kernel:
        """Returns the kernel of the orthogonalised left vectors, times the factors, times the orthogonalised right ones.

        ``summed`` spills the left vectors, and returns their Gram matrix.
        """
        import torch

        count, columns = self.basis.shape
        gram = summed()
        if not is_finite(gram):
            return all_nan
        left_root = inverse_root(gram)
        del gram
        right_root, joined = inverse_root(self.basis.gram_rows()), Compact(count, columns, self.basis.exact)
        for number in range(len(joined.strips)):
            right = right_root.times(self.basis.get(number)).mul_(factors.unsqueeze(1))
            joined.put(number, left_root.times(right))
        del left_root, right_root

        def kernel(chunk: Chunk) -> torch.Tensor:
            vectors = left.get(chunk.start // columns, _rows_of(chunk, left, columns))[:, :count]
            made = chunk.empty("sum", torch.float64).view(-1, columns).zero_()
            for number, (c, d) in enumerate(joined.strips):
                strip = joined.get(number)
                for a, b in ranges(len(vectors), block):
                    made[a:b, c:d].addmm_(vectors[a:b], strip)
            return on_base(chunk, made)

        return kernel


def _rows_of(chunk: Chunk, left: SpilledRows, columns: int) -> torch.Tensor:
    """Returns a buffer for the spilled rows that belong to the rows of a chunk."""
    import torch

    rows = chunk.elems // columns
    return chunk.empty("left", torch.float64)[: rows * left.columns].view(rows, left.columns)


def _deltas(chunk: Chunk, weight: Sequence[float], wanted: Container[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the wanted deltas of a chunk by the numbers of their models, and last their sum. Each model is read once."""
    import torch

    total = chunk.empty("sum", torch.float64) if _SUM in wanted else None
    for model in range(len(weight)):
        if total is None and model not in wanted:
            continue
        delta = _delta(chunk, model, weight)
        if total is not None:
            total.add_(delta) if model else total.copy_(delta)
        if model in wanted:
            yield model, delta
    if total is not None:
        yield _SUM, total


def _at_once(columns: int) -> int:
    """Returns how many halves of Gram matrices are summed in one pass."""
    return max(_MOST_AT_ONCE // (half_bytes(columns) // 8), _LEAST_AT_ONCE)


def _are_held(columns: int, count: int) -> bool:
    """Whether so many halves stay in memory while the matrices are decomposed one after the other."""
    return count == 1 or (is_exact(columns) and count <= _at_once(columns))


class _Grams:
    """The Gram matrices of the wanted deltas, :data:`_SUM` for that of their sum. ``finite``: whether all are."""

    def __init__(
        self, group: TensorGroup, weight: Sequence[float], wanted: Sequence[int], block: int, spill: Spill
    ) -> None:
        self._columns, self._wanted, self._spill = sides(group.shape)[1], wanted, spill
        self._held: dict[int, Half] = {}
        self._size = half_bytes(self._columns)
        self.finite, held = True, _are_held(self._columns, len(wanted))
        for begin, end in ranges(len(wanted), _at_once(self._columns)):
            batch = wanted[begin:end]
            made = grams(group, self._twice(weight, batch), block)
            for model in sorted(batch, key=lambda model: (model == _SUM, model)):
                half = made.pop(0)
                self.finite = self.finite and is_finite(half)
                if held:
                    self._held[model] = half
                else:
                    half.save(spill, wanted.index(model) * self._size)
                del half

    def _twice(self, weight: Sequence[float], batch: Sequence[int]) -> Callable[[Chunk], Iterator[torch.Tensor]]:
        def look(chunk: Chunk) -> Iterator[torch.Tensor]:
            for _, delta in _deltas(chunk, weight, batch):
                yield delta.view(-1, self._columns)
                yield delta.view(-1, self._columns)

        return look

    def take(self, model: int) -> torch.Tensor:
        """Returns the whole matrix of a model, once."""
        if model in self._held:
            return self._held.pop(model).square()
        return square_of(self._spill, self._wanted.index(model) * self._size, self._columns)


def _grams_spill(columns: int, count: int) -> int:
    return 0 if _are_held(columns, count) else count * half_bytes(columns)


def _joined_bytes(columns: int, matrices: int, along: int = 0, shared: int = 0) -> int:
    """Returns the bytes of a method that joins vectors of several models, and sums ``matrices`` Gram matrices.

    ``along``: bytes of a product that is summed beside a Gram matrix. ``shared``: bytes of one that is held while the left
    vectors are made.
    """
    square, half = 8 * columns * columns, half_bytes(columns)
    summing = min(_at_once(columns), matrices) * half
    steps = 2 * 8 * columns * max(_STEP_ROWS, block_rows(columns, columns)) if along or shared else 0
    if is_exact(columns):
        # The vectors, and Gram matrices or products beside them; or the vectors of both sides and three roots.
        return max(2 * square + max(summing, along + half, shared + steps), 5 * square) + eigen_bytes(columns)
    # The vectors and a Gram matrix; the vectors, a root, and a Gram matrix; the vectors of both sides, and two roots.
    vectors, strip = square // 2, 8 * columns * STRIP_COLUMNS
    root = vectors // 2 + strip // 4 + 8 * columns * few_vectors(columns)
    finding = vectors + max(square + eigen_bytes(columns, few=True), along + half + strip)
    leading = vectors + shared + square + steps + strip
    joining = vectors + root + square + eigen_bytes(columns) + strip + 8 * columns * few_vectors(columns)
    return max(summing + strip, finding, leading, joining, 2 * (vectors + root) + 5 * strip)


def _tsv_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    return _joined_bytes(sides(shape)[1], models) if is_matrix(shape) else 0


def _tsv_count(shape: Shape, models: int, rank: int) -> int:
    """Returns how many vectors each model has."""
    each = min(sides(shape)) // models
    return min(rank or each, each)


def _tsv_spills(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not is_matrix(shape):
        return 0
    rows, columns = sides(shape)
    count = models * _tsv_count(shape, models, values["rank"])
    return max(8 * rows * count, _grams_spill(columns, models))


def _check_rank(values: Values) -> None:
    if values["rank"] < 0:
        raise RecipeError(f"tsv takes a rank of 0 or more, not {values['rank']}")


@merge_method(
    "tsv",
    base="required",
    row=row_elems,
    buffers=5,
    compute="float64",
    whole=_tsv_bytes,
    spills=_tsv_spills,
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
    in the paper. All is computed in float64. Each model is read twice; the base once to three times more, or with three
    models and more than 2048 numbers along the shorter side once more for each three models. The left singular vectors go
    into a temporary file of 8 bytes for each number. Beyond 2048 vectors are held in 32 bits, with an error of about 1e-9
    of their length.

    Edge cases: singular values of at most a millionth of the model's largest count as zero. Directions that models have in
    common get the polar factors of lower rank; the authors' code fills these up with arbitrary vectors. Which vectors stand
    for equal singular values is the solver's choice, and the same in each run. Deviations: layers with text_projection in
    their name are no exception; a matrix with fewer singular values than there are models is the mean of the weighted
    deltas, times lambda, where the authors' code leaves the base and loses what the models have learned.
    """
    if not is_matrix(group.shape):
        return _mean(weight, lambda_)
    rows, columns = sides(group.shape)
    count, block = _tsv_count(group.shape, group.models, rank), block_rows(rows, columns)
    if not count:
        return _mean(weight, lambda_)
    spill = group.spill(_tsv_spills(group.shape, group.models, {"rank": rank}, group.turned))
    sums = _Grams(group, weight, range(group.models), block, spill)
    if not sums.finite:
        return all_nan
    vectors = _Vectors(count * group.models, columns)
    for model in range(group.models):
        values, basis = eigen(sums.take(model), count)
        vectors.add(model, values[:count], basis[:count])
        del basis  # before the next one is made
    left = SpilledRows(spill, count * group.models)
    return vectors.merged(vectors.sigma * lambda_, left, block, lambda: vectors.spilled(group, weight, left, block))


def _take_off(matrix: torch.Tensor, basis: Compact, start: int, stop: int) -> None:
    """Projects the columns of a matrix onto what is orthogonal to rows ``start`` to ``stop`` of a basis, in place."""
    along = basis.product(matrix, start, stop)
    for number, (a, b) in enumerate(basis.strips):
        matrix[a:b].addmm_(basis.get(number, start, stop).T, along, alpha=-1)


def _shares(shape: Shape, models: int, fraction: float) -> tuple[int, int]:
    """Returns how many vectors the sum has, and each model."""
    number = min(sides(shape))
    each = min(round((number - int(number * fraction)) / models), number // models)
    return number - each * models, each


def _iso_cts_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not is_matrix(shape):
        return 0
    columns = sides(shape)[1]
    if turned:
        return _joined_bytes(columns, models + 1)
    common, each = _shares(shape, models, values["common_space_fraction"])
    return _joined_bytes(columns, 1, 8 * common * columns if each else 0, 8 * common * each * models)


def _iso_cts_spills(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not is_matrix(shape):
        return 0
    rows, columns = sides(shape)
    return max(8 * rows * min(rows, columns), _grams_spill(columns, models + 1)) if turned else 8 * rows * columns


def _check_fraction(values: Values) -> None:
    if not 0 <= values["common_space_fraction"] <= 1:
        raise RecipeError(f"common_space_fraction goes from 0 to 1, not {values['common_space_fraction']:g}")


@merge_method(
    "iso_cts",
    base="required",
    row=row_elems,
    buffers=5,
    compute="float64",
    whole=_iso_cts_bytes,
    spills=_iso_cts_spills,
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
    in the paper. All is computed in float64. Each model is read three times. With a first axis that is the longer one, and
    with more than 2048 numbers along the shorter side, the base is read more often. The left singular vectors go into a
    temporary file of 8 bytes for each number.

    Edge cases: a singular value of the sum counts as zero if it is at most a millionth of the largest, one of a model if
    it is at most a millionth of the norm of the model's delta. The rest is as in ``tsv``.
    """
    if not is_matrix(group.shape):
        return _mean(weight, lambda_)
    common, each = _shares(group.shape, group.models, common_space_fraction)
    made = _Subspaces(group, weight, common, each)
    vectors = made.of_rows() if group.turned else made.of_columns()
    if vectors is None:
        return all_nan
    sigma = vectors.sigma.mean().mul_(lambda_).expand(len(vectors.sigma))
    return vectors.merged(sigma, made.left, made.block, made.spilled)


class _Subspaces:
    """The common and the task-specific vectors of ``iso_cts``, of which the sum has ``common`` and each model ``each``.

    ``left``: the left singular vectors, after :meth:`spilled`.
    """

    def __init__(self, group: TensorGroup, weight: Sequence[float], common: int, each: int) -> None:
        rows, columns = sides(group.shape)
        values = {"common_space_fraction": 0.0}
        self._group, self._weight, self._common, self._each = group, weight, common, each
        self._models = range(group.models if each else 0)
        self._rows, self._columns, self._number = rows, columns, min(rows, columns)
        self.block = block_rows(rows, columns)
        self._spill = group.spill(_iso_cts_spills(group.shape, group.models, values, group.turned))
        self.left = SpilledRows(self._spill, self._number if group.turned else columns)
        self._vectors = _Vectors(0, columns)

    def spilled(self) -> torch.Tensor:
        """Spills the left singular vectors. Returns their Gram matrix."""
        if self._group.turned:
            return self._vectors.spilled(self._group, self._weight, self.left, self.block)
        return self._spilled_outside()

    def of_rows(self) -> _Vectors | None:
        """Returns the vectors where the common subspace, outside which those of the models lie, is that of the shorter
        side. None if a delta is not finite."""
        sums = _Grams(self._group, self._weight, [_SUM, *self._models], self.block, self._spill)
        if not sums.finite:
            return None
        vectors, columns = self._begun(), self._columns
        values, basis = eigen(sums.take(_SUM))
        start, stop = vectors.add(_SUM, values[: self._common], basis[: self._common])
        del basis
        for model in self._models:
            gram = sums.take(model)
            norm = math.sqrt(float(gram.diagonal().sum()))
            for matrix in (gram, gram.T):
                for a, b in ranges(columns, _PROJECTED):
                    _take_off(matrix[:, a:b], vectors.basis, start, stop)
            del matrix  # a view, which would hold the memory beside the next one's
            self._add(model, gram, norm)
            del gram
        return vectors

    def _begun(self) -> _Vectors:
        """Takes the memory of the vectors, which there is no room for while sums are made."""
        self._vectors = _Vectors(self._number, self._columns)
        return self._vectors

    def _add(self, model: int, gram: torch.Tensor, norm: float) -> None:
        values, basis = eigen(gram, self._each)
        self._vectors.add(model, values[: self._each], basis[: self._each], largest=norm)

    def of_columns(self) -> _Vectors | None:
        """Returns the vectors where the common subspace, outside which those of the models lie, is that of the longer side.

        Its vectors are the spilled sum times small matrices. A model's part in it is their product with the delta, whose
        Gram matrix is taken off that of the delta.
        """
        group, columns = self._group, self._columns

        def summed(chunk: Chunk) -> Iterator[torch.Tensor]:
            total = _sum(chunk, self._weight).view(-1, columns)
            self.left.put(chunk.start // columns, total)
            yield total
            yield total

        (gram,) = products(group, summed, self.block)
        if not is_finite(gram):
            return None
        vectors = self._begun()
        values, basis = eigen(gram)
        vectors.add(_SUM, values[: self._common], basis[: self._common])
        del gram, basis
        for start, part in self._steps():
            made = part.new_zeros(part.shape)
            vectors.project(made, _SUM, part, self.block)
            self.left.put(start, made)
        for model in self._models:
            half, along = gram_and_product(group, self._beside(model), self.block)
            if not is_finite(half):
                return None
            norm = math.sqrt(float(half.diagonal().sum()))
            half.add_gram(along, -1.0)
            del along
            self._add(model, half.square(), norm)
            del half
        return vectors

    def _beside(self, model: int) -> Callable[[Chunk], Iterator[torch.Tensor]]:
        def look(chunk: Chunk) -> Iterator[torch.Tensor]:
            delta = _delta(chunk, model, self._weight).view(-1, self._columns)
            yield delta
            yield delta
            rows = _rows_of(chunk, self.left, self._columns)
            yield self.left.get(chunk.start // self._columns, rows)[:, : self._common]
            yield delta

        return look

    def _spilled_outside(self) -> torch.Tensor:
        """Spills the left singular vectors of the models beside the common ones, outside of which they lie."""
        vectors, columns, common, number = self._vectors, self._columns, self._common, self._number

        def beside(chunk: Chunk) -> Iterator[torch.Tensor]:
            rows = self.left.get(chunk.start // columns, _rows_of(chunk, self.left, columns))
            for model, delta in _deltas(chunk, self._weight, self._models):
                vectors.project(rows, model, delta.view(-1, columns), self.block)
            self.left.put(chunk.start // columns, rows)
            yield rows[:, :common]
            yield rows[:, common:number]

        half = Half(number)
        shared = products(self._group, beside, self.block)[0] if self._models else None
        for start, part in self._steps():
            if shared is not None:
                part[:, common:number].addmm_(part[:, :common], shared, alpha=-1)
                self.left.put(start, part)
            half.add_gram(part[:, :number])
        del shared
        return half.square()

    def _steps(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the spilled rows, and the number of the first. They may be changed."""
        import torch

        step = max(_STEP_ROWS // self.block, 1) * self.block
        buffer = torch.empty(step, self._columns, dtype=torch.float64)
        for start, stop in ranges(self._rows, step):
            yield start, self.left.get(start, buffer[: stop - start])
