"""8-bit codes as float32: each of the 256 codes against torch's own conversion."""

from __future__ import annotations

import pytest
import torch

from streammerge.sources.narrow import factor_of, fits, scales_of, scratch_bytes, widened
from streammerge.tensors.dtypes import DType

CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.I8, DType.F32])
def test_every_code(dtype: DType) -> None:
    codes = torch.linspace(-3, 3, 256) if dtype is DType.F32 else CODES.view(dtype.torch)
    made = torch.empty(256)
    widened(memoryview(codes.view(torch.uint8).numpy()), dtype, made, memoryview(bytearray(scratch_bytes(dtype, 256))))
    made *= factor_of(dtype)
    assert torch.equal(made.nan_to_num(nan=9e9), codes.float().nan_to_num(nan=9e9))
    assert torch.equal(made.signbit()[~made.isnan()], codes.float().signbit()[~made.isnan()])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_scales_are_their_dtype_in_float32(name: str) -> None:
    dtype = DType(name)
    given = CODES.view(dtype.torch) if dtype.bits == 8 else torch.randn(256).to(dtype.torch)
    made = scales_of(memoryview(bytearray(given.view(torch.uint8).numpy().tobytes())), dtype)
    assert torch.equal(made.nan_to_num(nan=9e9), given.float().nan_to_num(nan=9e9))


@pytest.mark.parametrize("dtype", [DType.U8, DType.F8_E8M0])
def test_exponents_are_powers_of_two(dtype: DType) -> None:
    made = scales_of(memoryview(bytearray(range(256))), dtype).double()
    assert [float(made[code]) for code in range(255)] == [2.0 ** (code - 127) for code in range(255)]
    assert made[255].isnan()


def test_huge_scales_do_not_fit() -> None:
    assert fits(torch.tensor([1.0, -(2.0**100)]))
    assert not fits(torch.tensor([1.0, -(2.0**121)]))
    assert not fits(torch.tensor([torch.nan]))
