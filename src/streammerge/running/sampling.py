"""The sample of a piece, on which it is measured how far a result lies from its inputs: which elements are in it.

The sample of a piece is the whole piece up to 256 elements, and 256 of up to 65,536. Then it grows as n^(2/3), to 4,096 of
about 4 million, which is all of a piece: windows of 16 elements, evenly over the piece, or over two spans of 131,072
elements if the piece is longer than these. Each window lies at another place of its share. So the sample is a function of
the piece's length, does not depend on chunks, workers or the memory, and prefers no row or column of a matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from streammerge.tensors.spec import GRAIN

Array = np.ndarray[Any, Any]
WINDOW = 16
"""Elements that are taken together."""
_LEAST, _MOST = 1 << 8, 1 << 12
PARTS, SPAN = 2, 2 * GRAIN
"""Parts of a long piece that are looked at, and their elements. Most chunks are not, since what is rarely run is slow."""
_GOLDEN = 2654435769
"""2^32 divided by the golden ratio: its multiples modulo 2^32 lie evenly."""


def sample_size(elems: int) -> int:
    """Returns how many elements of a piece are in its sample."""
    windows = round(_LEAST // WINDOW * max(elems / GRAIN, 1.0) ** (2 / 3))
    windows = min(windows, _MOST // WINDOW)
    return elems if elems <= windows * WINDOW else windows * WINDOW


@lru_cache(maxsize=256)
def places(elems: int) -> Array:
    """Returns the elements of a piece that are in its sample, in order: int64."""
    size = sample_size(elems)
    if size == elems:
        return np.arange(elems)
    count = size // WINDOW
    if elems <= PARTS * SPAN:
        begins = _spread(elems, count, WINDOW)
    else:
        each = count // PARTS
        begins = np.concatenate([n + _spread(SPAN, each, WINDOW, turn * each) for turn, n in enumerate(spans(elems))])
    found: Array = (begins[:, None] + np.arange(WINDOW)).ravel()
    return found


@lru_cache(maxsize=256)
def spans(elems: int) -> tuple[int, ...]:
    """Returns where the parts of a piece begin that are looked at. Most chunks hold such a part as a whole, since both
    begin with a multiple of some grains."""
    if elems <= PARTS * SPAN:
        return (0,)
    return tuple((_spread(elems, PARTS, SPAN) // SPAN * SPAN).tolist())


def _spread(elems: int | Array, count: int, length: int, turn: int = 0) -> Array:
    """Returns where ``count`` spans of ``length`` begin, one in each of as many equal shares of ``elems``: multiples
    of ``WINDOW``. ``turn``: another one gives other places in the shares. A column of numbers of elements makes rows."""
    numbers = np.arange(count + 1)
    edges = numbers * elems // count
    turns = (numbers[:-1] + turn) * _GOLDEN % (1 << 32)
    shares = edges[..., 1:] - edges[..., :-1]
    found: Array = edges[..., :-1] + (turns * (shares - length + 1) >> 32)
    return found // WINDOW * WINDOW


_NOTHING: Array = np.empty(0, np.int64)
FIRST: Array = np.zeros(1, np.int64)


class Sample(NamedTuple):
    """Elements of a sample in a chunk, counted from its begin. ``rows`` have any, and theirs begin at ``begins``.
    ``windows``: the numbers of its windows, if it is whole windows of the chunk, whose copies are fast."""

    places: Array
    rows: Array
    begins: Array
    windows: Array | None


def _sample(places: Array, rows: Array, begins: Array) -> Sample:
    first = places[::WINDOW]
    whole = (
        not len(places) % WINDOW
        and not (first % WINDOW).any()
        and bool((places[WINDOW - 1 :: WINDOW] - first == WINDOW - 1).all())
    )
    return Sample(places, rows, begins, first // WINDOW if whole else None)


EMPTY = _sample(_NOTHING, _NOTHING, _NOTHING)


@lru_cache(maxsize=256)
def of_one(elems: int, start: int, stop: int) -> Sample:
    """Returns the elements ``start`` to ``stop`` of a piece that are in its sample, counted from ``start``."""
    own = places(elems)
    first, last = np.searchsorted(own, (start, stop))
    return _sample(own[first:last] - start, FIRST, FIRST)


@lru_cache(maxsize=8)
def of_many(sizes: tuple[int, ...], skipped: int, length: int) -> Sample:
    """Returns the sample in ``length`` elements of neighbouring pieces, counted from their begin. ``skipped``: elements of
    the first piece before these."""
    lengths = np.array(sizes)
    begins = np.cumsum(lengths) - lengths - skipped
    of_one_size = (begins >= 0) & (begins + lengths <= length) & (lengths > _LEAST) & (lengths <= GRAIN)
    windows = _spread(lengths[of_one_size, None], _LEAST // WINDOW, WINDOW) + begins[of_one_size, None]
    alike = iter((windows[:, :, None] + np.arange(WINDOW)).reshape(len(windows), _LEAST))  # at once: calls are slow
    found, counts = list[Array](), list[int]()
    for size, begin, is_alike in zip(sizes, begins.tolist(), of_one_size.tolist(), strict=True):
        if is_alike:
            own = next(alike)
        else:
            whole = begin >= 0 and begin + size <= length
            own = places(size) if whole else of_one(size, max(-begin, 0), min(length - begin, size)).places
            own = own + max(begin, 0)
        found.append(own)
        counts.append(len(own))
    rows = np.flatnonzero(counts)
    return _sample(np.concatenate(found), rows, (np.cumsum(counts) - counts)[rows])
