"""The exact k-th largest number of a stream. Numerics only; no I/O.

Three searches. Numbers that are all in memory are partitioned (:func:`select`). Of a longer stream, a small sample gives a
narrow bracket for the k-th largest. One pass then counts the numbers above the bracket and collects those inside it. The
last search always works: the bits of a float, adjusted for the sign, are an integer of the same order, its *key*. A
histogram over all keys finds the bin of the k-th largest, a second one over that bin finds the place inside it, and so on
until all bits of the key are known.

numpy partitions and sorts with vector instructions (AVX-512, AVX2, NEON), which torch does not. Measured on 32,768 numbers:
10 us for a partition of integers, 20 us of floats, 300 us with two places at once, 315 us for torch's kthvalue.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    _Bits = np.ndarray[Any, np.dtype[Any]]

_BIN_BITS = 16
BINS = 1 << _BIN_BITS
_HISTOGRAM_BYTES = 8 * (BINS + 2)
_COLLECTED_BYTES = 12
"""Bytes per collected number, with its place."""
_MOST_HELD_BYTES = 32 << 20
_SIGMAS = 3.5
_FEW = 3
_MOST_COLLECTED = 0.04
_BLOCK = 8
_SORTED_ELEMS = 1 << 15
"""Numbers that are sorted at once, in whole rows: as many as stay in a CPU's own cache with their keys and places."""
_LARGEST, _ANY_NAN = 0x7FFFFFFF, 0x7F800001
"""Bits of float32: the largest of a number without a sign, and those of the first NaN."""
_FEW_OF = 32
"""Of so many numbers one may have bits that a short key lacks."""
_LOW = int(sys.byteorder == "big")
"""Which half of a 64-bit integer is the lower one."""


def sample_elems(count: int) -> int:
    """Returns the size of a sample of ``count`` numbers."""
    return min(max(count >> 8, 1 << 16), 1 << 20)


def held_bytes(count: int, searches: int) -> int:
    """Returns the most bytes that ``searches`` among ``count`` numbers hold: samples, histograms, collected numbers."""
    if not searches:
        return 0
    collected = min(2 * _COLLECTED_BYTES * max(int(count * _MOST_COLLECTED), 1 << 13) * searches, _MOST_HELD_BYTES)
    return searches * (3 * _HISTOGRAM_BYTES + 4 * min(sample_elems(count), count)) + collected


class Guess(NamedTuple):
    """Bracket for the k-th largest: it lies in [low, high], which holds this share of all numbers. ``candidates``: the
    few frequent numbers that it is one of."""

    low: float
    high: float
    share: float = 1.0
    candidates: tuple[float, ...] = ()


def affordable(guesses: Sequence[Guess], count: int) -> bool:
    """Whether the numbers to collect, out of ``count``, fit in memory at once."""
    collected = sum(guess.share for guess in guesses if not guess.candidates) * count
    return 2 * _COLLECTED_BYTES * collected <= _MOST_HELD_BYTES


def guess(sample: torch.Tensor, rank: int, count: int) -> Guess | None:
    """Estimates a narrow bracket of the ``rank``-th largest of ``count`` numbers from a sample; None if there is none."""
    import torch

    size, share = len(sample), rank / count
    margin = _SIGMAS * math.sqrt(size * share * (1 - share)) + 2
    first, last = int(size * share - margin), int(size * share + margin)
    high = float(sample.kthvalue(size - first).values) if first > 0 else math.inf
    low = float(sample.kthvalue(size - last).values) if last < size else -math.inf
    if math.isnan(high) or math.isnan(low):
        return None
    near = sample[(sample >= low) & (sample <= high)]
    if low > -math.inf and high < math.inf and len(frequent := torch.unique(near)) <= _FEW:
        return Guess(low, high, 1.0, tuple(frequent.tolist()))
    return Guess(low, high, len(near) / size) if len(near) <= max(size * _MOST_COLLECTED, 3 * margin) else None


