"""Numbers of eight bits in float32, for readers of quantised weights."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from streammerge.tensors.dtypes import DType

if TYPE_CHECKING:
    import torch

SCALES = (DType.F32, DType.F16, DType.BF16, DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0, DType.U8)
"""Dtypes of scales. U8 holds the exponents of F8_E8M0."""
CODES = (DType.F8_E4M3, DType.F8_E5M2, DType.I8, DType.F32)
"""Dtypes that :func:`widened` takes."""
_E4M3_FACTOR = 256.0
_LARGEST_SCALE = 2.0**119


def scratch_bytes(dtype: DType, elems: int) -> int:
    """Returns the bytes of scratch that :func:`widened` needs for ``elems`` codes."""
    return 2 * elems if dtype in (DType.F8_E4M3, DType.F8_E5M2) else 0


def factor_of(dtype: DType) -> float:
    """Returns the power of two that :func:`widened` leaves out."""
    return _E4M3_FACTOR if dtype is DType.F8_E4M3 else 1.0


def widened(made: memoryview, dtype: DType, into: torch.Tensor, scratch: memoryview) -> None:
    """Puts codes into a float32 tensor, divided by :func:`factor_of`.

    An 8-bit float is shifted into the bits of a float16, whose exponent has another bias. This is ten times as fast as
    torch's own conversion. A product is faster than a shift there, and two looks for the largest code are faster than a
    comparison. NaN stays NaN.
    """
    import torch

    count = into.numel()
    if dtype is DType.F32:
        values = torch.frombuffer(made, dtype=torch.float32, count=count)
        if values.data_ptr() != into.data_ptr():
            into.copy_(values)
        return
    codes = torch.frombuffer(made, dtype=torch.int8, count=count)
    if dtype is DType.I8:
        into.copy_(codes)
        return
    halves = torch.frombuffer(scratch, dtype=torch.int16, count=count)
    halves.copy_(codes)
    if dtype is DType.F8_E5M2:
        into.copy_(halves.mul_(1 << 8).view(torch.float16))
        return
    into.copy_(halves.mul_(1 << 7).bitwise_and_(~0x4000).view(torch.float16))
    if count and (int(codes.amax()) == 0x7F or int(codes.view(torch.uint8).amax()) == 0xFF):
        low = torch.frombuffer(scratch, dtype=torch.int8, count=count)
        into.masked_fill_(torch.bitwise_and(codes, 0x7F, out=low) == 0x7F, torch.nan)


def scales_of(made: memoryview, dtype: DType) -> torch.Tensor:
    """Returns scales in float32. The tensor may share the memory of ``made``."""
    import torch

    if dtype is DType.F32:
        return torch.frombuffer(made, dtype=torch.float32)
    if dtype in (DType.F16, DType.BF16):
        return torch.frombuffer(made, dtype=dtype.torch).float()
    codes = torch.frombuffer(made, dtype=torch.uint8).int()
    return _table(DType.F8_E8M0 if dtype is DType.U8 else dtype)[codes]


def fits(scales: torch.Tensor) -> bool:
    """Whether scales may be multiplied by :func:`factor_of` without an overflow."""
    return bool((scales.abs() <= _LARGEST_SCALE).all())


@cache
def _table(dtype: DType) -> torch.Tensor:
    """Returns the number of each 8-bit code."""
    import torch

    codes = torch.arange(256, dtype=torch.int32)
    if dtype is DType.F8_E8M0:
        made = torch.ldexp(torch.ones(256, dtype=torch.float64), codes - 127).float()
        made[255] = torch.nan
        return made
    made = torch.empty(256)
    widened(memoryview(bytearray(range(256))), dtype, made, memoryview(bytearray(512)))
    return made.mul_(factor_of(dtype))
