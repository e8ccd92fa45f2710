"""Numbers of sources in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sources.suite import FLOATS, Disk, Strict, draw
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.dtypes import BY_TORCH_NAME


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn])
def test_every_dtype_is_widened_and_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = draw((7, 5), torch.float32).to(dtype)
    source = Disk(tmp_path).stored(tensor)
    room = Strict(wide_needs(source, 10))
    made = Wide(source, room, 10)
    assert room.scratch_bytes == wide_needs(source, 10).scratch_bytes
    for start, stop in ((0, 10), (25, 35), (3, 4)):
        values = made.read(start, stop)
        assert values.dtype == torch.float64
        assert torch.equal(
            values, tensor.float().double().view(-1)[start:stop] if dtype != torch.float64 else tensor.view(-1)[start:stop]
        )
        out = memoryview(bytearray((stop - start) * tensor.element_size()))
        put(values, out, BY_TORCH_NAME[str(dtype)[6:]])
        assert bytes(out) == bytes(tensor.view(-1)[start:stop].contiguous().view(torch.uint8).numpy().tobytes())
