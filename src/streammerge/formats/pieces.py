"""Tensors that several ranks wrote in pieces: a piece is a box of the tensor, and the pieces must cover it exactly once.

The pieces become one source: joined along the last axis on which they can be cut apart, and so on within each part. So a
piece is a range in each row of a part, and only joins along a later axis need memory of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.errors import FormatError, printable
from streammerge.sources.base import Source
from streammerge.sources.joined import joined
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

PIECE_BYTES = 300
"""Memory of one piece: its source, its specification, its place in a tuple. 240 were measured."""
_MOST_AXES = 64
_MOST_ELEMENTS = 1 << 60
_DEEPEST = 8
"""How often pieces are cut apart along one axis or another. Ranks in a grid need one cut for each axis."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and sizes of a piece, on each axis of the full tensor."""


@dataclass(frozen=True, slots=True)
class PieceOf:
    """One piece: where it begins in the full tensor, and its elements in C order."""

    offsets: tuple[int, ...]
    source: Source

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.source.spec.shape


def checked_shape(shape: tuple[int, ...], what: str) -> tuple[int, ...]:
    """Returns a shape. Raises FormatError for one that no tensor can have."""
    if len(shape) > _MOST_AXES or math.prod(n for n in shape if n) >= _MOST_ELEMENTS:
        raise FormatError(f"{what} claims the shape {printable(list(shape))}, whose size overflows; the file is damaged")
    return shape


def check_boxes(boxes: Sequence[Box], shape: tuple[int, ...], what: str) -> None:
    """Raises FormatError unless each box lies inside the tensor, and all of them have as many elements as the tensor.

    Boxes that overlap are found when they are joined. Boxes without elements may lie anywhere inside.
    """
    total = 0
    for offsets, sizes in boxes:
        inside = len(offsets) == len(sizes) == len(shape)
        if not inside or any(at + n > length for at, n, length in zip(offsets, sizes, shape, strict=True)):
            raise FormatError(
                f"{what} has a part of {list(sizes)} at {list(offsets)}, which lies outside its shape {list(shape)}; "
                "the file is damaged"
            )
        total += math.prod(sizes)
    wanted = math.prod(shape)
    if total < wanted:
        raise FormatError(
            f"{what} has a hole: its parts hold {total} of {wanted} elements; the part of a rank is missing, so copy the "
            "files of all ranks"
        )
    if total > wanted:
        raise FormatError(f"{what} has parts that overlap: they hold {total} elements where it has {wanted}")


def assembled(spec: TensorSpec, pieces: Sequence[PieceOf], nowhere: Location, what: str) -> Source:
    """Returns the full tensor as one source.

    ``pieces``: checked by :func:`check_boxes`; those without elements are left out. ``nowhere``: a file that a tensor
    without elements is said to lie in. Raises FormatError for pieces that overlap or cannot be cut apart.
    """
    pieces = [piece for piece in pieces if piece.source.spec.numel]
    if not pieces:
        return Stored(spec, nowhere, 0)
    return _joined(spec.name, pieces, ((0,) * len(spec.shape), spec.shape), what, 0).named(spec.name)


def _joined(name: str, pieces: Sequence[PieceOf], box: Box, what: str, depth: int) -> Source:
    """Returns the pieces of a box as one source. Each piece lies inside the box."""
    if len(pieces) == 1:
        if (pieces[0].offsets, pieces[0].sizes) != box:
            raise FormatError(f"{what} has parts that overlap, so another part of it is missing; the file is damaged")
        return pieces[0].source
    offsets, sizes = box
    for axis in reversed(range(len(sizes)) if depth < _DEEPEST else ()):
        parts = _cut(pieces, axis)
        if len(parts) == 1:
            continue
        made, at = [], offsets[axis]
        for begin, end, members in parts:
            if begin != at:
                raise FormatError(f"{what} has a hole: no part begins at {at} on axis {axis}; the file is damaged")
            inner = (_with(offsets, axis, begin), _with(sizes, axis, end - begin))
            made.append(_joined(name, members, inner, what, depth + 1))
            at = end
        if at != offsets[axis] + sizes[axis]:
            raise FormatError(f"{what} has a hole: its parts end at {at} on axis {axis}; the file is damaged")
        return joined(name, made, axis)
    raise FormatError(f"{what} has parts that overlap, or that lie across each other; such a layout is not read")


def _cut(pieces: Sequence[PieceOf], axis: int) -> list[tuple[int, int, list[PieceOf]]]:
    """Returns (begin, end, pieces) of the parts into which the pieces can be cut along an axis."""
    parts: list[tuple[int, int, list[PieceOf]]] = []
    for piece in sorted(pieces, key=lambda each: each.offsets[axis]):
        begin, end = piece.offsets[axis], piece.offsets[axis] + piece.sizes[axis]
        if parts and begin < parts[-1][1]:
            first, last, members = parts[-1]
            members.append(piece)
            parts[-1] = (first, max(last, end), members)
        else:
            parts.append((begin, end, [piece]))
    return parts


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def piece_of_dtype(source: Source, dtype: DType, sizes: tuple[int, ...], what: str) -> Source:
    """Returns the source of a piece. Raises FormatError if it has another dtype or shape than it should."""
    if source.spec.dtype != dtype or source.spec.shape != sizes:
        raise FormatError(
            f"{what} has a part of {source.spec.dtype} {list(source.spec.shape)}, where {dtype} {list(sizes)} is "
            "announced; the file is damaged"
        )
    return source
