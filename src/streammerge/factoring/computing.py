"""Computes the factors of one layer, as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.errors import printable
from streammerge.factoring.layers import DECOMPOSE, LINEAR, STACK, Layer
from streammerge.factoring.truncated import Factors, of_product, truncated
from streammerge.running.executors.base import Host
from streammerge.sources.base import Allocated, Source
from streammerge.sources.wide import Wide, not_finite
from streammerge.stores.base import Input, Location
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch


class Room(Allocated):
    """The room of one layer. Counts the bytes that are read."""

    def __init__(self, files: InputFiles, host: Host) -> None:
        super().__init__(self._opened)
        self._inputs, self._host = files, host
        self.read_bytes = 0

    def _opened(self, path: Location) -> _Counted:
        return _Counted(self, self._inputs.get(path))

    def halt(self) -> None:
        self._host.check()


class _Counted:
    def __init__(self, room: Room, file: Input) -> None:
        self._room, self._file = room, file

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._room.read_bytes += len(buffer)
        self._file.read_into(buffer, offset)


def factors_of(layer: Layer, room: Room) -> Factors:
    """Computes the factors of a layer that is not compared. Raises ValueError for numbers that are not finite."""
    if layer.way == DECOMPOSE:
        return truncated(layer.rows, layer.wanted, room)
    left, right = (_whole(each, room) for each in layer.sources)
    if layer.way == STACK:
        if not (left.isfinite().all() and right.isfinite().all()):
            raise ValueError("NaN or infinity")
        return Factors(left.to(layer.wanted.dtype.torch), right.to(layer.wanted.dtype.torch), 0.0, 0.0)
    return of_product(left, right, layer.wanted.rank, layer.wanted.dtype)


def broken(layer: Layer, room: Room) -> str:
    """Says which tensor of the inputs of a layer has a NaN or infinity."""
    found = next((leaf for source in layer.sources if (leaf := not_finite(source, room)) is not None), None)
    if found is None:
        return f"{printable(layer.name)} has NaN or infinity in the result of its method"
    where = f" of {printable(found.blobs[0].path)}" if found.blobs else ""
    return f"{printable(found.spec.name)}{where} has NaN or infinity"


def _whole(source: Source, room: Room) -> torch.Tensor:
    """Reads a small matrix, in float64."""
    import torch

    numel = source.spec.numel
    made = torch.empty(numel, dtype=torch.float64)
    wide = Wide(source, room, min(GRAIN, numel))
    for start, stop in ranges(numel, GRAIN):
        room.halt()
        made[start:stop] = wide.read(start, stop)
    return made.view(source.spec.shape)


def distance(layer: Layer, room: Room) -> float:
    """Returns the sum of the squared differences of two tensors."""
    (one, other), total = layer.sources, 0.0
    numel = one.spec.numel
    span = min(GRAIN, numel)
    first, second = Wide(one, room, span), Wide(other, room, span)
    for start, stop in ranges(numel, GRAIN):
        room.halt()
        total += float(first.read(start, stop).sub_(second.read(start, stop)).square_().sum())
    return total


def stored(layer: Layer, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B as a file holds them."""
    left, right = factors.left, factors.right
    if layer.keys is not None and layer.keys.value and layer.way != STACK:
        share = (factors.rank / layer.keys.value) ** 0.5
        left, right = left.mul_(share), right.mul_(share)
    if layer.alpha:
        left = left.mul_(factors.rank / layer.alpha)
    if layer.form == LINEAR:
        return right.contiguous(), left.contiguous()
    return left.T.contiguous(), right.T.contiguous()
