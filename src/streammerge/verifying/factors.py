"""Checks the factors of an adapter: computes a sample of them again from recipe and inputs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import MismatchError, VerifyError, listed, printable
from streammerge.events import Checked, Listener, Preparing, RunFinished, RunStarted, quiet
from streammerge.factoring.computing import Room, broken, distance, factors_of, stored
from streammerge.factoring.documents import START, WEIGHTS
from streammerge.factoring.layers import COMPARE, Layer
from streammerge.factoring.making import Making
from streammerge.running import process
from streammerge.running.executors.base import Host
from streammerge.running.workspace import prepare_torch
from streammerge.sources.base import Source
from streammerge.sources.wide import Wide
from streammerge.stores import faults
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, ranges
from streammerge.tensors.threads import one_torch_thread
from streammerge.verifying.files import Verified

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-5
"""The largest error of a product of float32 factors, relative to its largest number."""


def recompute_factors(
    verified: Verified, making: Making, share: float, seed: int, memory_bytes: int, listener: Listener = quiet
) -> None:
    """Computes the factors of a sample of the tensors again. Raises VerifyError when they differ.

    Factors are right if they are the same to the bit. Another machine may find other ones of the same product, so
    otherwise the products are compared.
    """
    making.workers_within(memory_bytes, 1)  # raises when the budget has no room for a layer
    index = open_checkpoint(verified.out if making.file is not None else verified.out / WEIGHTS)
    units = [layer for layer in making.layers if layer.way != COMPARE]
    layers, wholes = len(units), list(making.wholes)
    every = layers + len(wholes)
    chosen = sorted(random.Random(seed).sample(range(every), math.ceil(every * share)))
    listener(Preparing("torch"))
    prepare_torch()
    listener(RunStarted(sum(_reads(making, units, n) for n in chosen), 0, memory_bytes, len(chosen)))
    began, wrong, held = time.perf_counter(), list[str](), process.Gauge()
    identities = making.files | index.identities()
    with closing(InputFiles(identities)) as files, faults.survived(), one_torch_thread():
        for number in chosen:
            room = Room(files, Host(lambda: False))
            if number < layers:
                name, right = units[number].module, _factors_are_right(units[number], index, room, verified)
            else:
                name = wholes[number - layers]
                right = _whole_is_right(name, making, index, room, verified)
            wrong += [] if right else [name]
            listener(Checked(name, room.read_bytes, held.now()))
            room.forget()
    listener(RunFinished(time.perf_counter() - began))
    if wrong:
        raise VerifyError(
            f"{printable(verified.out)} differs from the result of its recipe and these inputs in {listed(wrong)}; "
            "it was made from other inputs, or it is wrong"
        )


def _reads(making: Making, units: Sequence[Layer], number: int) -> int:
    """Returns the bytes of the inputs of a layer with factors, or of a module that may be stored whole."""
    if number < len(units):
        return sum(each.nbytes for each in units[number].sources)
    return sum(each.nbytes for each in making.wholes[list(making.wholes)[number - len(units)]].values())


def _factors_are_right(layer: Layer, index: CheckpointIndex, room: Room, verified: Verified) -> bool:
    """Whether the output has the factors of a layer."""
    try:
        factors = factors_of(layer, room)
    except ValueError as error:
        raise MismatchError(broken(layer, room)) from error
    made = stored(layer, factors) if factors.rank else ()
    names = [spec.name for spec in layer.specs(max(factors.rank, 1))]
    alpha = layer.stored_alpha() if factors.rank else None
    if alpha is not None:
        spec, value = alpha
        if spec.name not in index or float(_read(index[spec.name], room)) != float(_rounded(value, spec.dtype)):
            return False
    return _same(made, [_read(index[name], room) for name in names if name in index], verified)


def _whole_is_right(module: str, making: Making, index: CheckpointIndex, room: Room, verified: Verified) -> bool:
    """Whether the output has the tensors of a module whole, or only its bias, if the models differ there and it has no
    factors."""
    tensors = making.wholes[module]
    names = {name: START + name for name in tensors}
    factored = any(spec.name in index for each in making.layers if each.module == module for spec in each.specs(1))
    if factored:
        names = {name: f"{START}{module}.base_layer.bias" for name in tensors if name.endswith(".bias")}
    compared = {each.name: each for each in making.layers if each.way == COMPARE and each.module == module}
    if not any(stored_as in index for stored_as in names.values()):
        return not any(distance(compared[name], room) for name in names if name in compared)
    for name, stored_as in names.items():
        if stored_as not in index or not _equal(index[stored_as], tensors[name], room):
            return False
        verified.sampled_tensors += 1
        verified.sampled_elems += tensors[name].spec.numel
        verified.repeated_elems += tensors[name].spec.numel
    return True


def _equal(one: Source, other: Source, room: Room) -> bool:
    """Whether two tensors of any length have the same dtype, shape and numbers."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    numel = one.spec.numel
    first, second = (Wide(each, room, max(min(GRAIN, numel), 1)) for each in (one, other))
    for start, stop in ranges(numel, GRAIN):
        here, there = first.read(start, stop), second.read(start, stop)
        if not bool(((here == there) | (here.isnan() & there.isnan())).all()):
            return False
    return True


def _same(made: Sequence[torch.Tensor], there: Sequence[torch.Tensor], verified: Verified) -> bool:
    """Whether the factors in the output are those that were computed, or have their product. Counts them."""
    import torch

    if len(made) != len(there):
        return False
    elems = sum(each.numel() for each in there)
    verified.sampled_tensors += len(there)
    verified.sampled_elems += elems
    if all(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in zip(made, there, strict=True)):
        verified.repeated_elems += elems
        return True
    (right, left), (other_right, other_left) = map(_matrices, (made, there))
    if left.shape != other_left.shape or right.shape != other_right.shape:
        return False
    largest = difference = 0.0
    for start, stop in ranges(len(left), max(GRAIN // max(right.shape[1], 1), 1)):
        one, other = left[start:stop] @ right, other_left[start:stop] @ other_right
        largest, difference = max(largest, float(one.abs().max())), max(difference, float((one - other).abs().max()))
    return difference <= _ROUNDING * largest


def _matrices(factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A [r, columns] and B [rows, r] in float64."""
    down, up = (each.double() for each in factors)
    return down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)


def _rounded(value: float, dtype: DType) -> torch.Tensor:
    import torch

    return torch.tensor(value, dtype=dtype.torch)


def _read(source: Source, room: Room) -> torch.Tensor:
    """Reads a tensor of the output, in its dtype."""
    import torch

    made = torch.empty(source.spec.numel, dtype=torch.float64)
    wide = Wide(source, room, max(min(GRAIN, made.numel()), 1))
    for start, stop in ranges(made.numel(), GRAIN):
        made[start:stop] = wide.read(start, stop)
    return made.view(source.spec.shape).to(source.spec.dtype.torch)
