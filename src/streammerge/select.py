"""The exact k-th largest of a stream of numbers, by histograms of their bits. Numerics only; no I/O.

A float's bits, the sign taken into account, are an integer of the same order. Its 16 leading bits give the bin in which
the k-th largest lies, the next 16 the bin within that, until the pattern is known whole: two rounds for float32, four
for float64. Nothing is sorted, and nothing is held but 65536 counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BIN_BITS = 16
BINS = 1 << _BIN_BITS
HISTOGRAM_BYTES = 8 * (BINS + 2)


def sort_keys(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Integers in the order of ``values``, float32 or float64; NaN without a sign is the largest. ``out`` is an
    integer tensor of their width."""
    import torch

    bits = values.view(out.dtype)
    torch.bitwise_right_shift(bits, 8 * bits.element_size() - 1, out=out)
    return out.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


@dataclass(slots=True)
class Search:
    """Where the ``rank``-th largest lies, as far as is known: among keys of which the leading bits are those of
    ``low`` + one of 65536; ``above`` numbers are larger than all of these."""

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

    def narrow(self, histogram: torch.Tensor) -> None:
        """Takes in the counts of this round's bins."""
        from_top = histogram.flip(0).cumsum(0)
        at = int((from_top < self.rank - self.above).sum())
        self.equal = int(histogram[BINS - 1 - at])
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


def histogram(keys: torch.Tensor, shift: int, low: int, scratch: torch.Tensor) -> torch.Tensor:
    """How many keys lie in each of the 65536 bins from ``low``, seen by their bits from ``shift`` up."""
    import torch

    # Two bins more, for what lies below and above, cost less than picking out what lies inside.
    places = torch.bitwise_right_shift(keys, shift, out=scratch) if shift else scratch.copy_(keys)
    # Subtracting first could wrap around; a clamp cannot.
    least, most = max(low - 1, torch.iinfo(keys.dtype).min), min(low + BINS, torch.iinfo(keys.dtype).max)
    places.clamp_(least, most).sub_(least)
    counts = torch.bincount(places, minlength=BINS + 2)
    first = low - least
    return counts[first : first + BINS]


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
        if self.rank == 0:
            return values.mul_(0)
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
