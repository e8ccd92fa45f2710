"""Infinities and NaN that all inputs have."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge.kernels.agreed import agreed, blank, settle
from streammerge.kernels.group import TensorGroup

SIZES = [1, 7, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 50_001]


def mask_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    found = torch.zeros(len(tensors[0]), dtype=torch.bool)
    for a, b, mask in agreed(lambda source, start, stop: tensors[source][start:stop], len(tensors), 0, len(found)):
        found[a:b] = mask
    return found


@pytest.mark.parametrize("size", SIZES)
def test_an_element_is_agreed_where_all_have_the_same(size: int) -> None:
    first = torch.zeros(size)
    second, third = first.clone(), first.double()
    for place, values in {
        0: (math.inf, math.inf, math.inf),
        size // 2: (math.inf, -math.inf, math.inf),
        size - 1: (math.nan, math.nan, math.nan),
        size // 3: (1.0, math.inf, math.inf),
    }.items():
        first[place], second[place], third[place] = values
    wanted = [
        n
        for n, each in enumerate(zip(first.tolist(), second.tolist(), third.tolist(), strict=True))
        if not math.isfinite(each[0]) and len({repr(one) for one in each}) == 1
    ]
    assert mask_of([first, second.half(), third]).nonzero()[:, 0].tolist() == wanted


def test_large_numbers_of_another_dtype_are_no_infinity() -> None:
    """1e300 is infinite as float32."""
    assert not mask_of([torch.tensor([math.inf]), torch.tensor([1e300], dtype=torch.float64)]).any()


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn, torch.float16, torch.float64])
def test_a_dtype_that_cannot_hold_a_number_is_no_place_for_it(dtype: torch.dtype) -> None:
    source = torch.tensor([math.inf, -math.inf, 1.0, math.nan])
    out = torch.full((4,), math.nan).to(dtype)
    count = settle(out, lambda _, start, stop: source[start:stop], 1, 0, 1, lambda: source)
    if dtype == torch.float8_e4m3fn:  # it has NaN, and no infinity
        assert count == 1
    else:
        assert count == 3
        assert out.double().nan_to_num(7, 8, 9).tolist() == [8, 9, 7, 7]


def test_the_bits_of_nan_are_kept() -> None:
    bits = torch.tensor([0x7FC12345, -0x3EDCBB], dtype=torch.int32)
    out = torch.full((2,), math.nan)
    assert settle(out, lambda _, start, stop: bits.view(torch.float32)[start:stop], 1, 0, 1, lambda: out) == 2
    assert torch.equal(out.view(torch.int32), bits)


def test_a_finite_result_is_the_methods_own() -> None:
    out = torch.tensor([0.0, 5.0, math.inf])
    sources = [torch.tensor([math.inf] * 3)] * 2
    assert settle(out, lambda source, start, stop: sources[source][start:stop], 2, 0, 1, lambda: out) == 1
    assert out.tolist() == [0.0, 5.0, math.inf]


def test_blank_sets_zeros() -> None:
    one, two = torch.tensor([math.inf, math.nan, 3.0, math.inf]), torch.tensor([math.inf, math.nan, 4.0, 1.0])
    blank(values := two.double(), lambda source, start, stop: [one, two][source][start:stop], 2, 0, 4)
    assert values.tolist() == [0.0, 0.0, 4.0, 1.0]


def test_sums_and_searches_leave_them_out() -> None:
    one = torch.arange(20_000.0)
    two = -one
    for tensor in (one, two):
        tensor[::3] = math.inf
    group = TensorGroup.of(one, two)
    assert float(group.gram()[0, 1]) == -float((one[one.isfinite()].double() ** 2).sum())
    based = TensorGroup.of(one, base=two)
    ((cut,),) = based.kth_largest(lambda chunk: [chunk.delta(0).abs_()], [[100]])
    assert cut.threshold == one[one.isfinite()].mul(2).sort(descending=True).values[99]


def test_infinities_that_inputs_do_not_share_reach_the_sums() -> None:
    group = TensorGroup.of(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0]))
    assert group.gram().isfinite().tolist() == [[False, False], [False, True]]
