"""The compiled functions of ``arithmetic.c``, where the package was built with a C compiler.

Without them everything is computed by numpy and torch, with the same bytes in more time. ``STREAMMERGE_COMPILED=0`` leaves
them unused.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
"""That of ``arithmetic.c``. A library that was built from another version of it is not used."""
NAME = "arithmetic.so"
LANES, SUMMED = 256, 3 * 256
"""As in ``arithmetic.c``: the sums that numbers are added to in turn, and the numbers that are added at once."""
_I32, _I64, _U32, _F, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p
_FUNCTIONS = {
    "sums": (_I64, _I32, _P, _P, _I32, _P, _P, _P, _P, _P, _P, _I64, _P, _I32, _P),
    "row_sums": (_P, _I32, _I64, _I64, _P),
    "products": (_I64, _I32, _P, _P, _P, _I32, _I64, _P, _P, _P, _I32),
    "choose_bits": (_U32, _U32, _U32, _I32, _U32, _P, _P, _I64),
    "choose_rows": (_I64, _P, _P, _I32, _U32, _P, _P, _I64),
    "mask_f32": (_P, _P, _P, _I64),
    "mask_f64": (_P, _P, _P, _I64),
    "magnitudes": (_I64, _P, _I32, _P, _I32, _P, _P, _I64, _P, _I32),
    "differences": (_I64, _I32, _P, _P, _P, _I32, _P, _P, _P, _P, _I32, _I32, _F, _F, _F, _P, _I32, _P),
}
_RESULTS = {"differences": _I32}


def library() -> ctypes.CDLL | None:
    """Returns the compiled functions, None if there are none. A call of one lets other threads run."""
    return _loaded()


def functions() -> ctypes.CDLL:
    """Returns the compiled functions, for those who have asked whether there are some. Raises RuntimeError if not."""
    found = _loaded()
    if found is None:
        raise RuntimeError("there are no compiled functions")
    return found


@cache
def _loaded() -> ctypes.CDLL | None:
    if os.environ.get("STREAMMERGE_COMPILED") == "0":
        return None
    try:
        found = ctypes.CDLL(str(Path(__file__).with_name(NAME)))
        if found.streammerge_version() != VERSION:
            return None
        for name, arguments in _FUNCTIONS.items():
            function = getattr(found, f"streammerge_{name}")
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
    except (OSError, AttributeError):  # not built, or for another machine
        return None
    return found


def address(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """Returns where the numbers of an array lie. It must be held as long as the address is used."""
    found: int = array.__array_interface__["data"][0]
    return found
