"""Experts of gpt-oss, against the number of each element."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantised.samples import mxfp4_experts as sample
from sources.suite import Case, Disk, SourceSuite
from streammerge.errors import MismatchError
from streammerge.sources.mxfp4_experts import mxfp4_experts
from streammerge.tensors.dtypes import DType


class TestMxfp4Experts(SourceSuite):
    dtype = DType.F32

    def cases(self, disk: Disk) -> Iterator[Case]:
        for experts, outputs, groups in ((1, 1, 1), (3, 10, 2), (2, 70, 33)):
            blocks, scales, expected = sample(experts, outputs, groups)
            yield Case(mxfp4_experts("w", disk.stored(blocks), disk.stored(scales)), expected)


def test_blocks_and_scales_must_fit(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    blocks, scales, _ = sample(2, 3, 4)
    for one, two in ((blocks, scales[:1]), (blocks[..., :8], scales), (blocks[0], scales[0]), (blocks.int(), scales)):
        with pytest.raises(MismatchError, match=r"w: .* of w are no scales of"):
            mxfp4_experts("w", disk.stored(one.contiguous()), disk.stored(two.contiguous()))
