"""The elements of a source in another shape, in the same order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.sources.box import box
from streammerge.sources.contracted import contracted
from streammerge.sources.stored import Stored
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Shaped(Source):
    """``source`` in the shape of ``spec``. :func:`shaped` makes it."""

    spec: TensorSpec
    source: Source

    def needs(self) -> Needs:
        return self.source.needs()

    def open(self, room: Room) -> Reader:
        return self.source.open(room)


def shaped(source: Source, *shape: int) -> Source:
    """Returns the elements in another shape. One size may be -1: it follows from the others. Raises RecipeError."""
    known = math.prod(size for size in shape if size >= 0)
    whole = tuple(source.spec.numel // known if size < 0 and known else max(size, 0) for size in shape)
    if whole == source.spec.shape:
        return source
    if math.prod(whole) != source.spec.numel:
        raise RecipeError(f"{printable(source.spec.name)} of shape {list(source.spec.shape)} has no form {list(shape)}")
    spec = TensorSpec(source.spec.name, source.spec.dtype, whole)
    if isinstance(source, Stored):
        return replace(source, spec=spec)
    return Shaped(spec, source.source if isinstance(source, Shaped) else source)


def turned(source: Source, *axes: int) -> Source:
    """Returns a tensor with its axes in another order, by default a matrix transposed.

    Bytes are gathered where they lie. The tensor of an expression is computed whole and held, so it should be small.
    """
    axes = axes or (1, 0)
    if axes == tuple(range(len(axes))):
        return source
    shape = source.spec.shape
    if sum(size > 1 for size in shape) < 2:  # the order of the elements stays
        return shaped(source, *(shape[axis] for axis in axes))
    made = box(source, source.spec.name, (0,) * len(shape), tuple(shape[axis] for axis in axes), axes)
    if made is not None:
        return made
    letters = "abcdefgh"[: len(shape)]
    return contracted(source.spec.name, f"{letters}->{''.join(letters[axis] for axis in axes)}", source)
