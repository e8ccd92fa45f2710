"""Ranks of numbers within rows, by sorting integers. Numerics only; no I/O.

numpy sorts integers with vector instructions (AVX-512, AVX2, NEON). A key is a magnitude, counted from above, with the
place below it. So sorted keys have the places of all numbers, the largest first, and among equal ones the first. Keys of
32 bits are sorted in half the time of longer ones. They have room for most differences of 16-bit numbers: for the leading
bits, or for a multiple of a step that all have in common.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    _Bits = np.ndarray[Any, np.dtype[Any]]

_SORTED_ELEMS = 1 << 15
"""Numbers that are sorted at once, in whole rows: as many as stay in a CPU's own cache with their keys and places."""
_LARGEST, _INFINITE = 0x7FFFFFFF, 0x7F800000
"""Bits of float32: the largest of a number without a sign, and those of infinity. Larger ones are NaN."""
_FEW_OF = 32
"""Of so many numbers one may have bits that a short key lacks."""
_MOST_LEADING = 11
"""Bits of a place beside which a short key holds the leading bits of nearly all differences of bfloat16 numbers."""
_MOST_IN_STEPS = 2.0**100
"""Larger numbers are no multiples of a step for short keys."""
_LEAST_EXPONENT = -149
"""That of the smallest number of float32."""
_LOW = int(sys.byteorder == "big")
"""Which half of a 64-bit integer is the lower one."""


