"""Exact order statistics of a :class:`~streammerge.kernels.group.TensorGroup`: one pass if a chunk holds the tensor, else a
sample and one pass, else a few passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.kernels.chunk import SCRATCH, Slot
from streammerge.kernels.ranking import (
    Cut,
    Guess,
    Search,
    affordable,
    count_above,
    guess,
    has_nan,
    histogram,
    inside,
    places_equal,
    sample_elems,
    select,
)
from streammerge.tensors.spec import PIECE_ELEMS, ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    from streammerge.kernels.chunk import Chunk, Look, Swept

_PLACES: Slot = ("places",)
Wanted = tuple[int, int]
"""(number of the tensor, rank)."""


def kth_largest(group: Swept, values: Look, ranks: Sequence[Sequence[int]], signed: bool) -> list[list[Cut]]:
    """See :meth:`TensorGroup.kth_largest`. If NaN is among the numbers, the search is repeated without agreed elements."""
    wanted = [
        (number, rank) for number, of in enumerate(ranks) for rank in sorted(set(of)) if 0 < rank < group.elems + signed
    ]
    try:
        cuts = _cuts(group, values, wanted, signed, nan_stops=True)
    except _NanMet:
        cuts = _cuts(group.hiding(), values, wanted, signed, nan_stops=False)
    return [[cuts.get((number, rank)) or Cut(rank, everything=rank > 0) for rank in of] for number, of in enumerate(ranks)]


class _NanMet(Exception):
    """Raised to abandon a search that has met NaN."""


def _cuts(group: Swept, values: Look, wanted: Sequence[Wanted], signed: bool, nan_stops: bool) -> dict[Wanted, Cut]:
    """Returns all cuts. Raises _NanMet at NaN if ``nan_stops``; otherwise NaN counts as the largest number."""
    if not wanted:
        return {}
    whole = _in_one_chunk(group, values, wanted, signed, nan_stops)
    if whole is not None:
        return whole
    cuts = _at_once(group, values, wanted, nan_stops)
    missed = [which for which in wanted if which not in cuts]
    if missed:
        cuts |= _by_histograms(group, values, missed, signed, nan_stops)
    return cuts


# ---------------------------------------------------------------------------------------------------- in one chunk


@dataclass(frozen=True, slots=True)
class _Select:
    """Selects the cuts of a tensor of ``elems`` elements that one chunk holds, and says whether NaN was met. Answers None,
    and looks at nothing, if the tensor has several chunks."""

    ranks: dict[int, list[int]]
    elems: int
    signed: bool

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> tuple[dict[Wanted, Cut], bool] | None:
        chunk = next(iter(chunks))
        if chunk.elems < self.elems:
            return None
        cuts: dict[Wanted, Cut] = {}
        met = False
        for number, tensor in enumerate(look(chunk)):
            ranks = self.ranks.get(number)
            if ranks:
                scratch = chunk.empty(SCRATCH)
                made, nan = select(tensor.reshape(-1).to(scratch.dtype), ranks, self.signed, scratch)
                cuts |= {(number, rank): cut for rank, cut in zip(ranks, made, strict=True)}
                met |= nan
        return cuts, met


def _in_one_chunk(
    group: Swept, values: Look, wanted: Sequence[Wanted], signed: bool, nan_stops: bool
) -> dict[Wanted, Cut] | None:
    """Returns all cuts of a tensor that one chunk holds, None for a longer tensor."""
    if group.elems > max(PIECE_ELEMS, group.row):
        return None
    ranks: dict[int, list[int]] = {}
    for number, rank in wanted:
        ranks.setdefault(number, []).append(rank)
    [*answers] = group.sweep(values, _Select(ranks, group.elems, signed), 0, group.elems)
    if answers[0] is None:
        return None
    cuts, nan = answers[0]
    if nan and nan_stops:
        raise _NanMet
    return cuts


# ------------------------------------------------------------------------------------- one pass after a sample


@dataclass(slots=True)
class _Found:
    """The result of one look at all numbers.

    ``above``: how many numbers are above the guess; ``values`` and ``places``: those inside it. If the guess has
    candidates, ``above`` has one count per candidate, and ``equal`` counts the numbers equal to it in each grain. ``nan``:
    whether NaN was met.
    """

    above: list[int]
    values: list[torch.Tensor] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)
    equal: list[list[tuple[int, int]]] = field(default_factory=list)
    nan: bool = False

    def add(self, other: _Found) -> None:
        self.nan |= other.nan
        self.above = [a + b for a, b in zip(self.above, other.above, strict=True)]
        self.values += other.values
        self.places += other.places
        for mine, more in zip(self.equal, other.equal, strict=True):
            mine += more

    def join(self) -> None:
        """Joins the collected tensors: one tensor is sent faster than many."""
        import torch

        if len(self.values) > 1:
            self.values, self.places = [torch.cat(self.values)], [torch.cat(self.places)]


@dataclass(frozen=True, slots=True)
class _LookAround:
    """Counts and collects numbers around each guess. ``grain``: see :class:`TensorGroup`."""

    guesses: dict[Wanted, Guess]
    grain: int

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> dict[Wanted, _Found]:
        found = {which: _nothing(guess) for which, guess in self.guesses.items()}
        for chunk in chunks:
            for which, tensor in _those_of(self.guesses, look(chunk)):
                found[which].add(_around(chunk, tensor.reshape(-1), self.guesses[which], self.grain))
        for one in found.values():
            one.join()
        return found


def _at_once(group: Swept, values: Look, wanted: Sequence[Wanted], nan_stops: bool) -> dict[Wanted, Cut]:
    """Returns the cuts that one pass can find. The sample decides which cuts are found, but never their values."""
    guesses = _guesses(group, values, wanted)
    if not guesses:
        return {}

    totals = {which: _nothing(guess) for which, guess in guesses.items()}
    for found in group.sweep(values, _LookAround(guesses, group.grain), 0, group.elems):
        for which, one in found.items():
            totals[which].add(one)
    if nan_stops and any(total.nan for total in totals.values()):
        raise _NanMet
    cuts = {which: _settle(group, values, which, guesses[which], total) for which, total in totals.items()}
    return {which: cut for which, cut in cuts.items() if cut}


def _those_of(wanted: Iterable[Wanted], tensors: Iterable[torch.Tensor]) -> Iterator[tuple[Wanted, torch.Tensor]]:
    """Yields each tensor with each rank that is wanted of it."""
    for number, tensor in enumerate(tensors):
        for which in wanted:
            if which[0] == number:
                yield which, tensor


@dataclass(frozen=True, slots=True)
class _Sample:
    """Collects the numbers of the wanted tensors."""

    wanted: frozenset[int]

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> dict[int, torch.Tensor]:
        import torch

        picked: dict[int, list[torch.Tensor]] = {number: [] for number in self.wanted}
        for chunk in chunks:
            for number, tensor in enumerate(look(chunk)):
                if number in self.wanted:
                    picked[number].append(tensor.reshape(-1).clone())
        return {number: torch.cat(parts) for number, parts in picked.items() if parts}


def _guesses(group: Swept, values: Look, wanted: Sequence[Wanted]) -> dict[Wanted, Guess]:
    import torch

    numbers = frozenset(number for number, _ in wanted)
    samples: dict[int, list[torch.Tensor]] = {number: [] for number in numbers}
    sparse = -(-group.elems // sample_elems(group.elems))
    for picked in group.sweep(values, _Sample(numbers), 0, group.elems, sparse):
        for number, part in picked.items():
            samples[number].append(part)
    joined = {number: parts[0] if len(parts) == 1 else torch.cat(parts) for number, parts in samples.items()}
    for sample in joined.values():
        sample.numpy().sort()  # which takes a quarter of the time of torch's kthvalue
    made = {which: guess(joined[which[0]], which[1], group.elems) for which in wanted}
    found = {which: one for which, one in made.items() if one}
    return found if affordable(list(found.values()), group.elems) else {}


def _nothing(one: Guess) -> _Found:
    count = max(len(one.candidates), 1)
    return _Found([0] * count, equal=[[] for _ in one.candidates])


def _around(chunk: Chunk, tensor: torch.Tensor, one: Guess, grain: int) -> _Found:
    scratch = chunk.empty(SCRATCH)
    if not one.candidates:
        found = inside(tensor, one.low, one.high, scratch)
        return _Found([found.above], [found.values], [found.places.add_(chunk.start)], nan=found.nan)
    above, equal = [], []
    for candidate in one.candidates:
        above.append(count_above(tensor, candidate, scratch))
        equal.append(_per_grain(chunk, tensor, candidate, grain))
    return _Found(above, equal=equal, nan=has_nan(tensor))


def _per_grain(chunk: Chunk, tensor: torch.Tensor, number: float, grain: int) -> list[tuple[int, int]]:
    """Returns (first element, how many numbers equal this one) of each grain of the chunk."""
    same = places_equal(tensor, number, chunk.empty(SCRATCH))
    return [(chunk.start + a, _count(same[a:b])) for a, b in ranges(len(same), grain)]


def _count(flags: np.ndarray[Any, Any]) -> int:
    import numpy as np

    return int(np.count_nonzero(flags))


def _settle(group: Swept, values: Look, which: Wanted, one: Guess, look: _Found) -> Cut | None:
    """Returns the cut, or None if the guess was wrong."""
    import numpy as np

    number, rank = which
    if one.candidates:
        for candidate, above, equal in zip(one.candidates, look.above, look.equal, strict=True):
            if above < rank <= above + sum(count for _, count in equal):
                return Cut(rank, candidate, _stop(group, values, number, candidate, rank - above, equal))
        return None
    kept = rank - look.above[0]
    look.join()
    picked, places = look.values[0], look.places[0]
    if not 0 < kept <= len(picked):
        return None
    least = len(picked) - kept
    threshold = float(np.partition(picked.numpy(), least)[least])
    same = places[picked == threshold].sort().values
    kept -= int((picked > threshold).sum())
    return Cut(rank, threshold, group.elems if kept == len(same) else int(same[kept - 1]) + 1)


@dataclass(frozen=True, slots=True)
class _Places:
    """Finds the element indices of the numbers of one tensor that equal a threshold."""

    number: int
    threshold: float

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> torch.Tensor:
        import torch

        found = []
        for chunk in chunks:
            tensor = next(tensor for number, tensor in enumerate(look(chunk)) if number == self.number)
            found.append((tensor.reshape(-1) == self.threshold).nonzero()[:, 0] + chunk.start)
        return torch.cat(found)


def _stop(group: Swept, values: Look, number: int, threshold: float, kept: int, equal: Sequence[tuple[int, int]]) -> int:
    """Returns the element index after the last of the ``kept`` numbers equal to the threshold. ``equal`` counts such
    numbers per grain."""
    if kept == sum(count for _, count in equal):
        return group.elems
    import torch

    grain = 0
    while kept > equal[grain][1]:
        kept -= equal[grain][1]
        grain += 1
    begin = equal[grain][0]
    stop = min(begin + group.grain, group.elems)
    places = torch.cat([*group.sweep(values, _Places(number, threshold), begin, stop)])
    return int(places[kept - 1]) + 1


# --------------------------------------------------------------------------------------------------- by histograms


def _by_histograms(
    group: Swept, values: Look, wanted: Sequence[Wanted], signed: bool, nan_stops: bool
) -> dict[Wanted, Cut]:
    searches = {which: Search.of(which[1], 8 * group.compute.itemsize) for which in wanted}
    while not all(search.done for search in searches.values()):
        _narrow(group, values, searches, signed, nan_stops)
    split = {which: s for which, s in searches.items() if which[1] - s.above < s.equal and not math.isnan(s.threshold)}
    equal = _equal(group, values, {which: search.threshold for which, search in split.items()})
    cuts = {which: Cut(which[1], search.threshold, group.elems) for which, search in searches.items()}
    for (number, rank), search in split.items():
        stop = _stop(group, values, number, search.threshold, rank - search.above, equal[number, rank])
        cuts[number, rank] = Cut(rank, search.threshold, stop)
    return cuts


@dataclass(frozen=True, slots=True)
class _Histograms:
    """Counts keys in bins, and says whether there is NaN. ``places``: (number of the tensor, shift, low) of each
    histogram."""

    places: frozenset[tuple[int, int, int]]
    signed: bool

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> tuple[dict[tuple[int, int, int], torch.Tensor], bool]:
        counts: dict[tuple[int, int, int], torch.Tensor] = {}
        nan = False
        for chunk in chunks:
            for number, tensor in enumerate(look(chunk)):
                here = [place for place in self.places if place[0] == number]
                if here:
                    nan = nan or has_nan(tensor)
                    keys = chunk.sort_keys(tensor, self.signed)
                for place in here:
                    found = histogram(keys, *place[1:], chunk.empty(_PLACES, keys.dtype))
                    counts[place] = counts[place].add_(found) if place in counts else found
        return counts, nan


def _narrow(group: Swept, values: Look, searches: dict[Wanted, Search], signed: bool, nan_stops: bool) -> None:
    """Runs one round: one histogram for each tensor and each bin that one of its searches has reached."""
    places = frozenset((number, s.shift, s.low) for (number, _), s in searches.items() if not s.done)
    totals: dict[tuple[int, int, int], torch.Tensor] = {}
    met = False
    for counts, nan in group.sweep(values, _Histograms(places, signed), 0, group.elems):
        met |= nan
        for place, found in counts.items():
            totals[place] = totals[place].add_(found) if place in totals else found
    if met and nan_stops:
        raise _NanMet
    for (number, _), search in searches.items():
        if not search.done:
            search.narrow(totals[number, search.shift, search.low])


@dataclass(frozen=True, slots=True)
class _Equal:
    """Counts the numbers equal to each threshold, per grain, as (first element of the grain, count)."""

    thresholds: dict[Wanted, float]
    grain: int

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> dict[Wanted, list[tuple[int, int]]]:
        counts: dict[Wanted, list[tuple[int, int]]] = {which: [] for which in self.thresholds}
        for chunk in chunks:
            for which, tensor in _those_of(self.thresholds, look(chunk)):
                counts[which] += _per_grain(chunk, tensor.reshape(-1), self.thresholds[which], self.grain)
        return counts


def _equal(group: Swept, values: Look, thresholds: dict[Wanted, float]) -> dict[Wanted, list[tuple[int, int]]]:
    """Runs :class:`_Equal` over the whole tensor."""
    totals: dict[Wanted, list[tuple[int, int]]] = {which: [] for which in thresholds}
    for counts in group.sweep(values, _Equal(thresholds, group.grain), 0, group.elems) if thresholds else ():
        for which, found in counts.items():
            totals[which] += found
    return totals
