"""Sums of products by compiled functions against Python's numbers, added in the order that is promised."""

from __future__ import annotations

import numpy as np
import pytest

from streammerge.compiled import library
from streammerge.compiled.library import address
from streammerge.compiled.numbers import CODES
from streammerge.compiled.products import Products
from streammerge.tensors.dtypes import DType

pytestmark = pytest.mark.skipif(library.library() is None, reason="the package was built without a C compiler")


def in_order(numbers: list[float]) -> float:
    lanes = [0.0] * 256
    for place, number in enumerate(numbers):
        lanes[place % 256] += number
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


@pytest.mark.parametrize("elems", [0, 1, 255, 256, 257, 768, 769, 1536, 4001])
@pytest.mark.parametrize("based", [False, True])
def test_products_are_added_in_order_grain_by_grain(elems: int, based: bool) -> None:
    drawn, grain = np.random.default_rng(0), 1000
    kinds = [np.float64, np.float32, np.float16, np.float32]
    codes = [DType.F64, DType.F32, DType.F16, DType.F32]
    rows = [drawn.normal(size=elems).astype(kind) for kind in kinds]
    rows[2][:] = 0.0 if based else -0.0
    base, *models = rows if based else [None, *rows]
    sums = Products(codes[based:], codes[0] if based else None, grain)
    for start in range(0, max(elems, 1), 2000):  # whole grains
        part = [each[start : start + 2000] for each in models]
        own = None if base is None else address(base[start : start + 2000])
        found = sums.add([address(each) for each in part], own, len(part[0]))
    wide = [each.astype(np.float64) - (0 if base is None else base.astype(np.float64)) for each in models]
    wanted = []
    for i, x in enumerate(wide):
        for y in wide[: i + 1]:
            product, total = (x * y).tolist(), 0.0
            for start in range(0, elems, grain):
                of_grain = in_order(product[start : start + grain])
                total = total + of_grain if start else of_grain
            wanted.append(total)
    assert np.array_equal(np.array(found).view(np.uint64), np.array(wanted).view(np.uint64))


@pytest.mark.parametrize("shape", [(1, 0), (3, 1), (2, 255), (4, 768), (3, 1000), (1, 70_001)])
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_rows_are_summed_in_order(shape: tuple[int, int], kind: type) -> None:
    rows = np.random.default_rng(1).normal(size=shape).astype(kind)
    made, found = np.zeros(shape[0]), library.library()
    assert found is not None
    code = CODES[DType.F64 if kind is np.float64 else DType.F32]
    found.streammerge_row_sums(address(rows), code, *shape, address(made))
    assert made.tolist() == [in_order([float(number) for number in row]) for row in rows]
