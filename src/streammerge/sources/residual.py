"""What is left of a matrix when its strongest part is taken out, as PiSSA and OLoRA do when an adapter is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

    from streammerge.tensors.spec import TensorSpec

WAYS = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class Residual(Source):
    """``source`` minus its part of rank ``rank``, rounded to its dtype as PEFT does. :func:`residual` makes it.

    ``way``: "pissa" takes out the strongest singular values, "olora" ``scale`` times the first columns of its QR
    decomposition. Each worker holds the whole matrix, and decomposes it in float32. ``transposed``: the matrix is stored as
    [in, out].
    """

    spec: TensorSpec
    source: Source
    rank: int
    way: str
    scale: float = 1.0
    transposed: bool = False

    def needs(self) -> Needs:
        numel, short = self.spec.numel, min(self.spec.shape)
        held = 4 * (7 * numel + 6 * short * short)
        return Needs(held_bytes=held, computes=True) + wide_needs(self.source, min(GRAIN, numel))

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


def residual(source: Source, rank: int, way: str, scale: float = 1.0, transposed: bool = False) -> Residual:
    """Returns the rest of a matrix. Raises RecipeError for anything but a matrix of at least this rank."""
    if way not in WAYS:
        raise RecipeError(f"{printable(way)} is no way to take a part out of a matrix; known are {', '.join(WAYS)}")
    if len(source.spec.shape) != 2 or not 0 < rank <= min(source.spec.shape):
        raise RecipeError(
            f"{printable(source.spec.name)} of shape {list(source.spec.shape)} has no part of rank {rank} to take out"
        )
    return Residual(source.spec, source, rank, way, scale, transposed)


class _Reader(Reader):
    def __init__(self, source: Residual, room: Room) -> None:
        self._source, self._room = source, room
        self._wide = Wide(source.source, room, min(GRAIN, source.spec.numel))

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        whole = self._room.once(self._source, self._whole)
        put(whole[start:stop].double(), out, self._source.spec.dtype)
        return out

    def _whole(self) -> torch.Tensor:
        import torch

        source = self._source
        flat = torch.empty(source.spec.numel)
        for begin, end in ranges(source.spec.numel, GRAIN):
            flat[begin:end].copy_(self._wide.read(begin, end))
        stored = flat.view(source.spec.shape)
        weight = stored.t() if source.transposed else stored
        if source.way == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            root = torch.diag(torch.sqrt(values[: source.rank] / source.scale))
            taken = source.scale * (left[:, : source.rank] @ root) @ (root @ right[: source.rank])
        else:
            q, r = torch.linalg.qr(weight)
            taken = source.scale * q[:, : source.rank] @ r[: source.rank]
        rest: torch.Tensor = weight - taken
        return (rest.t() if source.transposed else rest).contiguous().view(-1)
