"""8-bit numbers with scales: DeepSeek's fp8 in blocks, fp8 and int8 by rows or by tensor, with names as programs give them.

``weight_scale_inv`` multiplies, in spite of its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from streammerge.checkpoints.index import QuantisedWeight
from streammerge.errors import printable
from streammerge.quantised.stored import Found, StoredTensors, block_of, pair_of
from streammerge.sources.base import Source
from streammerge.sources.narrow import SCALES
from streammerge.sources.scaled import scaled
from streammerge.sources.unpacked import unpacked
from streammerge.tensors.dtypes import DType

CODES = (DType.F8_E4M3, DType.F8_E5M2, DType.I8)
_ENDS = (
    ("_scale_inv", "{}"),
    ("_scale", "{}"),
    (".qscale_weight", "{}.weight"),
    (".scale", "{}.weight"),
    (".scale_weight", "{}.weight"),
)
"""The end of a scale's name -> the name of the codes."""
_NEEDED = ("_scale_inv", "_scale")
"""Where one weight has such a scale, all have. In ComfyUI's older form, a weight without a scale has the scale 1."""


def scaled_numbers(stored: StoredTensors) -> Iterator[Found]:
    """Yields 8-bit weights with scales beside them. Raises MismatchError for scales that do not fit, or are absent."""
    taken, taken_end = set[str](), ""
    for end, form in _ENDS:
        for stem in stored.by_end.get(end, ()):
            name = form.format(stem)
            codes, scales = stored.get(name), stored.entries[stem + end]
            if codes is None or codes.spec.dtype not in CODES or scales.spec.dtype not in SCALES:
                continue
            if len(codes.spec.shape) < 1 or codes.spec.shape == scales.spec.shape != (1,):
                continue  # a norm of 8-bit numbers
            if codes.spec.dtype is DType.I8 and scales.spec.dtype not in SCALES[:3]:
                if scales.spec.dtype is DType.F8_E8M0:
                    yield _of_four_bits(name, codes, scales)
                continue
            if codes.spec.dtype is DType.I8 and end == ".scale":
                continue  # a name of many meanings
            taken.add(name)
            if codes.spec.dtype in CODES[:2] and end in _NEEDED:
                taken_end = end
            yield _found(stored, name, codes, scales, stored.get(f"{name}_zero_point"))
    if taken_end:
        _refuse_without_scale(stored, taken, taken_end)


def _found(stored: StoredTensors, name: str, codes: Source, scales: Source, zeros: Source | None) -> Found:
    block = _block(stored, name, codes, scales)
    made = scaled(name, codes, scales, block, zeros=zeros)
    kind = "int8" if codes.spec.dtype is DType.I8 else "fp8"
    if scales.spec.numel == 1:
        how = "one scale for each tensor"
    elif made.block == (1, made.columns):
        how = "a scale for each row"
    else:
        how = f"a scale for each block of {block[0]} x {block[1]}"
    helpers = [each.spec.name for each in (scales, zeros) if each is not None]
    return Found(name, QuantisedWeight(made, (name, *helpers), f"{kind}, {how}"))


def _of_four_bits(name: str, codes: Source, scales: Source) -> Found:
    """Returns DeepSeek's 4-bit floats, two in each int8, with a power of two for each 32."""
    shape = (*codes.spec.shape[:-1], 2 * codes.spec.shape[-1])
    made = scaled(name, unpacked(name, codes, shape, 4, floats=True), scales, (1, 32))
    return Found(name, QuantisedWeight(made, (name, scales.spec.name), "fp4, a scale for each 32 numbers"))


def _block(stored: StoredTensors, name: str, codes: Source, scales: Source) -> tuple[int, int]:
    """Returns the rows and columns that share a scale."""
    shape, grid = codes.spec.shape, scales.spec.shape
    columns, rows = shape[-1], shape[-2] if len(shape) > 1 else 1
    if scales.spec.numel == 1 or not codes.spec.numel:
        return max(rows, 1), max(columns, 1)
    if grid in ((*shape[:-1], 1), shape[:-1]):  # a scale for each row
        return 1, columns
    stated = pair_of(stored.config.get("weight_block_size"))
    if stated == (None, None):
        stated = _structure(stored.config, rows, columns, grid)
    if len(grid) != len(shape) or len(grid) < 2 or grid[:-2] != shape[:-2]:
        raise stored.wrong(name, f"of shape {list(shape)} has scales of shape {list(grid)}, which do not fit it")
    height, width = block_of(rows, grid[-2], stated[0]), block_of(columns, grid[-1], stated[1])
    if height is None or width is None:
        raise stored.wrong(
            name,
            f"of shape {list(shape)} has scales of shape {list(grid)}, and its configuration states no blocks that fit",
        )
    return height, width


def _structure(config: Any, rows: int, columns: int, grid: tuple[int, ...]) -> tuple[int | None, int | None]:
    """Returns the block that a configuration of compressed-tensors states, if it fits: groups may have different ones."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        height, width = pair_of(weights.get("block_structure")) if isinstance(weights, dict) else (None, None)
        if height and width and min(height, width) > 0 and grid[-2:] == (-(-rows // height), -(-columns // width)):
            return height, width
    return None, None


def _refuse_without_scale(stored: StoredTensors, taken: AbstractSet[str], end: str) -> None:
    """Raises MismatchError for a matrix of 8-bit floats without a scale, whose codes would be taken for its numbers.

    ``taken``: the weights with a scale beside them, whose name ends in ``end``.
    """
    for name, spec in stored.specs.items():
        if spec.dtype in CODES[:2] and len(spec.shape) > 1 and spec.numel and name not in taken:
            raise stored.wrong(
                name,
                f"has no {printable(name + end)}, as others have; copy the file that holds it too, or give the weights "
                "that were quantised",
            )
