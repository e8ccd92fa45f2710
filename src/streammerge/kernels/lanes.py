"""Sums of many numbers in float64, in one order on every machine.

Number i is added to the sum ``i % LANES``, which begins with 0. Then the upper half of the sums is added to the lower one,
until one is left. Vector instructions of any width add in this order. The sums of torch depend on the width that it was
compiled for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.compiled.library import LANES, library
from streammerge.compiled.numbers import CODES
from streammerge.kernels.places import dtype_of
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]

_AT_ONCE = 1 << 15
"""So many numbers are converted to float64 at once."""


def row_sums(rows: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each row of a matrix of floating-point numbers, in float64."""
    import torch

    rows = rows.detach().cpu().resolve_neg()
    compiled, code = library(), CODES.get(dtype_of(rows))
    if compiled is None or code is None or not rows.is_contiguous():
        return torch.from_numpy(_row_sums(rows))
    made = torch.empty(len(rows), dtype=torch.float64)
    compiled.streammerge_row_sums(rows.data_ptr(), code, *rows.shape, made.data_ptr())
    return made


def _row_sums(rows: torch.Tensor) -> Array:
    import numpy as np
    import torch

    count, elems = rows.shape
    lanes, whole = np.zeros((count, LANES)), elems // LANES * LANES
    step = max(_AT_ONCE // max(count, 1) // LANES, 1) * LANES if rows.dtype != torch.float64 else max(whole, 1)
    with np.errstate(all="ignore"):
        for start, stop in ranges(whole, step):
            part = rows[:, start:stop].double().numpy().reshape(count, (stop - start) // LANES, LANES)
            if start:  # the first of these is added to the sums so far, and so on
                part[:, 0] += lanes
            np.add.reduce(part, axis=1, out=lanes)
        lanes[:, : elems - whole] += rows[:, whole:].double().numpy()
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
    found: Array = lanes[:, 0]
    return found
