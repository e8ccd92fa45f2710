"""Which chunks compiled functions can take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.places import dtype_of, places, single_places
from streammerge.tensors.dtypes import DType


def looked(group: TensorGroup, look: Callable[[Chunk], object]) -> object:
    """Returns what a look finds in the only chunk of a group."""
    (found,) = group.sweep(lambda chunk: [], lambda _, chunks: [look(chunk) for chunk in chunks], 0, group.elems)
    return found[0]


def test_places_of_base_and_models(compiled_or_not: bool) -> None:
    base, model = torch.ones(7).bfloat16(), torch.ones(7)
    group = TensorGroup.of(model, base=base)
    wanted = [(base.data_ptr(), DType.BF16), (model.data_ptr(), DType.F32)] if compiled_or_not else None
    assert looked(group, places) == looked(group, single_places) == wanted
    assert looked(group, lambda chunk: places(chunk.hiding())) is None


@pytest.mark.parametrize("model", [torch.ones(7, dtype=torch.int32), torch.ones(7, dtype=torch.float8_e4m3fn)], ids=str)
def test_other_dtypes_have_none(model: torch.Tensor) -> None:
    assert looked(TensorGroup.of(model, base=torch.ones(7)), places) is None


def test_what_computes_otherwise_has_none_of_float32(compiled_or_not: bool) -> None:
    wide = TensorGroup.of(torch.ones(7), base=torch.ones(7), compute=torch.float64)
    assert (looked(wide, places) is not None) is compiled_or_not
    assert looked(wide, single_places) is None
    assert looked(TensorGroup.of(torch.ones(7)), single_places) is None
    mixed = TensorGroup.of(torch.ones(7).double(), base=torch.ones(7), compute=torch.float32)
    assert looked(mixed, single_places) is None


def test_the_dtype_of_a_tensor() -> None:
    assert [dtype_of(torch.ones(1, dtype=dtype.torch)) for dtype in (DType.F16, DType.I8, DType.BOOL)] == [
        DType.F16,
        DType.I8,
        DType.BOOL,
    ]
