r"""KnOTS: deltas aligned by a singular value decomposition of all of them side by side, then merged by TIES."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import OPERAND, Chunk, Kernel, Slot
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.spectral import block_rows, eigen, eigen_bytes, is_finite, products, sides, singular
from streammerge.methods.contracts import PerModel, Values, merge_method
from streammerge.methods.linear import scaled
from streammerge.methods.sparsify import check_density
from streammerge.methods.spectral import Shape, all_nan, is_matrix, on_base, row_elems
from streammerge.methods.task_arithmetic import winners
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch


def _is_dual(shape: Shape, values: Values) -> bool:
    """Whether the other sides of all deltas together are shorter than the side that they share."""
    shared, other = shape[0], math.prod(shape[1:])
    if not values["concat_across_output"]:
        shared, other = other, shared
    return other * len(values["weight"]) < shared


def _turns_for_knots(shape: Shape, values: Values) -> bool:
    """Whether rows are to go along the second side, which is so if the Gram matrix is that of the first."""
    return is_matrix(shape) and bool(values["concat_across_output"]) is not _is_dual(shape, values)


def _knots_bytes(shape: Shape, models: int, values: Values, turned: bool) -> int:
    if not is_matrix(shape):
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
    row=row_elems,
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
    asked = _Merging(weight, density, consensus, normalize, lambda_)
    if not is_matrix(group.shape):
        return _consensus(group, _Aligned(None, 1, 1, group.elems), asked)
    rows, columns = sides(group.shape)
    block = block_rows(rows, columns)
    if group.turned is not concat_across_output:
        return _side_by_side(group, asked)

    def twice(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        deltas = [chunk.delta(m, f"delta {m}", torch.float64).view(-1, columns) for m in range(group.models)]
        for start, stop in ranges(chunk.elems // columns, block):
            for delta in deltas:
                yield delta[start:stop]
                yield delta[start:stop]

    (gram,) = products(group, twice, block, 1)
    if not is_finite(gram):
        return all_nan
    values, basis = eigen(gram)
    kept = singular(values)[0] > 0
    basis.mul_(kept.unsqueeze(1))
    aligned = _Aligned(basis, columns, block, rows * int(kept.sum()))
    return _consensus(group, aligned, asked)


class _Merging(NamedTuple):
    """How aligned deltas are merged: the parameters of :func:`knots` of these names, and its lambda as ``scale``."""

    weight: Sequence[float]
    density: Sequence[float]
    consensus: str
    normalize: bool
    scale: float


def _side_by_side(group: TensorGroup, asked: _Merging) -> Kernel:
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
        return all_nan
    values, basis = eigen(gram)
    sigma, inverse = singular(values)
    count = int((sigma > 0).sum())
    basis = basis[:count]
    aligned = [(basis[:, start:stop] * sigma[:count].unsqueeze(1)).view(-1) for start, stop in ranges(len(sigma), columns)]
    if count:
        small = TensorGroup.of(*aligned, base=torch.zeros_like(aligned[0]))
        known = _Aligned(None, 1, 1, small.elems)
        mixed = small.merged(_consensus(small, known, asked)).view(count, columns)
        back = basis.T @ mixed.mul_(inverse[:count].unsqueeze(1))
    else:
        back = torch.zeros(len(sigma), columns, dtype=torch.float64)

    def kernel(chunk: Chunk) -> torch.Tensor:
        made = chunk.empty("plain", torch.float64).view(-1, columns)
        for (start, stop), part in zip(ranges(len(made), block), beside(chunk), strict=True):
            torch.mm(part, back, out=made[start:stop])
        return on_base(chunk, made)

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


def _consensus(group: TensorGroup, aligned: _Aligned, asked: _Merging) -> Kernel:
    """Returns the kernel that merges aligned deltas as ``ties`` or ``task_arithmetic`` do."""
    n, total = aligned.elems, sum(asked.weight)
    ranks = [[group.elems if d >= 1 else max(int(d * n), 1) if d else 0] for d in asked.density]

    def magnitudes(chunk: Chunk) -> Iterator[torch.Tensor]:
        return (aligned.delta(chunk, model, OPERAND).abs_() for model in range(group.models))

    cuts = group.kth_largest(magnitudes, ranks) if any(d < 1 for d in asked.density) else None

    def kernel(chunk: Chunk) -> torch.Tensor:
        deltas = []
        for model, w in enumerate(asked.weight):
            delta = aligned.delta(chunk, model, f"delta {model}")
            deltas.append(scaled(cuts[model][0].keep(delta, chunk.start) if cuts else delta, w))
        if asked.consensus == "ties":
            mixed = winners(chunk, deltas, asked.weight, asked.normalize)
        else:
            mixed = deltas[0]
            for delta in deltas[1:]:
                mixed.add_(delta)
            if asked.normalize and abs(total) >= 1e-8:
                mixed.div_(total)
        return on_base(chunk, aligned.plain(chunk, mixed).mul_(asked.scale))

    return kernel
