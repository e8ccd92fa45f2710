"""Methods without averaging: a model taken unchanged, and tensors of integers, booleans and packed values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.errors import MismatchError, printable
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import PerModel, merge_method

if TYPE_CHECKING:
    import torch


@merge_method("copy", models=(1, 1), base="unused", passes=False, pointwise=True, buffers=0)
def copy(group: TensorGroup) -> Kernel:
    """Returns the only model's numbers, unchanged.

    Any shape and dtype, integers and packed values too. The numbers are recast if the output has another dtype;
    otherwise the bytes are copied without any arithmetic.
    """
    return lambda chunk: chunk.raw(0)


@merge_method("passthrough", models=(1, 1), base="unused", passes=False, pointwise=True, buffers=1, compute="float64")
def passthrough(group: TensorGroup, *, scale: PerModel | None = None) -> Kernel:
    r"""Returns the only model's numbers, times ``scale`` if one is given.

    .. math:: y = s\, x

    mergekit's ``passthrough``, which stacks a model from slices of others. Any shape.
    """
    factor = scale[0] if scale else None
    return lambda chunk: chunk.load(0) if factor is None else chunk.load(0).mul_(factor)


@merge_method("integers", base="unused", passes=False, buffers=4, listed=False)
def integers(group: TensorGroup, *, policy: str = "error") -> Kernel:
    """Settles tensors that must not be averaged by ``policy``; equal ones stay as they are.

    Models may hold the same integers in other dtypes, and as floats. "error" raises MismatchError where models differ.
    "first" and "last" take that model's values. "max" takes the elementwise largest, which suits counters such as
    ``num_batches_tracked``.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        if policy == "last":
            return chunk.raw(group.models - 1)
        kept = chunk.keep(chunk.raw(0))
        if policy == "max":
            for model in range(1, group.models):
                kept = _larger(*_alike(kept, chunk.raw(model)))
        elif policy == "error":
            for model in range(1, group.models):
                if not _same(*_alike(kept, other := chunk.raw(model))):
                    kinds = " and ".join(dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in (kept, other)))
                    raise MismatchError(
                        f"{printable(group.name)} holds {kinds} values that differ "
                        'between the inputs and must not be averaged; choose with `integers="first"`, `"last"` or `"max"`'
                    )
        return kept

    return kernel


def _alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both in float64 where one holds integers as floats, and in int64 where they are other integers."""
    import torch

    if a.dtype == b.dtype:
        return a, b
    wide = torch.float64 if a.is_floating_point() or b.is_floating_point() else torch.int64
    return a.to(wide), b.to(wide)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def _larger(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    if a.dtype == torch.uint64:  # torch cannot compare uint64; flipping the top bit makes the signed order the same
        flip = torch.iinfo(torch.int64).min
        return torch.maximum(a.view(torch.int64) ^ flip, b.view(torch.int64) ^ flip).bitwise_xor_(flip).view(torch.uint64)
    if a.dtype in (torch.uint16, torch.uint32):
        return torch.maximum(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    return torch.maximum(a, b)
