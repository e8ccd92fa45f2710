"""What a merge method sees: the same tensor of every model, as chunks of numbers. No file, offset or budget.

A method is a function from a :class:`TensorGroup` to a kernel; a kernel makes one chunk of the output from a
:class:`Chunk` of the inputs. Before it returns its kernel a method may look at the whole group in *passes*, each of
which streams all chunks and answers with something small: sums, a Gram matrix, an exact k-th largest number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.kernels import kth_largest, reductions
from streammerge.kernels.chunk import Chunk, Kernel, Sweep, T, chunk_spans, whole_rows
from streammerge.kernels.random import uniform
from streammerge.kernels.ranking import Cut
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The same-named tensors of all models.

    ``models`` counts them, without the base that ``based`` says is there; ``shape`` is theirs. ``row`` elements belong
    together and are never parted between chunks. ``compute`` is the dtype of the arithmetic.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    compute: torch.dtype
    sweep: Sweep
    based: bool = False
    row: int = 1
    seed: int = 0

    @property
    def elems(self) -> int:
        return math.prod(self.shape)

    @property
    def grain(self) -> int:
        """Elements whose sum is taken at once: 2^16, or as many whole rows."""
        return whole_rows(GRAIN, self.row)

    def reduce(self, terms: Callable[[Chunk], Iterable[torch.Tensor]]) -> list[torch.Tensor]:
        """The sum over all chunks of each tensor that ``terms(chunk)`` yields, in float64.

        A tensor of the chunk's length gives a number; one of (rows, columns) the sum of each column. A sum is made of
        the partial sums of the grains, added in their order, piece by piece, and so does not depend on how it was run.
        """
        return reductions.reduce(self, terms)

    def gram(self, deltas: bool = False) -> torch.Tensor:
        """The (models, models) matrix of inner products in float64; ``deltas``: of the models less the base, which are
        formed before they are multiplied."""
        return reductions.gram(self, deltas)

    def kth_largest(
        self,
        values: Callable[[Chunk], Iterable[torch.Tensor]],
        ranks: Sequence[Sequence[int]],
        signed: bool = False,
    ) -> list[list[Cut]]:
        """Exact order statistics: for each tensor that ``values(chunk)`` yields, and each of its ranks, the cut that
        keeps so many of the largest; of equal numbers those with the lowest element indices.

        ``values`` are in the compute dtype, and not below zero unless ``signed``: magnitudes, mostly. A rank of 0 keeps
        nothing, one of all elements or more everything. With ``signed`` only the thresholds
        are found. Ranks within each row are
        :func:`streammerge.kernels.ranking.row_ranks`, since a row is always held whole.
        """
        return kth_largest.kth_largest(self, values, ranks, signed)

    def uniform(self, chunk: Chunk, model: int) -> torch.Tensor:
        """Numbers in [0, 1), float32, one for each element of the chunk: a function of seed, tensor name, model and
        element index."""
        import torch

        out = chunk.empty("uniform", torch.float32)
        return uniform(self.seed, self.name, model, chunk.start, out, chunk.empty("uniform bits", torch.int32))

    @classmethod
    def of(
        cls,
        *models: torch.Tensor,
        base: torch.Tensor | None = None,
        name: str = "tensor",
        seed: int = 0,
        row: int = 1,
        compute: torch.dtype | None = None,
        chunk_elems: int = GRAIN,
    ) -> TensorGroup:
        """A group of tensors in memory, to try a method without files: ``group.merged(slerp(group, t=0.3))``."""
        import torch

        sources = ([] if base is None else [base]) + list(models)
        wide = any(t.dtype == torch.float64 for t in sources)
        compute = compute or (torch.float64 if wide else torch.float32)
        flat = [tensor.detach().contiguous().reshape(-1) for tensor in sources]
        step, buffers = chunk_elems, _Allocated()

        def chunks(start: int, stop: int, sparse: int) -> Iterator[Chunk]:
            for a, b in list(chunk_spans(start, stop, step, row, sparse)) or [(0, 0)]:
                yield Chunk(
                    a,
                    b,
                    compute,
                    buffers,
                    lambda source, start, stop: flat[source][start:stop],
                    base is not None,
                    len(models),
                )

        def sweep(work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            yield work(chunks(start, stop, sparse))

        return cls(name, tuple(sources[0].shape), len(models), compute, sweep, base is not None, row, seed)

    def merged(self, kernel: Kernel) -> torch.Tensor:
        """The whole tensor that a kernel makes, in the compute dtype. In memory: for trying a method."""
        import torch

        def work(chunks: Iterable[Chunk]) -> list[torch.Tensor]:
            return [kernel(chunk).reshape(-1).clone() for chunk in chunks]

        made = [chunk for piece in self.sweep(work, 0, self.elems) for chunk in piece]
        return torch.cat(made).reshape(self.shape) if made else torch.empty(self.shape, dtype=self.compute)


class _Allocated:
    """Buffers of a group in memory."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(self, slot: str, dtype: torch.dtype, elems: int) -> torch.Tensor:
        import torch

        known = self._slots.get((slot, dtype))
        if known is None or len(known) < elems:
            known = self._slots[slot, dtype] = torch.empty(elems, dtype=dtype)
        return known[:elems]
