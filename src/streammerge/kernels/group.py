"""The group of same-named tensors of all models, as a merge method sees it: chunks of numbers.

A method is a function from a :class:`TensorGroup` to a kernel. A kernel makes one chunk of the output from a
:class:`Chunk` of the inputs. Before a method returns its kernel, it may run *passes* over the whole group. A pass
streams all chunks and returns a small result: sums, a Gram matrix, or an exact k-th largest number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from streammerge.kernels.chunk import Chunk, Hiding, Kernel, Look, Slot, Step, Sweep, T, chunk_spans, whole_rows
from streammerge.kernels.masks import MaskRoom
from streammerge.kernels.pass_results import PassResults
from streammerge.kernels.spill import Spill, spilled
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.random import Bits
    from streammerge.kernels.ranking import Cut

_UNIFORM: Slot = ("uniform",)
_UNIFORM_BITS: Slot = ("uniform bits",)
_FLAGS: Slot = ("chosen",)


@dataclass(frozen=True, slots=True, eq=False)
class TensorGroup:
    """The same-named tensors of all models.

    ``models`` is their number, without the base; ``based`` says whether there is a base. ``shape`` is the shape of
    each. ``row`` elements belong together and are never split between chunks. ``compute`` is the dtype of the
    arithmetic. ``results`` holds the results of passes that an earlier binding made; they are not computed again.
    ``turned``: whether the tensors have their first axis last. ``spills`` makes a temporary file of so many bytes; without
    it, spills are held in memory. ``masks`` makes room for so many bytes of masks, if it can.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    compute: torch.dtype
    sweep: Sweep
    based: bool = False
    row: int = 1
    seed: int = 0
    results: PassResults | None = None
    turned: bool = False
    spills: Callable[[int], Spill] | None = None
    masks: Callable[[int], MaskRoom | None] | None = None

    @property
    def elems(self) -> int:
        return math.prod(self.shape)

    def hiding(self) -> TensorGroup:
        """Returns the same group, whose sweeps leave out infinities and NaN that all inputs have."""
        sweep = self.sweep

        def hidden(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            return sweep(look, Hiding(step), start, stop, sparse)

        return replace(self, sweep=hidden)

    @property
    def grain(self) -> int:
        """Number of elements that are summed at once: 2^16, rounded to whole rows."""
        return whole_rows(GRAIN, self.row)

    def reduce(self, terms: Callable[[Chunk], Iterable[torch.Tensor]]) -> list[torch.Tensor]:
        """Returns the sum over all chunks of each tensor that ``terms(chunk)`` yields, in float64.

        A tensor of the chunk's length gives a number; one of shape (rows, columns) gives the sum of each column.
        Partial sums of grains are added in their order, so a sum does not depend on how the run was divided.
        Infinities and NaN that all inputs have count as zero.
        """
        from streammerge.kernels import reductions

        return self._pass(partial(reductions.reduce, self, terms))

    def gram(self, deltas: bool = False) -> torch.Tensor:
        """Returns the (models, models) matrix of inner products in float64. ``deltas``: subtracts the base from the
        models before they are multiplied."""
        from streammerge.kernels import reductions

        return self._pass(partial(reductions.gram, self, deltas))

    def kth_largest(
        self,
        values: Callable[[Chunk], Iterable[torch.Tensor]],
        ranks: Sequence[Sequence[int]],
        signed: bool = False,
    ) -> list[list[Cut]]:
        """Returns exact order statistics: one cut for each tensor that ``values(chunk)`` yields and each of its ranks.

        A cut keeps the ``rank`` largest numbers; among equal numbers, those with the lowest element indices. ``values``
        are in the compute dtype, and non-negative unless ``signed`` (mostly magnitudes). Rank 0 keeps nothing; a rank
        of all elements or more keeps everything. With ``signed`` only the thresholds are valid. For ranks within a row,
        which is always held whole, use :func:`streammerge.kernels.row_ranking.row_ranks`.
        """
        from streammerge.kernels import kth_largest

        return self._pass(partial(kth_largest.kth_largest, self, values, ranks, signed))

    def answers(self, look: Callable[[Chunk], Iterable[Any]], step: Step[T]) -> list[T]:
        """Returns the answers of a step of its own over all chunks: one for each piece of the tensor, in their order."""
        swept: Look = look
        return self._pass(lambda: [*self.sweep(swept, step, 0, self.elems)])

    def spill(self, nbytes: int) -> Spill:
        """Returns room beside memory for so many bytes, which is there as long as the object. The contract of a method says
        how much it takes (``spills``)."""
        return spilled(nbytes, self.spills)

    def _pass(self, run: Callable[[], T]) -> T:
        return run() if self.results is None else self.results.next(run)

    def uniform(self, chunk: Chunk, model: int) -> torch.Tensor:
        """Returns float32 random numbers in [0, 1), one per element of the chunk. They depend on seed, tensor name,
        model and element index only."""
        import torch

        from streammerge.kernels.random import uniform

        out = chunk.empty(_UNIFORM, torch.float32)
        return uniform(self.seed, self.name, model, chunk.start, out, chunk.empty(_UNIFORM_BITS, torch.int32))

    def chosen(self, chunk: Chunk, model: int, chance: float | torch.Tensor) -> Bits:
        """Returns a bit for each element of the chunk, 1 where the :meth:`uniform` number is below the chance.
        ``chance``: see :func:`streammerge.kernels.random.chosen`."""
        import torch

        from streammerge.kernels.random import chosen

        words, scratch = chunk.empty(_UNIFORM, torch.float32), chunk.empty(_UNIFORM_BITS, torch.int32)
        return chosen(self.seed, self.name, model, chunk.start, chance, words, scratch, chunk.empty(_FLAGS, torch.bool))

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
        turned: bool = False,
    ) -> TensorGroup:
        """Makes a group of tensors in memory, to try a method without files: ``group.merged(slerp(group, t=0.3))``."""
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
                    stays=lambda source: flat[source].device.type == "cpu" and not flat[source].is_neg(),
                )

        def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            yield step(look, chunks(start, stop, sparse))

        shape, based = tuple(sources[0].shape), base is not None
        return cls(name, shape, len(models), compute, sweep, based, row, seed, turned=turned)

    def merged(self, kernel: Kernel) -> torch.Tensor:
        """Returns the whole tensor that a kernel makes, in the compute dtype. It is held in memory, to try a method."""
        import torch

        def look(chunk: Chunk) -> list[torch.Tensor]:
            made = kernel(chunk).reshape(-1).clone()
            if not bool(made.isfinite().all()):
                chunk.settle(kernel, self.row, made)
            return [made]

        made = [chunk for piece in self.sweep(look, _everything, 0, self.elems) for chunk in piece]
        return torch.cat(made).reshape(self.shape) if made else torch.empty(self.shape, dtype=self.compute)


def _everything(look: Look, chunks: Iterable[Chunk]) -> list[torch.Tensor]:
    return [tensor for chunk in chunks for tensor in look(chunk)]


class _Allocated:
    """Buffers of a group in memory."""

    def __init__(self) -> None:
        self._slots: dict[tuple[Slot, torch.dtype], torch.Tensor] = {}

    def get(self, slot: Slot, dtype: torch.dtype, elems: int) -> torch.Tensor:
        import torch

        known = self._slots.get((slot, dtype))
        if known is None or len(known) < elems:
            known = self._slots[slot, dtype] = torch.empty(elems, dtype=dtype)
        return known[:elems]
