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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
_INFINITE = {4: 0x7F800000, 8: 0x7FF0000000000000}
"""Bits of infinity, by the bytes of a number. Larger ones are NaN."""
_LISTED = 1 << 12
"""Truth values whose places are listed at once."""


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


def guess(ordered: torch.Tensor, rank: int, count: int) -> Guess | None:
    """Estimates a narrow bracket of the ``rank``-th largest of ``count`` numbers from a sample; None if there is none.
    ``ordered``: the sample, the smallest number first."""
    import numpy as np

    sample = ordered.numpy()
    size, share = len(sample), rank / count
    margin = _SIGMAS * math.sqrt(size * share * (1 - share)) + 2
    first, last = int(size * share - margin), int(size * share + margin)
    high = sample[size - first - 1].item() if first > 0 else math.inf
    low = sample[size - last - 1].item() if last < size else -math.inf
    if math.isnan(high) or math.isnan(low):
        return None
    kind = sample.dtype.type  # else all of the sample would be converted
    begin, end = int(sample.searchsorted(kind(low))), int(sample.searchsorted(kind(high), "right"))
    near = sample[begin:end]
    if low > -math.inf and high < math.inf and len(frequent := np.unique(near)) <= _FEW:
        return Guess(low, high, 1.0, tuple(frequent.tolist()))
    return Guess(low, high, len(near) / size) if len(near) <= max(size * _MOST_COLLECTED, 3 * margin) else None


def select(values: torch.Tensor, ranks: Sequence[int], signed: bool, scratch: torch.Tensor) -> tuple[list[Cut], bool]:
    """Returns the cuts of these ranks, each from 1 to the number of values, and whether any value is NaN.

    NaN counts as the largest number. ``scratch`` has the dtype and the size of the values. ``signed``: see
    :meth:`TensorGroup.kth_largest`.
    """
    (cuts,), nan = select_rows(values.view(1, -1), [ranks], signed, scratch)
    return cuts, nan


def select_rows(
    values: torch.Tensor, ranks: Sequence[Sequence[int]], signed: bool, scratch: torch.Tensor
) -> tuple[list[list[Cut]], bool]:
    """Does what :func:`select` does for each row. ``ranks`` are those of each row, ``scratch`` has the size of all rows."""
    import numpy as np

    numbers, n = values.numpy(), values.shape[1]
    ordered = scratch.view(values.shape).copy_(values).numpy()
    size = ordered.itemsize
    # Partitions the bits as integers if no number is negative: that takes half the time.
    plain = not signed and ordered.view(f"u{size}").max() <= _INFINITE[size]  # else there is NaN, or -0
    if plain:
        numbers, ordered = numbers.view(f"i{size}"), ordered.view(f"i{size}")
    flags, cuts = np.empty(n, bool), []
    for row, keys, wanted in zip(numbers, ordered, ranks, strict=True):
        _partition(keys, sorted(set(wanted), reverse=True))
        cuts.append([_cut(row, keys[n - rank :], signed, flags) for rank in wanted])
    return cuts, not plain and bool(np.isnan(values.numpy().max()))


def _partition(keys: _Bits, ranks: Sequence[int]) -> None:
    """Puts the number of each rank into its place, all larger ones behind it. The ranks fall."""
    done, n = 0, len(keys)
    for rank in ranks:  # one place after the other: numpy is slow at several at once
        keys[done:].partition(n - rank - done)
        done = n - rank + 1


def _cut(numbers: _Bits, largest: _Bits, signed: bool, flags: _Bits) -> Cut:
    """Returns the cut of the ``largest`` numbers. See :func:`_split`."""
    threshold = largest[:1].view(f"f{largest.itemsize}").item()
    if signed or threshold != threshold:
        return Cut(len(largest), threshold, len(numbers))
    return Cut(len(largest), threshold, _split(numbers, largest, flags))


def _split(numbers: _Bits, largest: _Bits, flags: _Bits) -> int:
    """Returns the place before which the first of the ``largest`` numbers belongs to them; equal ones behind it do not.

    All may be the bits of magnitudes. ``flags``: room for a truth value of each number.
    """
    import numpy as np

    key = largest[:1]
    kept = int(np.count_nonzero(np.equal(largest, key, out=flags[: len(largest)])))
    np.equal(numbers, key, out=flags)
    return len(numbers) if np.count_nonzero(flags) == kept else _place_of(flags, kept) + 1