def select(values: torch.Tensor, ranks: Sequence[int], signed: bool, scratch: torch.Tensor) -> tuple[list[Cut], bool]:
    """Returns the cuts of these ranks, each from 1 to the number of values, and whether any value is NaN.

    NaN counts as the largest number. ``scratch`` has the dtype and the size of the values. ``signed``: see
    :meth:`TensorGroup.kth_largest`.
    """
    import numpy as np

    numbers, n = values.numpy(), len(values)
    ordered = scratch.copy_(values).numpy()
    # Partitions the bits as integers if no number is negative: that takes half the time.
    keys = ordered if signed else ordered.view(np.int64 if ordered.itemsize == 8 else np.int32)
    if not signed and keys.min() < 0:  # -0, or NaN with a sign
        keys = ordered
    done = 0
    for rank in sorted(set(ranks), reverse=True):  # one place after the other: numpy is slow at several places at once
        keys[done:].partition(n - rank - done)
        done = n - rank + 1
    cuts = []
    for rank in ranks:
        largest = ordered[n - rank :]
        threshold = largest[0]
        if signed or threshold != threshold:
            cuts.append(Cut(rank, float(threshold), n))
            continue
        stop = n
        if (ordered[: n - rank] == threshold).any():
            kept = int(np.count_nonzero(largest == threshold))
            stop = int(np.flatnonzero(numbers == threshold)[kept - 1]) + 1
        cuts.append(Cut(rank, float(threshold), stop))
    return cuts, bool(np.isnan(ordered[done - 1 :].max()))


def count_above(values: torch.Tensor, limit: float, scratch: torch.Tensor) -> int:
    """Counts the numbers larger than ``limit``. NaN counts as larger."""
    import numpy as np

    return len(values) - int(np.count_nonzero(np.less_equal(values.numpy(), limit, out=_flags(scratch, len(values)))))


