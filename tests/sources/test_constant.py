"""One number everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from conftest import octets

from sources.suite import DTYPES, SHAPES, Case, Disk, SourceSuite, draw
from streammerge.sources.constant import Constant
from streammerge.sources.rows import rows_of
from streammerge.tensors.dtypes import BY_TORCH_NAME
from streammerge.tensors.spec import TensorSpec


class TestConstant(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            number = draw((1,), dtype, 3)
            for shape in SHAPES:
                spec = TensorSpec("w", BY_TORCH_NAME[str(dtype)[6:]], shape)
                yield Case(Constant(spec, octets(number)), number[0].expand(shape).clone())
                yield Case(Constant(spec), torch.zeros(shape, dtype=dtype))
        spec = TensorSpec("w", BY_TORCH_NAME["float32"], (9, 4))
        yield Case(rows_of(Constant(spec), 2, 5), torch.zeros(3, 4))
