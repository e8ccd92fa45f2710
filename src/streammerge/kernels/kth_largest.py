"""Exact order statistics of a :class:`~streammerge.kernels.group.TensorGroup`: a sample and one pass, else a few
passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.kernels.ranking import Cut, Guess, Search, affordable, count_above, guess, histogram, inside, sample_elems
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.chunk import Chunk, Swept

    Values = Callable[[Chunk], Iterable[torch.Tensor]]

_FEW_ELEMS = 1 << 13
Wanted = tuple[int, int]
"""(number of the tensor, rank)."""


def kth_largest(group: Swept, values: Values, ranks: Sequence[Sequence[int]], signed: bool) -> list[list[Cut]]:
    """See :meth:`TensorGroup.kth_largest`."""
    wanted = [
        (number, rank) for number, of in enumerate(ranks) for rank in sorted(set(of)) if 0 < rank < group.elems + signed
    ]
    cuts = _at_once(group, values, wanted)
    missed = [which for which in wanted if which not in cuts]
    if missed:
        cuts |= _by_histograms(group, values, missed, signed)
    return [[cuts.get((number, rank)) or Cut(rank, everything=rank > 0) for rank in of] for number, of in enumerate(ranks)]


# ----------------------------------------------------------------------------------------------- one pass after a
# sample


@dataclass(slots=True)
class _Look:
    """The result of one look at all numbers.

    ``above``: how many numbers are above the guess; ``values`` and ``places``: those inside it. If the guess has
    candidates, ``above`` has one count per candidate, and ``equal`` counts the numbers equal to it in each grain.
    """

    above: list[int]
    values: list[torch.Tensor] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)
    equal: list[list[tuple[int, int]]] = field(default_factory=list)

    def add(self, other: _Look) -> None:
        self.above = [a + b for a, b in zip(self.above, other.above, strict=True)]
        self.values += other.values
        self.places += other.places
        for mine, more in zip(self.equal, other.equal, strict=True):
            mine += more


def _at_once(group: Swept, values: Values, wanted: Sequence[Wanted]) -> dict[Wanted, Cut]:
    """Returns the cuts that one pass can find. The sample decides which cuts are found, but never their values."""
    guesses = _guesses(group, values, wanted)
    if not guesses:
        return {}

    def work(chunks: Iterable[Chunk]) -> dict[Wanted, _Look]:
        found = {which: _nothing(guesses[which]) for which in guesses}
        for chunk in chunks:
            for which, tensor in _those_of(guesses, values(chunk)):
                found[which].add(_look(group, chunk, tensor.reshape(-1), guesses[which]))
        return found

    looks = {which: _nothing(guesses[which]) for which in guesses}
    for found in group.sweep(work, 0, group.elems):
        for which, look in found.items():
            looks[which].add(look)
    cuts = {which: _settle(group, values, which, guesses[which], look) for which, look in looks.items()}
    return {which: cut for which, cut in cuts.items() if cut}


def _those_of(wanted: Iterable[Wanted], tensors: Iterable[torch.Tensor]) -> Iterator[tuple[Wanted, torch.Tensor]]:
    """Yields each tensor with each rank that is wanted of it."""
    for number, tensor in enumerate(tensors):
        for which in wanted:
            if which[0] == number:
                yield which, tensor


def _guesses(group: Swept, values: Values, wanted: Sequence[Wanted]) -> dict[Wanted, Guess]:
    import torch

    numbers = {number for number, _ in wanted}
    if group.elems <= _FEW_ELEMS:  # smaller than a sample: collect everything
        return {which: Guess(-math.inf, math.inf) for which in wanted}

    def work(chunks: Iterable[Chunk]) -> dict[int, list[torch.Tensor]]:
        picked: dict[int, list[torch.Tensor]] = {number: [] for number in numbers}
        for chunk in chunks:
            for number, tensor in enumerate(values(chunk)):
                if number in numbers:
                    picked[number].append(tensor.reshape(-1).clone())
        return picked

    samples: dict[int, list[torch.Tensor]] = {number: [] for number in numbers}
    for picked in group.sweep(work, 0, group.elems, sparse=-(-group.elems // sample_elems(group.elems))):
        for number, parts in picked.items():
            samples[number] += parts
    joined = {number: torch.cat(parts) for number, parts in samples.items()}
    made = {which: guess(joined[which[0]], which[1], group.elems) for which in wanted}
    found = {which: one for which, one in made.items() if one}
    return found if affordable(list(found.values()), group.elems) else {}


def _nothing(one: Guess) -> _Look:
    count = max(len(one.candidates), 1)
    return _Look([0] * count, equal=[[] for _ in one.candidates])


def _look(group: Swept, chunk: Chunk, tensor: torch.Tensor, one: Guess) -> _Look:
    import torch

    scratch = chunk.empty("scratch")
    if not one.candidates:
        picked, places = inside(tensor, one.low, one.high, scratch)
        return _Look([count_above(tensor, one.high, scratch)], [picked], [places + chunk.start])
    above, equal = [], []
    for candidate in one.candidates:
        above.append(count_above(tensor, candidate, scratch))
        same = torch.eq(tensor, candidate, out=scratch)
        equal.append([(chunk.start + a, int(same[a:b].sum())) for a, b in ranges(len(same), group.grain)])
    return _Look(above, equal=equal)


def _settle(group: Swept, values: Values, which: Wanted, one: Guess, look: _Look) -> Cut | None:
    """Returns the cut, or None if the guess was wrong."""
    import torch

    number, rank = which
    if one.candidates:
        for candidate, above, equal in zip(one.candidates, look.above, look.equal, strict=True):
            if above < rank <= above + sum(count for _, count in equal):
                return Cut(rank, candidate, _stop(group, values, number, candidate, rank - above, equal))
        return None
    kept = rank - look.above[0]
    picked, places = torch.cat(look.values), torch.cat(look.places)
    if not 0 < kept <= len(picked):
        return None
    threshold = float(picked.kthvalue(len(picked) - kept + 1).values)
    same = places[picked == threshold].sort().values
    kept -= int((picked > threshold).sum())
    return Cut(rank, threshold, group.elems if kept == len(same) else int(same[kept - 1]) + 1)


def _stop(group: Swept, values: Values, number: int, threshold: float, kept: int, equal: Sequence[tuple[int, int]]) -> int:
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

    def work(chunks: Iterable[Chunk]) -> list[torch.Tensor]:
        found = []
        for chunk in chunks:
            tensor = next(tensor for n, tensor in enumerate(values(chunk)) if n == number)
            found.append((tensor.reshape(-1) == threshold).nonzero()[:, 0] + chunk.start)
        return found

    stop = min(begin + group.grain, group.elems)
    places = torch.cat([places for found in group.sweep(work, begin, stop) for places in found])
    return int(places[kept - 1]) + 1


# --------------------------------------------------------------------------------------------------- by histograms


def _by_histograms(group: Swept, values: Values, wanted: Sequence[Wanted], signed: bool) -> dict[Wanted, Cut]:
    searches = {which: Search.of(which[1], 8 * group.compute.itemsize) for which in wanted}
    while not all(search.done for search in searches.values()):
        _narrow(group, values, searches, signed)
    split = {which: s for which, s in searches.items() if which[1] - s.above < s.equal and not math.isnan(s.threshold)}
    equal = _equal(group, values, {which: search.threshold for which, search in split.items()})
    cuts = {which: Cut(which[1], search.threshold, group.elems) for which, search in searches.items()}
    for (number, rank), search in split.items():
        stop = _stop(group, values, number, search.threshold, rank - search.above, equal[number, rank])
        cuts[number, rank] = Cut(rank, search.threshold, stop)
    return cuts


def _narrow(group: Swept, values: Values, searches: dict[Wanted, Search], signed: bool) -> None:
    """Runs one round: one histogram for each tensor and each bin that one of its searches has reached."""
    places = {(number, s.shift, s.low) for (number, _), s in searches.items() if not s.done}

    def work(chunks: Iterable[Chunk]) -> dict[tuple[int, int, int], torch.Tensor]:
        counts: dict[tuple[int, int, int], torch.Tensor] = {}
        for chunk in chunks:
            for number, tensor in enumerate(values(chunk)):
                here = [place for place in places if place[0] == number]
                if here:
                    keys = chunk.sort_keys(tensor, signed)
                for place in here:
                    found = histogram(keys, *place[1:], chunk.empty("places", keys.dtype))
                    counts[place] = counts[place].add_(found) if place in counts else found
        return counts

    totals: dict[tuple[int, int, int], torch.Tensor] = {}
    for counts in group.sweep(work, 0, group.elems):
        for place, found in counts.items():
            totals[place] = totals[place].add_(found) if place in totals else found
    for (number, _), search in searches.items():
        if not search.done:
            search.narrow(totals[number, search.shift, search.low])


def _equal(group: Swept, values: Values, thresholds: dict[Wanted, float]) -> dict[Wanted, list[tuple[int, int]]]:
    """Counts the numbers equal to each threshold, per grain, as (first element of the grain, count)."""
    import torch

    def work(chunks: Iterable[Chunk]) -> dict[Wanted, list[tuple[int, int]]]:
        counts: dict[Wanted, list[tuple[int, int]]] = {which: [] for which in thresholds}
        for chunk in chunks:
            for which, tensor in _those_of(thresholds, values(chunk)):
                same = torch.eq(tensor.reshape(-1), thresholds[which], out=chunk.empty("scratch"))
                counts[which] += [(chunk.start + a, int(same[a:b].sum())) for a, b in ranges(len(same), group.grain)]
        return counts

    totals: dict[Wanted, list[tuple[int, int]]] = {which: [] for which in thresholds}
    for counts in group.sweep(work, 0, group.elems) if thresholds else ():
        for which, found in counts.items():
            totals[which] += found
    return totals