def places_equal(values: torch.Tensor, number: float, scratch: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns where the values equal a number, as numpy's booleans in ``scratch``."""
    import numpy as np

    flags = _flags(scratch, len(values))
    np.equal(values.numpy(), number, out=flags)
    return flags


def _flags(scratch: torch.Tensor, count: int) -> np.ndarray[Any, Any]:
    return scratch.numpy().view("?")[:count]


def inside(values: torch.Tensor, low: float, high: float, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Returns the numbers in [low, high], their places, and whether any number is NaN. Fast if they are few."""
    import torch

    # Selecting single numbers is slow. First select columns of a few numbers that have one near the bracket, or a NaN.
    columns = len(values) // _BLOCK
    table = values[: _BLOCK * columns].view(_BLOCK, columns)
    if not columns or low == -high == -math.inf:
        far = torch.zeros(columns, dtype=torch.bool)
    elif high == math.inf:
        far = table.amax(0) < low
    elif low == -math.inf:
        far = table.amin(0) > high
    else:
        distance = torch.sub(table, (low + high) / 2, out=scratch[: table.numel()].view_as(table)).abs_()
        # The middle is rounded by up to the distance of neighbouring floats.
        slack = torch.finfo(values.dtype).eps * max(abs(low), abs(high))
        far = distance.amin(0) > (high - low) * 0.51 + slack
    column = far.logical_not_().nonzero()[:, 0]
    picked = table.index_select(1, column)
    row, at = ((picked >= low) & (picked <= high)).nonzero(as_tuple=True)
    rest = values[table.numel() :]
    more = ((rest >= low) & (rest <= high)).nonzero()[:, 0]
    places = torch.cat([row * columns + column[at], more + table.numel()])
    return torch.cat([picked[row, at], rest[more]]), places, has_nan(picked) or has_nan(rest)


def has_nan(values: torch.Tensor) -> bool:
    """Whether any number is NaN. The sum says so, unless there are infinities of both signs."""
    return math.isnan(values.sum().item()) and bool(values.isnan().any())


def sort_keys(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Returns integers in the order of ``values`` (float32 or float64); NaN without a sign is the largest. ``out`` is
    an integer tensor of the same width."""
    import torch

    bits = values.view(out.dtype)
    torch.bitwise_right_shift(bits, 8 * bits.element_size() - 1, out=out)
    return out.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def histogram(keys: torch.Tensor, shift: int, low: int, scratch: torch.Tensor) -> torch.Tensor:
    """Counts the keys in each of the 65536 bins from ``low``; the bin of a key is given by its bits from ``shift`` up."""
    import torch

    # Two more bins, for keys below and above, cost less than selecting the keys inside.
    places = torch.bitwise_right_shift(keys, shift, out=scratch) if shift else keys
    # Clamp first: a subtraction could wrap around.
    least, most = max(low - 1, torch.iinfo(keys.dtype).min), min(low + BINS, torch.iinfo(keys.dtype).max)
    places = torch.clamp(places, least, most, out=scratch).sub_(least)
    first = low - least
    return torch.bincount(places, minlength=BINS + 2)[first : first + BINS]


@dataclass(slots=True, eq=False)
class Search:
    """The search for the ``rank``-th largest by histograms.

    The keys still searched are those whose bits from ``shift`` up equal ``low`` + n, with n below 65536. ``above``
    numbers are larger than all of them. ``equal`` numbers are in the bin found last.
    """

    rank: int
    bits: int
    shift: int
    low: int
    above: int = 0
    equal: int = 0

    @classmethod
    def of(cls, rank: int, bits: int) -> Search:
        """Starts a search for the ``rank``-th largest (1 is the largest) among floats of 32 or 64 bits."""
        return cls(rank, bits, bits - _BIN_BITS, -(BINS >> 1))

    def narrow(self, counts: torch.Tensor) -> None:
        """Narrows the search by the counts of this round's bins."""
        from_top = counts.flip(0).cumsum(0)
        at = int((from_top < self.rank - self.above).sum())
        self.equal = int(counts[BINS - 1 - at])
        self.above += int(from_top[at]) - self.equal
        self.low += BINS - 1 - at
        self.shift -= _BIN_BITS
        if self.shift >= 0:
            self.low <<= _BIN_BITS

    @property
    def done(self) -> bool:
        return self.shift < 0

    @property
    def threshold(self) -> float:
        """The number that was searched for; valid once ``done``."""
        import torch

        wide = self.bits == 64
        key = torch.tensor([self.low], dtype=torch.int64 if wide else torch.int32)
        return float(sort_keys(key, torch.empty_like(key)).view(torch.float64 if wide else torch.float32))


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The ``rank`` largest of a tensor's numbers: those above ``threshold``, and those equal to it with an element
    index below ``stop``. A cut may also keep ``everything``, or nothing (rank 0)."""

    rank: int
    threshold: float = float("inf")
    stop: int = 0
    everything: bool = False

    def keep(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Sets numbers outside the cut to zero, in place; ``values`` are the elements from ``start``. The cut must be
        one of magnitudes. NaN stays NaN."""
        import torch

        if self.everything:
            return values
        if math.isnan(self.threshold):  # there are at least as many NaN as the cut keeps
            return torch.hardshrink(values, math.inf, out=values)
        # hardshrink keeps numbers strictly above its limit; a limit just below the threshold also keeps the threshold
        elems, below = values.numel(), _just_below(self.threshold, values.dtype)
        edge = min(max(self.stop - start, 0), elems)
        if edge == elems:  # nearly all chunks
            return torch.hardshrink(values, below, out=values) if below >= 0 else values
        for part, limit in ((values[:edge], below), (values[edge:], self.threshold)):
            if part.numel() and limit >= 0:
                torch.hardshrink(part, limit, out=part)
        return values


def _just_below(value: float, dtype: torch.dtype) -> float:
    import numpy as np

    kind = np.float64 if dtype.itemsize == 8 else np.float32
    return float(np.nextafter(kind(value), kind(-math.inf)))


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

    rows, n, rest = values.shape
    if values.dtype != torch.float32:
        return out.copy_(table[n - 1 - row_ranks(values.abs(), 1)])
    bits, spare, made = values.numpy().view(np.int32), order.numpy().view(np.int32), keys.numpy()
    falling = table.expand(1, rest, n)
    rising = table.flip(0).expand(1, rest, n)
    for start, stop in ranges(rows, max(_SORTED_ELEMS // max(n * rest, 1), 1)):
        block = bits[start:stop].swapaxes(1, 2)
        if _sorted_short(block, made, spare):
            _scatter(out[start:stop], rising, keys)
        else:
            _sorted_long(block, made, spare)
            _scatter(out[start:stop], falling, keys)
    return out


def _scatter(out: torch.Tensor, ranked: torch.Tensor, places: torch.Tensor) -> None:
    """Puts the numbers of ranks at the places of the elements that have these ranks."""
    target = out.transpose(1, 2)
    target.scatter_(2, places[: out.numel()].view(target.shape), ranked.expand_as(target))


def _sorted_short(bits: _Bits, places: _Bits, spare: _Bits) -> bool:
    """Fills ``places`` with the places of all numbers of the rows, the smallest magnitude first, by keys of 32 bits, which
    are sorted in half the time of long ones or less. Returns whether that is possible."""
    import numpy as np

    # A key is the upper bits of a magnitude, a bit that says whether any lower bit is set, and the place from the end. In
    # differences of 16-bit numbers lower bits are seldom set. If two numbers with such bits have the same upper bits, all
    # of these few are put in order among themselves.
    count, n = bits.size, bits.shape[-1]
    width = (n - 1).bit_length()
    low = 1 << width
    if not 1 < n <= GRAIN:
        return False
    made, lower = (spare[a : a + count].reshape(bits.shape) for a in (0, count))
    np.bitwise_and(bits, np.int32(2 * low - 1), out=lower)
    few = np.flatnonzero(np.not_equal(lower, np.int32(0)))
    if len(few) > count // _FEW_OF:
        return False
    np.bitwise_and(bits, np.int32(_LARGEST & -2 * low), out=made)
    row = few // n
    upper = np.sort(row << 32 | made.reshape(-1)[few])
    made.reshape(-1)[few] |= np.int32(low)
    np.bitwise_or(made, _places_from_the_end(n), out=made)
    made.sort(axis=-1)
    if (made[..., -1] >= (_ANY_NAN - 1 | low)).any():
        return False
    if (upper[1:] == upper[:-1]).any():
        there = np.flatnonzero(np.not_equal(np.bitwise_and(made, np.int32(low), out=lower), np.int32(0)))
        magnitude = np.bitwise_and(bits.reshape(-1)[few], np.int32(_LARGEST)).astype(np.int64)
        among = np.sort(row << 31 + width | magnitude << width | n - 1 - few % n)
        made.reshape(-1)[there] = among & low - 1
    np.bitwise_and(made, np.int32(low - 1), out=made)
    np.subtract(np.int32(n - 1), made, out=places[:count].reshape(bits.shape))
    return True


def _sorted_long(bits: _Bits, places: _Bits, spare: _Bits) -> None:
    """Fills ``places`` with the places of any numbers, the largest magnitude first."""
    import numpy as np

    # A key is a magnitude, from the largest to the smallest, with the place below it. Sorting the keys as integers keeps
    # the order of equal numbers, and numpy does it 80 times as fast as torch sorts floats with their places.
    made = places[: bits.size].reshape(bits.shape)
    halves = made.view(np.int32).reshape(*bits.shape, 2)
    low, high = halves[..., _LOW], halves[..., 1 - _LOW]
    small = spare[: bits.size].reshape(bits.shape)
    np.bitwise_or(bits, np.int32(-(1 << 31)), out=small)
    np.invert(small, out=high)
    low[...] = _places(bits.shape[-1])
    made.sort(axis=-1)
    if (high[..., 0] < _LARGEST - _ANY_NAN).any():  # the first of a row is the largest: NaN of all kinds are equal
        np.maximum(high, np.int32(_LARGEST - _ANY_NAN), out=high)
        made.sort(axis=-1)
    np.bitwise_and(made, 0xFFFFFFFF, out=made)


def _places(n: int) -> np.ndarray[Any, Any]:
    """Returns the places of a row of ``n`` numbers. Those of short rows are made once."""
    import numpy as np

    return _short_places()[:n] if n <= GRAIN else np.arange(n, dtype=np.int32)


@lru_cache(maxsize=8)
def _places_from_the_end(n: int) -> np.ndarray[Any, Any]:
    """Returns the places of a row of ``n`` numbers, up to a grain, counted from its end."""
    import numpy as np

    return np.arange(n - 1, -1, -1, dtype=np.int32)


@lru_cache(maxsize=1)
def _short_places() -> np.ndarray[Any, Any]:
    import numpy as np

    return np.arange(GRAIN, dtype=np.int32)
