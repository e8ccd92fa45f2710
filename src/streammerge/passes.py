"""The passes of a :class:`~streammerge.group.TensorGroup`: each streams all chunks, and holds something small."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.select import Cut, Search, histogram
from streammerge.tensors import ranges

if TYPE_CHECKING:
    import torch

    from streammerge.group import Chunk, TensorGroup

    Terms = Callable[[Chunk], Iterable[torch.Tensor]]

Searches = Sequence[dict[int, Search]]
"""For each tensor that is looked at, its searches by rank."""


def reduce(group: TensorGroup, terms: Terms) -> list[torch.Tensor]:
    """See :meth:`TensorGroup.reduce`."""
    import torch

    def work(chunks: Iterable[Chunk]) -> list[torch.Tensor]:
        totals: list[torch.Tensor] = []
        for chunk in chunks:
            for number, values in enumerate(terms(chunk)):
                step = group.grain // (group.row if values.dim() > 1 else 1)
                for start, stop in list(ranges(len(values), step)) or [(0, 0)]:
                    partial = values[start:stop].sum(0, dtype=torch.float64)
                    if number == len(totals):
                        totals.append(partial)
                    else:
                        totals[number].add_(partial)
        return totals

    def add(totals: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
        return [total.add_(one) for total, one in zip(totals, more, strict=True)]

    return functools.reduce(add, group.sweep(work, 0, group.elems))


def gram(group: TensorGroup, deltas: bool) -> torch.Tensor:
    """See :meth:`TensorGroup.gram`."""
    import torch

    n = group.models

    def products(chunk: Chunk) -> Iterator[torch.Tensor]:
        load = chunk.delta if deltas else chunk.load
        for i in range(n):
            x = load(i, "gram x", torch.float64)
            for j in range(i + 1):
                y = x if i == j else load(j, "gram y", torch.float64)
                yield torch.mul(x, y, out=chunk.empty("gram product", torch.float64))

    rows, columns = torch.tril_indices(n, n)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[rows, columns] = matrix[columns, rows] = torch.stack(reduce(group, products))
    return matrix


def kth_largest(group: TensorGroup, values: Terms, ranks: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """See :meth:`TensorGroup.kth_largest`."""
    bits = 8 * group.compute.itemsize
    searches = [{rank: Search.of(rank, bits) for rank in of if 0 < rank < group.elems} for of in ranks]
    while any(not search.done for of in searches for search in of.values()):
        _narrow(group, values, searches)
    stops = _stops(group, values, searches)

    def cut(number: int, rank: int) -> Cut:
        if rank in searches[number]:
            return Cut(rank, searches[number][rank].threshold, stops[number, rank])
        return Cut(rank, everything=rank > 0)

    return [[cut(number, rank) for rank in of] for number, of in enumerate(ranks)]


def _narrow(group: TensorGroup, values: Terms, searches: Searches) -> None:
    """One round: a histogram for each tensor and each place where one of its searches has arrived."""
    places = [sorted({(s.shift, s.low) for s in of.values() if not s.done}) for of in searches]
    Counts = dict[tuple[int, int, int], "torch.Tensor"]

    def work(chunks: Iterable[Chunk]) -> Counts:
        counts: Counts = {}
        for chunk in chunks:
            for number, tensor in enumerate(values(chunk)):
                if places[number]:
                    keys = chunk.sort_keys(tensor)
                for shift, low in places[number]:
                    found = histogram(keys, shift, low, chunk.empty("places", keys.dtype))
                    _add(counts, (number, shift, low), found)
        return counts

    totals: Counts = {}
    for counts in group.sweep(work, 0, group.elems):
        for place, found in counts.items():
            _add(totals, place, found)
    for number, of in enumerate(searches):
        for search in of.values():
            if not search.done:
                search.narrow(totals[number, search.shift, search.low])


def _add(totals: dict[tuple[int, int, int], torch.Tensor], place: tuple[int, int, int], found: torch.Tensor) -> None:
    totals[place] = totals[place].add_(found) if place in totals else found


def _stops(group: TensorGroup, values: Terms, searches: Searches) -> dict[tuple[int, int], int]:
    """The element index below which numbers equal to a threshold are kept, by tensor and rank."""
    stops: dict[tuple[int, int], int] = defaultdict(lambda: group.elems)
    split = [
        (number, rank, search.low, rank - search.above)
        for number, of in enumerate(searches)
        for rank, search in of.items()
        if rank - search.above < search.equal
    ]
    if not split:
        return stops

    def work(chunks: Iterable[Chunk]) -> list[list[int]]:
        """How many equal numbers each grain has, for each that is split."""
        import torch

        counts: list[list[int]] = [[] for _ in split]
        for chunk in chunks:
            for number, tensor in enumerate(values(chunk)):
                wanted = [(place, key) for place, (of, _, key, _) in enumerate(split) if of == number]
                if wanted:
                    keys = chunk.sort_keys(tensor)
                for place, key in wanted:
                    same = torch.eq(keys, key)
                    counts[place] += [int(same[a:b].count_nonzero()) for a, b in ranges(len(same), group.grain)]
        return counts

    grains: list[list[int]] = [[] for _ in split]
    for found in group.sweep(work, 0, group.elems):
        for total, more in zip(grains, found, strict=True):
            total += more
    for counts, (number, rank, key, kept) in zip(grains, split, strict=True):
        grain = 0
        while kept > counts[grain]:
            kept -= counts[grain]
            grain += 1
        stops[number, rank] = _position(group, values, number, key, kept, grain * group.grain)
    return stops


def _position(group: TensorGroup, values: Terms, number: int, key: int, count: int, start: int) -> int:
    """The element index behind the ``count``-th number with that key, in the grain that begins at ``start``."""

    def work(chunks: Iterable[Chunk]) -> list[int]:
        found = []
        for chunk in chunks:
            keys = next(chunk.sort_keys(tensor) for n, tensor in enumerate(values(chunk)) if n == number)
            found += [chunk.start + int(i) for i in (keys == key).nonzero()]
        return found

    stop = min(start + group.grain, group.elems)
    return [i for found in group.sweep(work, start, stop) for i in found][count - 1] + 1
