"""Arcee Fusion: takes only the changes of the other model that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.masks import Kept, kept_bytes
from streammerge.kernels.ranking import Cut
from streammerge.methods.contracts import Values, merge_method
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch


def _row(shape: tuple[int, ...], values: Values) -> int:
    return shape[-1] if shape else 1


def _in_batch(batch: Batch, values: Values) -> torch.Tensor | None:
    """Returns the result for all tensors of a batch, None where an importance is NaN."""
    import torch

    chunk = batch.chunk
    importance = _importance(chunk, _row(batch.shape, values))
    cuts = batch.cuts(importance, [_quartiles(batch.elems)] * len(batch.names), signed=True)
    if cuts is None:
        return None
    rows = batch.rows(importance)
    torch.ge(rows, batch.column([_threshold(of_tensor) for of_tensor in cuts]), out=rows)
    return chunk.delta(0).mul_(importance).add_(chunk.base)


@merge_method(
    "arcee_fusion",
    models=(1, 1),
    base="required",
    row=_row,
    buffers=12,
    kept_bits=32,
    searches=3,
    batch=_in_batch,
)
def arcee_fusion(group: TensorGroup) -> Kernel:
    r"""Adds to the base the changes whose importance is far above the median.

    .. math:: y = b + (x - b) \odot \big[\,s \ge \operatorname{median}(s) + 1.5\,(Q_3 - Q_1)\,\big], \qquad
              s = |x - b|\; \mathrm{KL}\big(\operatorname{softmax}(x) \,\|\, \operatorname{softmax}(b)\big)

    Softmax (plus 1e-8) and KL run along the last dimension. Quartiles are over the whole tensor; each is the element at
    :math:`\lfloor q\,(n - 1) \rfloor` of the sorted ones. Arcee AI, *mergekit v0.1 release*, 2025. One model and the
    base; one row is held at a time.

    Edge cases: identical models give the base. A 0-d tensor is a row of one element, with divergence 0: its importance
    equals the threshold, so the model's number is taken. Deviation from mergekit: quartiles of tensors above a million
    elements are exact; mergekit takes those of a random sample.
    """
    n, kept = group.elems, list["torch.Tensor"]()
    known = _Divergences(group)

    def importance(chunk: Chunk) -> torch.Tensor:
        if chunk.hides:
            return _importance(chunk, group.row)
        if not chunk.elems == n <= GRAIN:
            return _apart(chunk, group.row, known.of(chunk))
        if kept:
            return chunk.empty("importance").copy_(kept[0])
        made = _importance(chunk, group.row)
        kept.append(made.clone())
        return made

    (cuts,) = group.kth_largest(lambda chunk: [importance(chunk)], [_quartiles(n)], signed=True)
    threshold = _threshold(cuts)

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        values = importance(chunk)
        keep = torch.ge(values, threshold, out=values)
        return chunk.delta(0).mul_(keep).add_(chunk.base)

    return kernel


def _quartiles(n: int) -> list[int]:
    """Returns the ranks of the quartiles of n numbers, counted from the largest number."""
    return [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]


def _threshold(cuts: Sequence[Cut]) -> float:
    first, middle, third = (cut.threshold for cut in cuts)
    return middle + 1.5 * (third - first)


class _Divergences:
    """The divergences of a long tensor's rows. Those that a pass has made lie beside memory for the next pass and the
    kernel, if there is room, and if they take no more of it than a mask. Others are made again."""

    def __init__(self, group: TensorGroup) -> None:
        self._row, self._size = max(group.row, 1), group.compute.itemsize
        self._kept: Kept | None = None
        if group.masks is not None and group.elems > GRAIN and self._row >= 8 * self._size:
            of_grain = group.grain // self._row * self._size
            room = group.masks(kept_bytes(1, group.elems, group.grain, of_grain))
            self._kept = None if room is None else Kept(room, group.elems, group.grain, of_grain)

    def of(self, chunk: Chunk) -> torch.Tensor:
        """Returns those of a chunk's rows, in a column."""
        import torch

        if self._kept is None:
            return _divergence(chunk, self._row)
        found = self._kept.kept(0, chunk.start, chunk.stop, chunk.elems // self._row * self._size)
        if found is not None:
            return torch.frombuffer(found, dtype=chunk.compute).unsqueeze(1)
        made = _divergence(chunk, self._row)
        self._kept.keep(0, chunk.start, chunk.stop, made.numpy().tobytes())
        return made


def _importance(chunk: Chunk, row: int) -> torch.Tensor:
    return _apart(chunk, row, _divergence(chunk, row))


def _divergence(chunk: Chunk, row: int) -> torch.Tensor:
    import torch

    x, b = (values.view(-1, row) for values in (chunk.load(0, "x"), chunk.base))
    p, q = (chunk.empty(slot).view(x.shape) for slot in ("p", "q"))  # memory of torch's own would be new at each chunk
    torch.softmax(x, -1, out=p).add_(1e-8)
    torch.softmax(b, -1, out=q).add_(1e-8)
    return torch.div(p, q, out=q).log_().mul_(p).sum(-1, keepdim=True)


def _apart(chunk: Chunk, row: int, divergence: torch.Tensor) -> torch.Tensor:
    """Returns how far the model's numbers lie apart from the base's, times the divergences of their rows."""
    return chunk.delta(0, "x").abs_().view(-1, row).mul_(divergence).view(-1)
