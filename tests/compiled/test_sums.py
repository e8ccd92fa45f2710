"""Sums by compiled functions against numpy's operations, one by one, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from streammerge.compiled import library
from streammerge.compiled.sums import MOST_SOURCES, TILES_ELEMS, CompiledSums, address_of
from streammerge.tensors.dtypes import DType

pytestmark = pytest.mark.skipif(library.library() is None, reason="the package was built without a C compiler")
BITS = {DType.F64: np.uint64, DType.F32: np.uint32, DType.BF16: np.uint16, DType.F16: np.uint16}
NUMBERS = {DType.F64: np.float64, DType.F32: np.float32, DType.F16: np.float16}


def widened(bits: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype == DType.BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(NUMBERS[dtype]).astype(np.float64)


def narrowed(numbers: np.ndarray, dtype: DType) -> np.ndarray:
    """Returns the bits of finite numbers, rounded to the nearest, to the even one of two."""
    single = numbers if dtype == DType.F64 else numbers.astype(np.float32)
    if dtype == DType.BF16:
        bits = single.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return single.astype(NUMBERS[dtype]).view(BITS[dtype])


def put(sums: CompiledSums, rows: list[np.ndarray], outs: list[DType]) -> tuple[list[np.ndarray], list[bool]]:
    made = [np.zeros(len(rows[0]), BITS[out]) for out in outs]
    places = [[each.__array_interface__["data"][0] for each in arrays] for arrays in (rows, made)]
    return made, sums.put(*places, len(rows[0]))


def drawn(dtype: DType, seed: int, elems: int) -> np.ndarray:
    """Any finite bits."""
    made = np.random.default_rng(seed).integers(0, 2 ** (8 * dtype.element_bytes), elems, BITS[dtype])
    with np.errstate(all="ignore"):
        wide = widened(made, dtype)
    made[~(np.abs(wide) < 1e4)] = 0
    return made


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_all_numbers_of_16_bits_are_read_and_written(dtype: DType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        wide = widened(bits, dtype)
    bits = bits[np.isfinite(wide)]
    wide = wide[np.isfinite(wide)]
    for out in (dtype, DType.F64, DType.F32):
        (made,), (finite,) = put(CompiledSums([[1.0]], [(1.0, False)], [dtype], [out]), [bits], [out])
        assert finite
        assert np.array_equal(made, bits if out == dtype else narrowed(wide, out))


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16, DType.F32])
def test_numbers_are_rounded_as_numpy_rounds_them(dtype: DType) -> None:
    """Every number of 16 bits, the middles between two, and what lies beside these."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        each = widened(bits, DType.F16 if dtype == DType.F32 else dtype)
    each = each[np.isfinite(each)]
    middles = (np.sort(each)[1:] + np.sort(each)[:-1]) / 2
    single = middles.astype(np.float32)
    beside = [np.nextafter(single, np.float32(side)).astype(np.float64) for side in (-np.inf, np.inf)]
    close = [np.nextafter(middles, side) for side in (-np.inf, np.inf)]
    numbers = np.concatenate([each, middles, *beside, *close])
    (made,), (finite,) = put(
        CompiledSums([[1.0]], [(1.0, False)], [DType.F64], [dtype]), [numbers.view(np.uint64)], [dtype]
    )
    assert finite
    assert np.array_equal(made, narrowed(numbers, dtype))


