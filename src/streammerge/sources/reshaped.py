"""A source under another shape with as many elements, in the same order."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Reshaped(Source):
    """The elements of ``source`` in the shape of ``spec``. :func:`reshaped` makes it."""

    spec: TensorSpec
    source: Source

    def needs(self) -> Needs:
        return self.source.needs()

    def open(self, room: Room) -> Reader:
        return self.source.open(room)


def reshaped(source: Source, shape: tuple[int, ...]) -> Source:
    """Returns a source with another shape. Raises ValueError if the shape has another number of elements."""
    spec = TensorSpec(source.spec.name, source.spec.dtype, shape)
    if spec.numel != source.spec.numel:
        raise ValueError(f"{list(shape)} has not as many elements as {list(source.spec.shape)}")
    return source if source.spec.shape == shape else Reshaped(spec, source)
