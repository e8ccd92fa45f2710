"""Sums of the products of all pairs of rows of numbers, in float64."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.compiled.library import LANES, SUMMED, address, functions
from streammerge.compiled.numbers import CODES
from streammerge.tensors.dtypes import DType


class Products:
    """The sums over all grains so far of the products of pairs 00, 10, 11, 20, ..., of sources in these dtypes.

    ``grain``: the number of elements whose sum is made by itself. ``base``: the dtype of what is subtracted from each
    source before; None if nothing is. ``totals``: the sums before, none if they begin.
    """

    def __init__(self, sources: Sequence[DType], base: DType | None, grain: int, totals: Sequence[float] = ()) -> None:
        import numpy as np

        count = len(sources)
        self._dtypes = np.array([CODES[dtype] for dtype in sources], np.int32)
        self._base, self._grain = 0 if base is None else CODES[base], grain
        self._tiles = np.empty((count + 1) * SUMMED)
        self._begun = bool(totals)
        self._totals = np.array(totals or [0.0] * (count * (count + 1) // 2))
        self._lanes = np.empty(len(self._totals) * LANES)

    def add(self, sources: Sequence[int], base: int | None, elems: int) -> list[float]:
        """Returns the sums with the grains of a chunk, which begins with one. ``sources`` and ``base``: the addresses of
        their numbers."""
        import numpy as np

        places = np.array(sources, np.uintp)
        functions().streammerge_products(
            elems,
            len(places),
            address(places),
            address(self._dtypes),
            base,
            self._base,
            self._grain,
            address(self._tiles),
            address(self._lanes),
            address(self._totals),
            self._begun,
        )
        self._begun = True
        sums: list[float] = self._totals.tolist()
        return sums
