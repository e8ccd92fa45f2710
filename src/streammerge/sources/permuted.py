"""A source in another shape, or with its axes in another order."""

from __future__ import annotations

import math
from dataclasses import replace

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Source
from streammerge.sources.box import box
from streammerge.sources.contracted import contracted
from streammerge.sources.reshaped import Reshaped, reshaped
from streammerge.sources.stored import Stored
from streammerge.sources.turned import turned
from streammerge.tensors.spec import TensorSpec


def shaped(source: Source, *shape: int) -> Source:
    """Returns the elements in another shape. One size may be -1: it follows from the others. Raises RecipeError."""
    known = math.prod(size for size in shape if size >= 0)
    whole = tuple(source.spec.numel // known if size < 0 and known else max(size, 0) for size in shape)
    if math.prod(whole) != source.spec.numel:
        raise RecipeError(f"{printable(source.spec.name)} of shape {list(source.spec.shape)} has no form {list(shape)}")
    if isinstance(source, Stored) and whole != source.spec.shape:
        return replace(source, spec=TensorSpec(source.spec.name, source.spec.dtype, whole))
    return reshaped(source.source if isinstance(source, Reshaped) else source, whole)


def permuted(source: Source, *axes: int) -> Source:
    """Returns a tensor with its axes in another order, by default a matrix transposed.

    Bytes are gathered where they lie. A computed tensor of more than two axes is held whole, so it should be small.
    """
    axes = axes or (1, 0)
    shape = source.spec.shape
    if sum(size > 1 for size in shape) < 2:  # the order of the elements stays
        return shaped(source, *(shape[axis] for axis in axes))
    if axes == (1, 0):
        return turned(source)
    made = box(source, source.spec.name, (0,) * len(shape), tuple(shape[axis] for axis in axes), axes)
    if made is not None:
        return made
    letters = "abcdefgh"[: len(shape)]
    equation = f"{letters}->{''.join(letters[axis] for axis in axes)}"
    return contracted(source.spec.name, equation, source, dtype=source.spec.dtype)
