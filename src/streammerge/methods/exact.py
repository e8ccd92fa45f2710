"""What is not averaged: copies, and tensors of integers, booleans and packed values."""

from __future__ import annotations

import torch

from streammerge.errors import MismatchError, printable
from streammerge.group import Chunk, Kernel, TensorGroup


def copy(group: TensorGroup) -> Kernel:
    """The only model's numbers; recast on the way out where the output has another dtype."""
    return lambda chunk: chunk.raw(0)


def integers(group: TensorGroup, *, policy: str) -> Kernel:
    """Tensors that must not be averaged: equal everywhere, or settled by ``policy``.

    "error" raises MismatchError where models differ; "first" and "last" take that model's; "max" the elementwise
    largest, which suits counters such as ``num_batches_tracked``. The dtype is kept.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        if policy == "last":
            return chunk.raw(group.models - 1)
        kept = chunk.keep(chunk.raw(0))
        if policy == "max":
            for model in range(1, group.models):
                kept = _larger(kept, chunk.raw(model))
        elif policy == "error":
            for model in range(1, group.models):
                if not torch.equal(_octets(kept), _octets(chunk.raw(model))):
                    raise MismatchError(
                        f"{printable(group.name)} holds {_name(kept.dtype)} values that differ between the inputs "
                        "and must not be averaged; choose with --integers first, last or max"
                    )
        return kept

    return kernel


def _octets(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _larger(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == torch.uint64:  # torch compares no uint64; flipping the top bit makes the signed order the same
        flip = torch.iinfo(torch.int64).min
        return torch.maximum(a.view(torch.int64) ^ flip, b.view(torch.int64) ^ flip).bitwise_xor_(flip).view(torch.uint64)
    if a.dtype in (torch.uint16, torch.uint32):
        return torch.maximum(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    return torch.maximum(a, b)
