"""What a method looks at again: rows and halves of matrices, in memory or beside it."""

from __future__ import annotations

import pytest
import torch

from streammerge.kernels.group import TensorGroup
from streammerge.kernels.spill import HELD_BYTES, Half, Spill, SpilledRows, half_bytes, held_bytes, spilled, square_of
from streammerge.stores.spilled import SpillFile

Tensor = torch.Tensor


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["memory", "file"])
def room(request: pytest.FixtureRequest) -> Spill:
    return SpillFile(1 << 22) if request.param == "file" else spilled(1 << 22, None)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_a_half_is_a_gram_matrix(size: int, room: Spill) -> None:
    x, y = drawn(40, size), drawn(7, size) + 1
    half, other = Half(size), Half(size)
    half.add_gram(x)
    other.add_gram(y, -0.5)
    half.add_(other)
    wanted = x.T @ x - 0.5 * (y.T @ y)
    torch.testing.assert_close(half.diagonal(), wanted.diagonal(), rtol=0, atol=1e-12)
    assert sum(strip.nbytes for strip in half.strips) == half_bytes(size)
    half.save(room, 48)
    again = square_of(room, 48, size)
    made = half.square()
    assert torch.equal(made, again)
    assert torch.equal(made, made.T)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    assert not half.strips


def test_rows_are_found_again(room: Spill) -> None:
    matrix, rows = drawn(50, 33), SpilledRows(room, 33)
    for start in (30, 0, 20, 10, 40):
        rows.put(start, matrix[start : start + 10])
    assert torch.equal(rows.get(7, torch.empty(21, 33, dtype=torch.float64)), matrix[7:28])


def test_few_bytes_are_held_in_memory() -> None:
    asked: list[int] = []

    def spills(nbytes: int) -> Spill:
        asked.append(nbytes)
        return spilled(nbytes, None)

    group = TensorGroup("w", (1,), 1, torch.float32, lambda *_: iter(()), spills=spills)
    for nbytes in (0, HELD_BYTES, HELD_BYTES + 1):
        group.spill(nbytes)
        assert held_bytes(nbytes) == (0 if nbytes > HELD_BYTES else nbytes)
    assert asked == [HELD_BYTES + 1]
