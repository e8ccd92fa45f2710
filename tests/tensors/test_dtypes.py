"""The dtype table agrees with torch."""

from __future__ import annotations

import torch

from streammerge.tensors.dtypes import DType, parse_dtype


def test_the_dtype_table_agrees_with_torch() -> None:
    for dtype in DType:
        assert dtype.torch.itemsize == dtype.element_bytes
        assert dtype.torch.is_floating_point == (dtype.kind == "float" or dtype.kind == "packed")
        assert dtype.torch.is_complex == (dtype.kind == "complex")
        if dtype.storage_class:
            assert getattr(torch, dtype.storage_class).dtype == dtype.torch
        assert parse_dtype(dtype.torch) is parse_dtype(dtype.value) is parse_dtype(dtype.torch_name) is dtype
