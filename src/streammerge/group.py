"""What a merge method sees: the same tensor of every model, as chunks of numbers. No file, offset or budget.

A method is a function from a :class:`TensorGroup` to a kernel; a kernel makes one chunk of the output from a
:class:`Chunk` of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from streammerge.dtypes import DType

Kernel = Callable[["Chunk"], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The same-named tensors of all models: how many, and the name they have in the output."""

    name: str
    models: int


class Buffers(Protocol):
    """Memory that a chunk may use: ``get`` returns ``elems`` numbers of a dtype in the named slot."""

    def get(self, slot: str, dtype: torch.dtype, elems: int) -> torch.Tensor: ...


class Chunk:
    """Elements ``start`` to ``stop`` of every model's tensor, in C order.

    ``raw(i)`` are model i's numbers in their own dtype; they stay valid until the next but one call.
    ``load(i, slot)`` are the same in the compute dtype, in the buffer "total" or "operand".
    """

    def __init__(
        self,
        start: int,
        stop: int,
        dtypes: Sequence[DType],
        compute: torch.dtype,
        buffers: Buffers,
        read: Callable[[int, int, int], torch.Tensor],
    ) -> None:
        self.start, self.stop = start, stop
        self.dtypes = dtypes
        self._compute, self._buffers, self._read = compute, buffers, read

    @property
    def elems(self) -> int:
        return self.stop - self.start

    def raw(self, model: int) -> torch.Tensor:
        return self._read(model, self.start, self.stop)

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of raw numbers that stays valid for the whole chunk; there is room for one."""
        return self._buffers.get("total", values.dtype, self.elems).copy_(values)

    def load(self, model: int, slot: str = "operand") -> torch.Tensor:
        """The model's numbers in the compute dtype, in a buffer that the next ``load`` into the same slot reuses."""
        raw = self.raw(model)
        target = self._buffers.get(slot, self._compute, self.elems)
        if self._compute == torch.float64 and raw.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            # torch converts half and fp8 to double element by element; by way of float32 it is exact and faster.
            raw = self._buffers.get("widen", torch.float32, self.elems).copy_(raw)
        return target.copy_(raw)