@pytest.mark.parametrize("elems", [0, 1, 7, 519, 520, 521, 3001])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 70, MOST_SOURCES])
def test_products_are_rounded_before_they_are_added(elems: int, count: int) -> None:
    kinds = [list(BITS)[number % 4] for number in range(count)]
    rows = [drawn(kind, number, elems) for number, kind in enumerate(kinds)]
    weights = np.random.default_rng(1).normal(size=(3, count))
    quotients, outs = [(1.0, False), (3.0, True), (0.25, False)], [DType.F32, DType.BF16, DType.F64]
    made, finite = put(CompiledSums(weights.tolist(), quotients, kinds, outs), rows, outs)
    assert finite == [True] * 3
    for own, (number, divides), out, found in zip(weights, quotients, outs, made, strict=True):
        total = widened(rows[0], kinds[0]) * own[0]
        for row, kind, weight in zip(rows[1:], kinds[1:], own[1:], strict=True):
            total = total + widened(row, kind) * weight
        assert np.array_equal(found, narrowed(total / number if divides else total * number, out))


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_sources_can_be_added_a_few_at_a_time(at_once: int) -> None:
    kinds = [DType.BF16, DType.F32, DType.F64, DType.F16, DType.BF16]
    rows = [drawn(kind, number, 1999) for number, kind in enumerate(kinds)]
    sums = CompiledSums([[0.1, 0.2, -0.3, 0.7, 1.0]], [(1.7, True)], kinds, [DType.BF16])
    (wanted,), _ = put(sums, rows, [DType.BF16])
    made, totals = np.zeros(1999, np.uint16), np.full(1999, np.nan)
    for first in range(0, 5, at_once):
        places = [row.__array_interface__["data"][0] for row in rows[first : first + at_once]]
        last = first + at_once >= 5
        assert sums.add(first, places, made.__array_interface__["data"][0] if last else None, totals)
    assert np.array_equal(made, wanted)


@pytest.mark.parametrize("out", list(BITS))
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, "large"])
@pytest.mark.parametrize("place", [0, 1003, 2000])
def test_a_number_that_is_not_finite_is_found(out: DType, value: float | str, place: int) -> None:
    most = {DType.F64: 1.7e308, DType.F32: 3.3e38, DType.BF16: 3.3e38, DType.F16: 40_000.0}[out]
    row = np.zeros(2001)
    row[place] = most if value == "large" else value
    for weight, wanted in ((1.0, value == "large"), (2.0, False)):
        sums = CompiledSums([[weight], [0.5]], [(1.0, False)] * 2, [DType.F64], [out, DType.F64])
        _, finite = put(sums, [row.view(np.uint64)], [out, DType.F64])
        assert finite == [wanted, value == "large"]


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_numbers_may_lie_at_odd_addresses(dtype: DType, shift: int) -> None:
    row = drawn(dtype, 5, 3001)
    held = np.zeros(row.nbytes + 8, np.uint8)
    held[shift : shift + row.nbytes] = row.view(np.uint8)
    into = np.zeros(row.nbytes + 8, np.uint8)
    sums = CompiledSums([[1.0]], [(1.0, False)], [dtype], [dtype])
    assert sums.put([address_of(memoryview(held[shift:]))], [address_of(memoryview(into[shift:]))], 3001) == [True]
    assert into[shift : shift + row.nbytes].tobytes() == row.tobytes()
    assert not into[:shift].any()
    assert not into[shift + row.nbytes :].any()


def test_other_memory_is_left_alone() -> None:
    memory = np.full(TILES_ELEMS + 8, 7.0)
    kinds = [DType.BF16] * 65
    sums = CompiledSums([[1.0] * 65], [(1.0, False)], kinds, [DType.F32], memory[:TILES_ELEMS])
    put(sums, [drawn(DType.BF16, number, 5000) for number in range(65)], [DType.F32])
    assert (memory[TILES_ELEMS:] == 7).all()


@pytest.mark.parametrize(
    ("out", "least"),
    [(DType.BF16, np.uint32(0x7F7F8000).view(np.float32)), (DType.F16, np.float32(65520)), (DType.F32, None)],
)
def test_the_least_number_that_is_rounded_to_infinity(out: DType, least: np.float32 | None) -> None:
    first = 2.0**128 * (1 - 2.0**-25) if least is None else float(least)  # halfway to what would be the next float32
    below = np.nextafter(first, 0.0) if least is None else float(np.nextafter(least, np.float32(0)))
    for number, wanted in ((first, False), (below, True)):
        for sign in (1, -1):
            row = np.full(11, sign * number)
            _, finite = put(CompiledSums([[1.0]], [(1.0, False)], [DType.F64], [out]), [row.view(np.uint64)], [out])
            assert finite == [wanted]