def row_ranks(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the rank of each number along ``dim``, 0 for the smallest. Among equal numbers the first ranks higher."""
    import torch

    if values.dtype == torch.float32 and not bool((values < 0).any()):
        fibres = values.contiguous().view(math.prod(values.shape[:dim]), values.shape[dim], -1)
        keys, order = (torch.empty(values.numel(), dtype=torch.int64) for _ in range(2))
        table, out = torch.arange(values.shape[dim]).flip(0), torch.empty(fibres.shape, dtype=torch.int64)
        by_rank(fibres, table, out, keys, order)
        return out.view(values.shape)
    order = values.argsort(dim=dim, descending=True, stable=True)
    count = values.shape[dim]
    places = torch.arange(count - 1, -1, -1).view([count if d == dim else 1 for d in range(values.dim())])
    return torch.empty_like(order).scatter_(dim, order, places.expand_as(order))


def by_rank(
    values: torch.Tensor, table: torch.Tensor, out: torch.Tensor, keys: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Fills ``out`` with the number from ``table`` that the rank of each value's magnitude selects.

    ``values`` (float32 or float64) and ``out`` have the shape (rows, n, rest); ranks are along n, as of :func:`row_ranks`.
    ``table`` has n numbers, that of the largest magnitude first. ``keys`` and ``order`` are int64 of the values' size.
    """
    import numpy as np
    import torch

    n, rest = values.shape[1:]
    if values.dtype != torch.float32:
        return out.copy_(table[n - 1 - row_ranks(values.abs(), 1)])
    if not out.numel():
        return out
    most = max(_SORTED_ELEMS // (n * rest), 1)
    bits = values.numpy().view(np.uint32).swapaxes(1, 2)
    places, spare = keys.numpy(), order.numpy().view(np.uint32)
    targets = out.transpose(1, 2)
    index = keys[: targets[:most].numel()].view(targets[:most].shape)
    ranked = table.expand_as(index)
    for start, stop in ranges(len(bits), most):
        _sort(bits[start:stop], places, spare)
        if stop - start < most and start:  # the last; a view takes torch a microsecond or two
            index, ranked = index[: stop - start], ranked[: stop - start]
        targets[start:stop].scatter_(2, index, ranked)
    return out


def _sort(bits: _Bits, places: _Bits, spare: _Bits) -> None:
    """Fills ``places`` with the places of all numbers of the rows, the largest magnitude first."""
    if not _sorted_short(bits, places, spare):
        _sorted_long(bits, places, spare)


def _sorted_short(bits: _Bits, places: _Bits, spare: _Bits) -> bool:
    """Does it with keys of 32 bits. Returns whether that is possible."""
    import numpy as np

    # Between the part of the magnitude and the place is a bit that is 0 only for the few numbers of which this part lacks
    # something: they come before all numbers that are equal to it. Those of them that have the same part are put in order
    # among themselves.
    count, n = bits.size, bits.shape[-1]
    width = (n - 1).bit_length()
    if not 1 < n <= GRAIN:
        return False
    made, room = (spare[a : a + count].reshape(bits.shape) for a in (0, count))
    few = _leading_bits(bits, width, made, room, places) if width <= _MOST_LEADING else None
    if few is None:
        few = _multiples(bits, width, made, room, places)
    if few is None:
        return False
    among = None
    if len(few) > 1:
        part = made.reshape(-1)[few] >> _word(width)
        part.sort()
        if (part[1:] == part[:-1]).any():  # maybe those of different rows
            row, at = few // n, few % n
            magnitude = (bits.reshape(-1)[few] & _word(_LARGEST)).astype(np.int64)
            among = np.sort(row << 31 + width | _LARGEST - magnitude << width | at) & (1 << width) - 1
    made.sort(axis=-1)
    if among is not None:
        there = np.equal(np.bitwise_and(made, _word(1 << width), out=room), 0).reshape(-1).nonzero()[0]
        made.reshape(-1)[there] = among
    places[:count].reshape(bits.shape)[...] = np.bitwise_and(made, _word((1 << width) - 1), out=made)
    return True


def _leading_bits(bits: _Bits, width: int, made: _Bits, room: _Bits, places: _Bits) -> _Bits | None:
    """Fills ``made`` with keys of the leading bits of magnitudes. Returns which numbers have more bits; None if these are
    many, or if any number is infinite or NaN. ``places`` is only room here."""
    import numpy as np

    rest, flags = (2 << width) - 1, places.view(bool)[: bits.size].reshape(bits.shape)
    np.not_equal(np.bitwise_and(bits, _word(rest), out=room), _word(0), out=flags)
    few = _few(flags)
    if few is None:
        return None
    np.bitwise_and(bits, _word(_LARGEST - rest), out=made)
    if made.max() >= _INFINITE:
        return None
    np.bitwise_xor(made, _places_below(bits.shape[-1], _LARGEST - rest | 1 << width), out=made)
    if len(few):
        made.reshape(-1)[few] ^= _word(1 << width)
    return few


def _multiples(bits: _Bits, width: int, made: _Bits, room: _Bits, places: _Bits) -> _Bits | None:
    """Fills ``made`` with keys of magnitudes as multiples of a step. Returns which numbers lie between two multiples; None
    if these are many, or if any number is NaN or very large. ``places`` is only room here."""
    import numpy as np

    count, held = bits.size, min(31 - width, 23)  # bits of a multiple
    magnitudes = places.view(np.uint32)[:count].reshape(bits.shape)
    np.bitwise_and(bits, _word(_LARGEST), out=magnitudes)
    largest = float(magnitudes.max().view(np.float32))
    if not largest < _MOST_IN_STEPS:
        return None
    # Subtracting from a number at the end of a power of two makes multiples of the step there of the bits.
    step = math.ldexp(1.0, max(math.frexp(largest)[1] - held, _LEAST_EXPONENT))
    end = np.array(step * ((1 << 24) - 1), np.float32)
    np.subtract(end, magnitudes.view(np.float32), out=made.view(np.float32))
    back, flags = room.view(np.float32), places.view(bool)[4 * count : 5 * count].reshape(bits.shape)
    np.subtract(end, made.view(np.float32), out=back)
    np.not_equal(room, magnitudes, out=flags)
    few = _few(flags)
    if few is None:
        return None
    np.left_shift(made, _word(width + 1), out=made)
    np.bitwise_or(made, _places_below(bits.shape[-1], 1 << width), out=made)
    if len(few):
        below = (magnitudes.reshape(-1)[few].view(np.float32) / step).astype(np.int64)
        made.reshape(-1)[few] = (int(end.view(np.uint32)) - below << width + 1) & 0xFFFFFFFF | few % bits.shape[-1]
    return few


def _few(flags: _Bits) -> _Bits | None:
    """Returns the places of the true values, None if these are many."""
    import numpy as np

    number = np.count_nonzero(flags)
    if number > flags.size // _FEW_OF:
        return None
    return flags.reshape(-1).nonzero()[0] if number else _none()


def _sorted_long(bits: _Bits, places: _Bits, spare: _Bits) -> None:
    """Does it for any numbers, with keys of 64 bits."""
    import numpy as np

    made = places[: bits.size].reshape(bits.shape)
    halves = made.view(np.uint32).reshape(*bits.shape, 2)
    low, high = halves[..., _LOW], halves[..., 1 - _LOW]
    small = spare[: bits.size].reshape(bits.shape)
    np.bitwise_and(bits, _word(_LARGEST), out=small)
    np.minimum(small, _word(_INFINITE + 1), out=small)  # NaN of all kinds are equal
    np.subtract(_word(_LARGEST), small, out=high)
    low[...] = _places(bits.shape[-1])
    made.sort(axis=-1)
    np.bitwise_and(made, 0xFFFFFFFF, out=made)


def _places(n: int) -> _Bits:
    """Returns the places of a row of ``n`` numbers. Those of short rows are made once."""
    import numpy as np

    return _places_below(n, 0) if n <= GRAIN else np.arange(n, dtype=np.uint32)


@lru_cache(maxsize=16)
def _places_below(n: int, upper: int) -> _Bits:
    """Returns the places of a row of ``n`` numbers, up to a grain, below the bits ``upper``."""
    import numpy as np

    places: _Bits = np.arange(n, dtype=np.uint32) | np.uint32(upper)
    return places


@lru_cache(maxsize=64)
def _word(value: int) -> _Bits:
    """Returns a number as numpy takes it fastest beside an array."""
    import numpy as np

    return np.array(value, dtype=np.uint32)


@lru_cache(maxsize=1)
def _none() -> _Bits:
    import numpy as np

    return np.empty(0, np.int64)