def keep_rows(values: torch.Tensor, ranks: Sequence[tuple[int, int]], room: torch.Tensor, scratch: torch.Tensor) -> bool:
    """Keeps in each row so many numbers of the largest magnitudes, but not the first so many of these. Sets the others to
    zero, in place.

    ``ranks`` has both numbers of each row. Among equal magnitudes, the first count as the larger. ``room`` and ``scratch``
    have the values' dtype, and at least the length of a row. Returns False as soon as a search meets NaN; the numbers are
    then of no use.
    """
    import numpy as np
    import torch

    n, bits = values.shape[1], f"i{values.itemsize}"
    magnitudes, keys = room[:n].numpy().view(bits), scratch[:n].numpy().view(bits)
    flags, unsigned = np.empty(n, bool), np.array(np.iinfo(bits).max, bits)
    for row, out, (most, without) in zip(values.numpy().view(bits), values.unbind(), ranks, strict=True):
        # Row by row, since a row stays in the CPU's caches.
        searched = [rank for rank in (most, without) if 0 < rank < n]
        if searched:
            np.copyto(keys, np.bitwise_and(row, unsigned, out=magnitudes))
            _partition(keys, searched)
            if keys[n - searched[-1] :].max() > _INFINITE[values.itemsize]:
                return False
        if 0 < most < n:
            largest = keys[n - most :]
            _shrink(out, largest[:1], _split(magnitudes, largest, flags))
        elif not most:
            torch.hardshrink(out, math.inf, out=out)  # leaves NaN
        if without:
            largest = keys[n - without :]
            stop = _split(magnitudes, largest, flags)
            np.greater_equal(magnitudes[:stop], largest[:1], out=flags[:stop])
            np.greater(magnitudes[stop:], largest[:1], out=flags[stop:])
            row[flags.nonzero()[0]] = 0
    return True


def _shrink(values: torch.Tensor, key: _Bits, stop: int) -> None:
    """Sets numbers of smaller magnitudes than one with these bits to zero, and equal ones from ``stop`` on."""
    import torch

    kind = f"f{key.itemsize}"
    threshold = key.view(kind).item()
    if threshold:  # hardshrink keeps numbers above a limit: the next smaller number as limit keeps equal ones too
        first = values if stop == len(values) else values[:stop]
        torch.hardshrink(first, (key - 1).view(kind).item(), out=first)
    if stop < len(values):
        rest = values[stop:]
        torch.hardshrink(rest, threshold, out=rest)


def _place_of(flags: _Bits, count: int) -> int:
    """Returns the place of the ``count``-th true value, which is there. Counting is several times as fast as listing."""
    import numpy as np

    start, stop = 0, len(flags)
    while stop - start > _LISTED:
        middle = (start + stop) // 2
        before = np.count_nonzero(flags[start:middle])
        if before < count:
            start, count = middle, count - before
        else:
            stop = middle
    return start + int(flags[start:stop].nonzero()[0][count - 1])


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


class Inside(NamedTuple):
    """The numbers of a stretch that lie in a bracket, their places, and how many are larger. ``nan``: whether any number is
    NaN, which counts as larger."""

    values: torch.Tensor
    places: torch.Tensor
    above: int
    nan: bool


def inside(values: torch.Tensor, low: float, high: float, scratch: torch.Tensor) -> Inside:
    """Finds the numbers in [low, high]. Fast if they are few. ``scratch`` has the dtype and the size of the values."""
    import numpy as np
    import torch

    # numpy compares in a quarter of the time that torch takes to find the columns near the bracket.
    numbers, count = values.numpy(), len(values)
    room = scratch.numpy().view("?")
    upper, both = room[:count], room[count : 2 * count]
    np.less_equal(numbers, high, out=upper)
    np.greater_equal(numbers, low, out=both)
    not_above, not_below = np.count_nonzero(upper), np.count_nonzero(both)
    np.logical_and(upper, both, out=both)
    places = both.nonzero()[0]
    nan = int(not_above) + int(not_below) - len(places) < count  # no comparison with NaN is true
    return Inside(torch.from_numpy(numbers[places]), torch.from_numpy(places), count - int(not_above), nan)


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
