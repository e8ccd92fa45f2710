"""Weights of few bits that lie packed: compressed-tensors (integers, nvfp4, mxfp4) and NVIDIA's modelopt (nvfp4).

A scale of the whole tensor divides in compressed-tensors (``weight_global_scale``) and multiplies in modelopt
(``weight_scale_2``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.checkpoints.index import QuantisedWeight
from streammerge.errors import listed, printable
from streammerge.quantised.stored import Found, StoredTensors
from streammerge.sources.base import Source
from streammerge.sources.deflated import Damaged, read_small
from streammerge.sources.scaled import scaled
from streammerge.sources.unpacked import unpacked, unpacked_down
from streammerge.tensors.dtypes import DType

_NIBBLES = (DType.U8, DType.F4)


def packed_numbers(stored: StoredTensors) -> Iterator[Found]:
    """Yields packed weights with scales beside them. Raises MismatchError for helpers that do not fit."""
    for name in stored.by_end.get("_packed", ()):
        codes, scales = stored.entries[f"{name}_packed"], stored.get(f"{name}_scale")
        if scales is None:
            continue
        if codes.spec.dtype is DType.I32:
            yield _of_integers(stored, name, codes, scales)
        elif codes.spec.dtype in _NIBBLES and scales.spec.dtype in (DType.F8_E4M3, DType.U8, DType.F8_E8M0):
            yield _of_floats(stored, name, codes, scales, "_packed", "_global_scale", divides=True)
    for name in stored.by_end.get("_scale_2", ()):
        nibbles, scales = stored.get(name), stored.get(f"{name}_scale")
        if nibbles is not None and scales is not None and nibbles.spec.dtype in _NIBBLES:
            yield _of_floats(stored, name, nibbles, scales, "", "_scale_2", divides=False)


def _of_floats(
    stored: StoredTensors, name: str, codes: Source, scales: Source, end: str, whole_end: str, *, divides: bool
) -> Found:
    """Returns 4-bit floats with a scale for each 16 or 32 of them."""
    if not codes.spec.shape or not scales.spec.shape:
        raise stored.wrong(name, "has no dimensions")
    shape = (*codes.spec.shape[:-1], 2 * codes.spec.shape[-1])
    kind, width = ("nvfp4", 16) if scales.spec.dtype is DType.F8_E4M3 else ("mxfp4", 32)
    whole = stored.get(name + whole_end)
    if whole is None and kind == "nvfp4":
        raise stored.wrong(
            name, f"has no {printable(name + whole_end)}, by which nvfp4 is scaled; copy the file that holds it, too"
        )
    numbers = unpacked(name, codes, shape, 4, floats=True)
    made = scaled(name, numbers, scales, (1, width), whole=whole, divides=divides)
    parts = [f"{name}{end}", f"{name}_scale", *([name + whole_end] if whole is not None else [])]
    parts += [f"{name}_shape"] if stored.get(f"{name}_shape") is not None else []
    return Found(name, QuantisedWeight(made, tuple(parts), f"{kind}, a scale for each {width} numbers"))


def _of_integers(stored: StoredTensors, name: str, codes: Source, scales: Source) -> Found:
    """Returns packed integers with a scale for each group of columns, row or tensor."""
    ends = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    parts = tuple(name + end for end in ends if stored.get(name + end) is not None)
    groups, packed_zeros = stored.get(f"{name}_g_idx"), stored.get(f"{name}_zero_point")
    bits, columns = _form(stored, name, codes, scales)
    _refuse_other_groups(stored, name, bits, columns, scales, groups)
    shape = (*codes.spec.shape[:-1], columns)
    numbers = unpacked(name, codes, shape, bits)
    count = scales.spec.shape[-1] if len(scales.spec.shape) > 1 else 1
    zeros: Source | None = packed_zeros
    if packed_zeros is not None and packed_zeros.spec.dtype is DType.I32 and len(shape) == 2:
        zeros = unpacked_down(name, packed_zeros, (shape[0], count), bits)
    width = -(-columns // max(count, 1))
    made = scaled(name, numbers, scales, (1, width), zeros=zeros, groups=groups)
    how = "a scale for each row" if count == 1 else f"a scale for each {width} numbers"
    return Found(name, QuantisedWeight(made, parts, f"int{bits} in packs, {how}"))


def _form(stored: StoredTensors, name: str, codes: Source, scales: Source) -> tuple[int, int]:
    """Returns the bits of each integer, and the columns of the weight."""
    if len(codes.spec.shape) < 2:
        raise stored.wrong(name, f"of shape {list(codes.spec.shape)} is no pack of a matrix")
    words, count = codes.spec.shape[-1], scales.spec.shape[-1] if len(scales.spec.shape) > 1 else 1
    stated = [each for each in _stated(stored.config) if each[0]]
    for bits, group in stated:
        if count > 1 and group and -(-count * group * bits // 32) == words:
            return bits, count * group
    shape = stored.get(f"{name}_shape")
    if shape is not None and shape.spec.dtype is DType.I64 and shape.spec.numel == len(codes.spec.shape):
        try:
            sizes = struct.unpack(f"<{shape.spec.numel}q", read_small(shape))
        except Damaged as error:
            raise stored.wrong(name, f"has a weight_shape that cannot be read ({error})") from error
        if tuple(sizes[:-1]) == codes.spec.shape[:-1] and 0 < sizes[-1] <= 32 * words:
            known = [bits for bits, _ in stated] or list(range(1, 9))
            dense = [bits for bits in known if words == -(-sizes[-1] * bits // 32)]
            loose = [bits for bits in known if words == -(-sizes[-1] // (32 // bits))]
            if dense or loose:
                return (dense or loose)[0], sizes[-1]
        raise stored.wrong(
            name, f"of shape {list(codes.spec.shape)} is no pack of shape {list(sizes)}, which its helper states"
        )
    raise stored.wrong(name, "is a pack, and neither its configuration nor weight_shape tells its bits and columns")


def _refuse_other_groups(
    stored: StoredTensors, name: str, bits: int, columns: int, scales: Source, groups: Source | None
) -> None:
    """Raises MismatchError if a row has more scales than one, and not as many as any group of the configuration has."""
    count = scales.spec.shape[-1] if len(scales.spec.shape) > 1 else 1
    sizes = [size for known, size in _stated(stored.config) if known == bits]
    if count > 1 and groups is None and sizes and all(sizes) and all(-(-columns // size) != count for size in sizes):
        raise stored.wrong(
            name,
            f"of {columns} columns has {count} scales in a row, and its configuration states groups of "
            f"{listed([str(size) for size in dict.fromkeys(sizes)])}",
        )


def _stated(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields the bits of each group of modules in a configuration, and the size of its groups of columns; 0 for none."""
    groups = config.get("config_groups")
    for each in groups.values() if isinstance(groups, dict) else ():
        weights = each.get("weights") if isinstance(each, dict) else None
        if isinstance(weights, dict):
            bits, size = weights.get("num_bits"), weights.get("group_size")
            yield (
                bits if type(bits) is int and 1 <= bits <= 8 else 0,
                size if type(size) is int and size > 0 else 0,
            )
