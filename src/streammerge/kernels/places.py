"""Where the numbers of tensors and chunks lie, for compiled functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.compiled.numbers import known
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.chunk import Chunk

Place = tuple[int, DType]
"""The address of the first number, and the dtype of all."""


def dtype_of(values: torch.Tensor) -> DType:
    """Returns the dtype of a tensor."""
    return BY_TORCH_NAME[str(values.dtype).removeprefix("torch.")]


def places(chunk: Chunk) -> list[Place] | None:
    """Returns the places of all sources of a chunk, the base first. None if compiled functions cannot take them: some are
    not held, something is hidden, or a dtype is not known."""
    held = chunk.held()
    if held is None:
        return None
    found = [(each.data_ptr(), dtype_of(each)) for each in held]
    return found if known([dtype for _, dtype in found]) else None


def single_places(chunk: Chunk) -> list[Place] | None:
    """Returns the places of the base and of each model for functions that compute in float32, as the chunk must do. None if
    these cannot take them."""
    import torch

    found = places(chunk) if chunk.compute == torch.float32 and chunk.based else None
    return None if found is None or any(dtype == DType.F64 for _, dtype in found) else found
