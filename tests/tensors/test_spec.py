"""Strides and ranges."""

from __future__ import annotations

import torch

from streammerge.tensors.spec import is_contiguous, ranges


def test_contiguity() -> None:
    for tensor in (
        torch.empty(2, 3),
        torch.empty(2, 3).t(),
        torch.empty(0, 3).t(),
        torch.empty(1, 5)[:, ::1].t(),
        torch.empty(4)[::2],
    ):
        assert is_contiguous(tuple(tensor.shape), tensor.stride()) == tensor.is_contiguous()


def test_ranges_cover() -> None:
    assert list(ranges(0, 4)) == []
    assert list(ranges(9, 4)) == [(0, 4), (4, 8), (8, 9)]
