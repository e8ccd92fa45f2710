"""Measures on a sample how far a result lies from its inputs, while both are at hand.

The sample is the first 1,024 of each 2^20 elements of a tensor. It costs little, and does not depend on chunks or workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk
from streammerge.running.workspace import Inputs

if TYPE_CHECKING:
    import torch

_WINDOW, _EVERY = 1 << 10, 1 << 20


def measure(out: memoryview, dtype: torch.dtype, chunk: Chunk, source: Inputs, sums: list[float]) -> None:
    """Adds the sums over the sample in a chunk: the number of elements, and for each input the square of its distance to
    the result, and its own square."""
    import torch

    begin = -(-chunk.start // _EVERY) * _EVERY if chunk.start % _EVERY >= _WINDOW else chunk.start
    while begin < chunk.stop:
        window = begin - begin % _EVERY
        end = min(window + _WINDOW, chunk.stop)
        made = torch.frombuffer(out, dtype=dtype)[begin - chunk.start : end - chunk.start].double()
        found = [float(end - begin)]
        for number in range(len(source)):
            read = source.read(number, begin, end).double()
            apart = made - read
            found += [torch.dot(apart, apart).item(), torch.dot(read, read).item()]
        if math.isfinite(sum(found)):  # NaN and infinity are counted elsewhere
            sums[:] = added(sums, found)
        begin = window + _EVERY


def added(sums: Sequence[float], more: Sequence[float]) -> list[float]:
    """Returns the sums over both."""
    return [a + b for a, b in zip(sums, more, strict=True)] if sums else list(more)


def distances(sums: Sequence[float]) -> list[float | None]:
    """Returns the distance to each input, relative to the input's norm; None if it is not known."""
    pairs: Iterable[tuple[float, float]] = zip(sums[1::2], sums[2::2], strict=True)
    return [math.sqrt(apart / own) if own else (0.0 if not apart and sums[0] else None) for apart, own in pairs]
