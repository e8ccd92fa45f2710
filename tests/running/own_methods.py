"""A user's own methods for the tests, in a module that worker processes can import."""

from __future__ import annotations

import os
from typing import Any

import torch

from streammerge.kernels import random
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.task_arithmetic import dare_linear


def centred(group: TensorGroup) -> Kernel:
    """Subtracts the mean of all its numbers from the first model."""
    (total,) = group.reduce(lambda chunk: [chunk.models[0]])
    mean = float(total) / group.elems
    return lambda chunk: chunk.models[0] - mean


def fickle(group: TensorGroup) -> Kernel:
    """Makes more passes in a worker process than in the coordinating process."""
    for _ in range(2 if os.environ.get("COORDINATOR") == str(os.getpid()) else 3):
        group.reduce(lambda chunk: [chunk.models[0]])
    return lambda chunk: chunk.models[0]


def failing(group: TensorGroup) -> Kernel:
    def kernel(chunk: Chunk) -> torch.Tensor:
        raise ZeroDivisionError("of its own")

    return kernel


def named(group: TensorGroup, *, of: object = None) -> Kernel:
    """Takes the first model. ``of``: anything."""
    return lambda chunk: chunk.models[0]


def at_once(group: TensorGroup) -> Kernel:
    raise ZeroDivisionError


def in_a_pass(group: TensorGroup) -> Kernel:
    group.reduce(lambda chunk: [chunk.models[0] / 0 + chunk.raw(1000)])
    return lambda chunk: chunk.models[0]


def drawing(group: TensorGroup) -> Kernel:
    """``dare_linear`` that leaves a byte in the file ``DRAWN`` for each random number that is made."""
    if random.chosen.__module__ == random.__name__:
        made = random.chosen

        def counted(*args: Any) -> Any:
            with open(os.environ["DRAWN"], "ab") as file:
                file.write(bytes(args[-1].numel()))
            return made(*args)

        random.chosen = counted
    return dare_linear(group, density=[0.5] * group.models, weight=[1.0] * group.models)
