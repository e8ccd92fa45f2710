"""Weighted sums of differences from a base, of which masks keep a part, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.compiled.library import SUMMED, address, functions
from streammerge.compiled.numbers import CODES
from streammerge.tensors.dtypes import DType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class Differences:
    r"""Makes :math:`b + \lambda\, (\sum_m w_m\, k_m\, (x_m - b)) / d`, each operation rounded to float32.

    :math:`k_m` is what the mask of a model stands for, or its factor. With ``elects``, only those are summed whose sign is
    that of the sum of all; with ``normalizes``, they are divided by the sum of their weights, at least ``least``, or 1
    where it is 0 if ``least`` is 0. ``tables``: for each model what the 8 bits of each value of a byte stand for, float32.
    """

    def __init__(
        self,
        weights: Sequence[float],
        tables: Sequence[Array],
        factors: Sequence[float],
        scale: float,
        *,
        divisor: float = 1.0,
        elects: bool = False,
        normalizes: bool = False,
        least: float = 0.0,
    ) -> None:
        import numpy as np

        self._weights, self._factors = np.array(weights, np.float32), np.array(factors, np.float32)
        self._tables = np.concatenate([each.reshape(-1) for each in tables]).astype(np.float32, copy=False)
        self._how = int(elects), int(normalizes), least, divisor, scale
        self._rows = np.empty((len(weights) + 3) * SUMMED, np.float32)

    def put(
        self,
        models: Sequence[int],
        dtypes: Sequence[DType],
        base: int,
        base_dtype: DType,
        bits: Sequence[Array | None],
        out: int,
        out_dtype: DType,
        elems: int,
    ) -> bool:
        """Writes the rounded results. Returns whether all are finite; else some may be wrong.

        ``models``, ``base``, ``out``: the addresses of their numbers. ``bits``: the mask of each model; None without one.
        """
        import numpy as np

        places, codes = np.array(models, np.uintp), np.array([CODES[dtype] for dtype in dtypes], np.int32)
        masks = np.array([0 if each is None else address(each) for each in bits], np.uintp)
        odd: int = functions().streammerge_differences(
            elems,
            len(places),
            address(places),
            address(codes),
            base,
            CODES[base_dtype],
            address(masks),
            address(self._tables),
            address(self._factors),
            address(self._weights),
            *self._how,
            out,
            CODES[out_dtype],
            address(self._rows),
        )
        return not odd


def add_magnitudes(
    totals: Array,
    begun: bool,
    model: int,
    dtype: DType,
    base: int,
    base_dtype: DType,
    bits: Array | None,
    table: Array,
    grain: int,
    elems: int,
) -> None:
    """Adds the sums of the magnitudes of all differences and of those that a mask keeps to two totals in float64, grain by
    grain. ``begun``: whether the totals have begun; else they begin with the first grain. ``table``: what 8 bits stand for,
    1 and 0 in float32."""
    mask = None if bits is None else address(bits)
    functions().streammerge_magnitudes(
        elems, model, CODES[dtype], base, CODES[base_dtype], mask, address(table), grain, address(totals), begun
    )
