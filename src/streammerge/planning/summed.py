"""Tensors whose many models are summed by products (:mod:`streammerge.running.summing`), and the memory that it takes."""

from __future__ import annotations

from streammerge.compiled.library import library
from streammerge.planning.tasks import MergeTask
from streammerge.tensors.dtypes import DType

LEAST = 6
"""So many models. Fewer are summed as fast one by one."""
BESIDE = 8 + 8 + 4
"""Bytes beside an element of all sources: its sum, an end of the bound, and the result that belongs to it."""
_NARROW = (DType.BF16, DType.F16)
_OUT = (*_NARROW, DType.F32)
_WIDE_BYTES = 768 << 10
"""Numbers in float64 that a product is made of: a part of a core's own cache."""
_ROWS_BYTES = 4 << 20
"""Numbers of all sources that are read at once."""
_STEP = 64


def is_summed(task: MergeTask) -> bool:
    """Whether so many models of 16-bit numbers are summed that products are faster. They are not with numbers of 32 bits,
    which take as long to read into memory as products save. Compiled functions are faster than both."""
    sources = task.sources
    if library() is not None or not task.method.sums or len(sources) < LEAST or task.compute != "float64":
        return False
    first = sources[0].spec.dtype
    return first in _NARROW and task.out.dtype in _OUT and all(source.spec.dtype == first for source in sources)


def sizes(sources: int, element_bytes: int) -> tuple[int, int]:
    """Returns the elements of each source in a product, and in a block, which is several products."""
    tile = max(_WIDE_BYTES // 8 // sources // _STEP, 1) * _STEP
    return tile, max(_ROWS_BYTES // element_bytes // sources // tile, 1) * tile


def summed_bytes(sources: int, element_bytes: int) -> int:
    """Returns the memory for the sums of so many sources."""
    tile, block = sizes(sources, element_bytes)
    return sources * (tile * 8 + block * element_bytes) + block * BESIDE
