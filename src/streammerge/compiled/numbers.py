"""The dtypes of numbers that compiled functions know."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from streammerge.compiled.library import library
from streammerge.tensors.dtypes import DType

CODES = {DType.F64: 0, DType.F32: 1, DType.BF16: 2, DType.F16: 3}
"""The dtypes that compiled functions know, as in ``arithmetic.c``."""


def known(dtypes: Sequence[DType]) -> bool:
    """Whether there are compiled functions, they know these dtypes, and numpy can be imported, which hands them numbers."""
    return all(dtype in CODES for dtype in dtypes) and library() is not None and _there_is_numpy()


@cache
def _there_is_numpy() -> bool:
    try:
        import numpy  # noqa: F401
    except ImportError:
        return False
    return True
