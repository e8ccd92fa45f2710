"""Buffers are used again, and only when nobody reads them any more."""

from __future__ import annotations

import torch

from streammerge.stores.buffers import Buffers


def test_a_buffer_is_used_again_when_no_view_is_left() -> None:
    buffers = Buffers(4096)
    first = buffers.take(4096)
    first[:] = b"a" * 4096
    part = first[100:200]
    del first
    second = buffers.take(4096)
    second[:] = b"b" * 4096
    assert bytes(part) == b"a" * 100, "a part that is still read keeps the whole buffer"
    del part
    third = buffers.take(1000)
    assert bytes(third) == b"a" * 1000, "the first buffer"
    assert len(third) == 1000


def test_a_tensor_keeps_its_buffer() -> None:
    buffers = Buffers(4096)
    tensor = torch.frombuffer(buffers.take(4096), dtype=torch.float32)
    tensor[:] = 1.0
    again = buffers.take(4096)
    again[:] = bytes(4096)
    assert torch.equal(tensor, torch.ones(1024))


def test_a_longer_one_is_not_kept() -> None:
    buffers = Buffers(4096)
    assert len(buffers.take(5000)) == 5000
    assert not buffers._free
