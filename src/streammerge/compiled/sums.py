"""Weighted sums of rows of numbers in any of four dtypes, in float64, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.compiled.library import address, functions
from streammerge.compiled.numbers import CODES
from streammerge.tensors.dtypes import DType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_TILE, _STEP = 520, 8
"""Numbers that are summed at once, so that they stay in a core's first cache. Rows that lie a power of two apart would push
each other out of it."""
TILES_ELEMS = 1 << 15
"""Numbers in float64 that are held in all."""
MOST_SOURCES = 255
"""So many rows are summed in one call."""
Quotient = tuple[float, bool]
"""What a sum is multiplied by, or divided by if that says so."""


class CompiledSums:
    r"""Sums :math:`y_j = (\sum_i w_{ji} x_i) / d_j` of the same numbers, in the order of the sources.

    Each product in float64 is rounded, then each sum, then the quotient, and the result is rounded to float32, and from
    there to a shorter dtype. ``weights``: for each output one of each source. ``quotients``: one for each output.
    ``sources`` and ``outs``: the dtypes. ``tiles``: memory of :data:`TILES_ELEMS` float64, if there is some.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[float]],
        quotients: Sequence[Quotient],
        sources: Sequence[DType],
        outs: Sequence[DType],
        tiles: Array | None = None,
    ) -> None:
        import numpy as np

        self._call = functions().streammerge_sums
        self._weights = np.array(weights, np.float64)
        self._factors = np.array([factor for factor, _ in quotients], np.float64)
        self._divides = np.array([divides for _, divides in quotients], np.uint8)
        self._sources = np.array([CODES[dtype] for dtype in sources], np.int32)
        self._outs = np.array([CODES[dtype] for dtype in outs], np.int32)
        self._tiles = np.empty(TILES_ELEMS) if tiles is None else tiles
        self._nonfinite = np.empty(len(outs), np.uint8)

    def put(self, sources: Sequence[int], outs: Sequence[int], elems: int) -> list[bool]:
        """Writes the rounded sums. Returns for each output whether all its numbers are finite. Else some may be wrong.

        ``sources`` and ``outs``: the addresses of their first numbers, which may be odd.
        """
        self._run(0, sources, outs, elems, None)
        return [not each for each in self._nonfinite.tolist()]

    def add(self, first: int, sources: Sequence[int], out: int | None, totals: Array) -> bool:
        """Adds some of the sources, from the number ``first``, to the totals of the only output, in float64. Totals begin
        with the number 0. Writes the rounded sums if ``out`` is given. Returns whether all these are finite."""
        self._run(first, sources, None if out is None else [out], len(totals), totals)
        return out is None or not self._nonfinite[0]

    def _run(
        self, first: int, sources: Sequence[int], outs: Sequence[int] | None, elems: int, totals: Array | None
    ) -> None:
        import numpy as np

        count = len(sources)
        tile = min(_TILE, TILES_ELEMS // (count + 1) // _STEP * _STEP)
        places, into = np.array(sources, np.uintp), None if outs is None else np.array(outs, np.uintp)
        weights = self._weights
        if count < weights.shape[1]:
            weights = np.ascontiguousarray(weights[:, first : first + count])
        self._call(
            elems,
            count,
            address(places),
            address(self._sources[first:]),
            len(self._outs),
            address(weights),
            address(self._factors),
            address(self._divides),
            None if into is None else address(into),
            address(self._outs),
            address(self._tiles),
            tile,
            None if totals is None else address(totals),
            first > 0,
            address(self._nonfinite),
        )


def address_of(octets: memoryview) -> int:
    """Returns where bytes lie that may be read only. They must be held as long as the address is used."""
    import numpy as np

    return address(np.frombuffer(octets, np.uint8)) if len(octets) else 0
