"""The dtypes of numbers that compiled functions know."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.compiled.library import library
from streammerge.tensors.dtypes import DType

CODES = {DType.F64: 0, DType.F32: 1, DType.BF16: 2, DType.F16: 3}
"""The dtypes that compiled functions know, as in ``arithmetic.c``."""


def known(dtypes: Sequence[DType]) -> bool:
    """Whether there are compiled functions, and they know these dtypes."""
    return all(dtype in CODES for dtype in dtypes) and library() is not None
