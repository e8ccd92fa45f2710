"""A box of a tensor's elements, with its axes in any order: a block, one expert of many, a transposed matrix.

A box of strided bytes is strided bytes, so no new reader is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streammerge.sources.base import Source
from streammerge.sources.deflated import Deflated, of_bytes
from streammerge.sources.memory import Memory
from streammerge.sources.stored import Stored
from streammerge.sources.strided import Strided
from streammerge.tensors.spec import TensorSpec, contiguous_strides


def box(source: Source, name: str, start: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> Source | None:
    """Returns the elements of a source from ``start`` on, as a tensor of this shape.

    Axis k of the result is axis ``axes[k]`` of the source. The other axes of the source have one element in the box, and
    are left out. Returns None for a source that is no view of bytes or of memory.
    """
    spec = TensorSpec(name, source.spec.dtype, tuple(shape))
    if isinstance(source, Memory):
        return Memory(spec, _in_memory(source, start, shape, axes), source.label)
    if isinstance(source, Deflated):
        within = box(source.within, name, start, shape, axes)
        return replace(source, spec=spec, within=within) if isinstance(within, Stored | Strided) else None
    if not isinstance(source, Stored | Strided):
        return None
    strides = source.strides if isinstance(source, Strided) else contiguous_strides(source.spec.shape)
    first = sum(begin * stride for begin, stride in zip(start, strides, strict=True))
    offset = source.offset + first * spec.dtype.element_bytes
    lazy = source.lazy if isinstance(source, Strided) else ""
    return of_bytes(spec, source.path, offset, tuple(strides[axis] for axis in axes), lazy=lazy)


def _in_memory(source: Memory, start: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> object:
    sizes = dict(zip(axes, shape, strict=True))
    picked = source.values[
        tuple(slice(begin, begin + sizes[axis]) if axis in sizes else begin for axis, begin in enumerate(start))
    ]
    left = sorted(axes)
    order = [left.index(axis) for axis in axes]
    return picked.permute(order) if hasattr(picked, "permute") else picked.transpose(order)
