"""Numbers in another floating-point dtype."""

from __future__ import annotations

import pytest
import torch

from streammerge.sources.base import Allocated, read_whole
from streammerge.sources.memory import Memory
from streammerge.sources.recast import Recast
from streammerge.tensors.dtypes import BY_TORCH_NAME
from streammerge.tensors.spec import TensorSpec


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (70_001,), (3, 5)])
def test_as_torch_does(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(getattr(torch, dtype))
    within = Memory(TensorSpec("t", BY_TORCH_NAME[dtype], shape), tensor, "t")
    source = Recast(TensorSpec("t", BY_TORCH_NAME["float32"], shape), within)
    assert bytes(read_whole(source, Allocated())) == tensor.float().numpy().tobytes()
    if tensor.numel() > 3:
        out = memoryview(bytearray(8))
        assert bytes(source.open(Allocated()).read(1, 3, out)) == tensor.flatten()[1:3].float().numpy().tobytes()
