"""The exact k-th largest of a stream of numbers. Numerics only; no I/O.

Two ways, one mostly enough and one that cannot fail. A small sample tells nearly where the k-th largest is, so that
one look at all numbers settles it: it counts those above, and collects those near. Or: a float's bits, the sign taken
into account, are an integer of the same order, its *key*. A histogram over all keys tells in which bin the k-th
largest lies, another over that bin where within it, until the key is known whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BIN_BITS = 16
BINS = 1 << _BIN_BITS
_HISTOGRAM_BYTES = 8 * (BINS + 2)
_COLLECTED_BYTES = 12
"""Of a number that is collected, and its place."""
_MOST_HELD_BYTES = 32 << 20
_SIGMAS = 3.5
_FEW = 3
_MOST_COLLECTED = 0.04
_BLOCK = 8


def sample_elems(count: int) -> int:
    """How large a sample of so many numbers should be."""
    return min(max(count >> 8, 1 << 16), 1 << 20)


def held_bytes(count: int, searches: int) -> int:
    """The most that so many searches among ``count`` numbers hold: samples, histograms, what is collected."""
    if not searches:
        return 0
    collected = min(2 * _COLLECTED_BYTES * max(int(count * _MOST_COLLECTED), 1 << 13) * searches, _MOST_HELD_BYTES)
    return searches * (3 * _HISTOGRAM_BYTES + 4 * min(sample_elems(count), count)) + collected


@dataclass(frozen=True, slots=True)
class Guess:
    """That the k-th largest lies from ``low`` to ``high``, where ``share`` of all numbers are; ``candidates``: that it
    is one of these few, frequent ones."""

    low: float
    high: float
    share: float = 1.0
    candidates: tuple[float, ...] = ()


def affordable(guesses: Sequence[Guess], count: int) -> bool:
    """Whether what is to be collected among so many numbers may be held at once."""
    collected = sum(guess.share for guess in guesses if not guess.candidates) * count
    return 2 * _COLLECTED_BYTES * collected <= _MOST_HELD_BYTES


def guess(sample: torch.Tensor, rank: int, count: int) -> Guess | None:
    """Where the ``rank``-th largest of ``count`` numbers lies, judging by a sample; None where that is no help."""
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


def count_above(values: torch.Tensor, limit: float, scratch: torch.Tensor) -> int:
    """How many are larger than ``limit``; NaN is."""
    import torch

    exact = None if len(values) < 1 << 24 else torch.float64  # ones are counted in float32, up to 2^24
    return len(values) - int(torch.le(values, limit, out=scratch).sum(dtype=exact))


def inside(values: torch.Tensor, low: float, high: float, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers from ``low`` to ``high`` and their places; fast where they are few."""
    import torch

    # Picking numbers one by one is slow, so first by columns of a few: those that have one near enough, or a NaN.
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
        # The middle is rounded, by as much as numbers of that size are apart.
        slack = torch.finfo(values.dtype).eps * max(abs(low), abs(high))
        far = distance.amin(0) > (high - low) * 0.51 + slack
    column = far.logical_not_().nonzero()[:, 0]
    picked = table.index_select(1, column)
    row, at = ((picked >= low) & (picked <= high)).nonzero(as_tuple=True)
    rest = values[table.numel() :]
    more = ((rest >= low) & (rest <= high)).nonzero()[:, 0]
    places = torch.cat([row * columns + column[at], more + table.numel()])
    return torch.cat([picked[row, at], rest[more]]), places


def sort_keys(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Integers in the order of ``values``, float32 or float64; NaN without a sign is the largest. ``out`` is an
    integer tensor of their width."""
    import torch

    bits = values.view(out.dtype)
    torch.bitwise_right_shift(bits, 8 * bits.element_size() - 1, out=out)
    return out.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def histogram(keys: torch.Tensor, shift: int, low: int, scratch: torch.Tensor) -> torch.Tensor:
    """How many keys lie in each of the 65536 bins from ``low``, seen by their bits from ``shift`` up."""
    import torch

    # Two bins more, for what lies below and above, cost less than picking out what lies inside.
    places = torch.bitwise_right_shift(keys, shift, out=scratch) if shift else keys
    # Subtracting first could wrap around; a clamp cannot.
    least, most = max(low - 1, torch.iinfo(keys.dtype).min), min(low + BINS, torch.iinfo(keys.dtype).max)
    places = torch.clamp(places, least, most, out=scratch).sub_(least)
    first = low - least
    return torch.bincount(places, minlength=BINS + 2)[first : first + BINS]


@dataclass(slots=True)
class Search:
    """The search for the ``rank``-th largest by histograms: among keys of which the bits from ``shift`` up are those of
    ``low`` + one of 65536; ``above`` numbers are larger than all of these. ``equal`` are in the bin found last."""

    rank: int
    bits: int
    shift: int
    low: int
    above: int = 0
    equal: int = 0

    @classmethod
    def of(cls, rank: int, bits: int) -> Search:
        """A search for the ``rank``-th largest (1 is the largest) among floats of 32 or 64 bits."""
        return cls(rank, bits, bits - _BIN_BITS, -(BINS >> 1))

    def narrow(self, counts: torch.Tensor) -> None:
        """Takes in the counts of this round's bins."""
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
        """The number searched for, once done."""
        import torch

        wide = self.bits == 64
        key = torch.tensor([self.low], dtype=torch.int64 if wide else torch.int32)
        return float(sort_keys(key, torch.empty_like(key)).view(torch.float64 if wide else torch.float32))


@dataclass(frozen=True, slots=True)
class Cut:
    """The ``rank`` largest of a tensor's numbers: those above ``threshold``, and those equal to it with an element
    index below ``stop``. ``everything`` and nothing (a rank of 0) are cuts too."""

    rank: int
    threshold: float = float("inf")
    stop: int = 0
    everything: bool = False

    def keep(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """``values`` of elements ``start`` and on, in place: zero where the magnitude is outside the cut, which must
        be one of magnitudes. NaN stays NaN."""
        import torch

        if self.everything:
            return values
        if math.isnan(self.threshold):  # there are as many NaN as are to be kept
            return torch.hardshrink(values, math.inf, out=values)
        # hardshrink keeps what is strictly larger than its limit, so a limit just below the threshold keeps it too
        edge = min(max(self.stop - start, 0), len(values))
        for part, limit in ((values[:edge], _just_below(self.threshold, values.dtype)), (values[edge:], self.threshold)):
            if len(part) and limit >= 0:
                torch.hardshrink(part, limit, out=part)
        return values


def _just_below(value: float, dtype: torch.dtype) -> float:
    import torch

    return float(torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)))


def row_ranks(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The place, from 0 for the smallest, of each number along ``dim``; of equal ones the first counts as the larger."""
    import torch

    order = values.argsort(dim=dim, descending=True, stable=True)
    count = values.shape[dim]
    places = torch.arange(count - 1, -1, -1).view([count if d == dim else 1 for d in range(values.dim())])
    return torch.empty_like(order).scatter_(dim, order, places.expand_as(order))
