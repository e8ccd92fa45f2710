"""Methods of one's own for the tests, in a module that worker processes can import."""

from __future__ import annotations

import os

import torch

from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup


def centred(group: TensorGroup) -> Kernel:
    """The first model less the mean of all its numbers."""
    (total,) = group.reduce(lambda chunk: [chunk.models[0]])
    mean = float(total) / group.elems
    return lambda chunk: chunk.models[0] - mean


def fickle(group: TensorGroup) -> Kernel:
    """Makes more passes in a worker process than in the one that coordinates."""
    for _ in range(2 if os.environ.get("COORDINATOR") == str(os.getpid()) else 3):
        group.reduce(lambda chunk: [chunk.models[0]])
    return lambda chunk: chunk.models[0]


def failing(group: TensorGroup) -> Kernel:
    def kernel(chunk: Chunk) -> torch.Tensor:
        raise ZeroDivisionError("of its own")

    return kernel
