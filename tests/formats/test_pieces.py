"""Tensors in pieces of several ranks: every layout that can be cut apart is joined, every other one is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import streammerge as sm
from streammerge.formats.pieces import PieceOf, assembled, check_boxes
from streammerge.sources.base import Allocated, read_whole
from streammerge.sources.inline import Inline
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

NOWHERE = parse(str(Path("nowhere")))


def piece(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> PieceOf:
    part = tensor
    for axis, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
        part = part.narrow(axis, at, size)
    data = part.contiguous().numpy().tobytes()
    return PieceOf(offsets, Inline(TensorSpec("t", DType.F32, sizes), NOWHERE, 0, data))


def boxes_of(
    shape: tuple[int, ...], random: random.Random, depth: int = 3
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts a tensor at random places, as often as ``depth`` says."""
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    if not axes or not depth:
        return [((0,) * len(shape), shape)]
    axis = random.choice(axes)
    at = random.randrange(1, shape[axis])
    made = []
    for begin, end in ((0, at), (at, shape[axis])):
        inner = (*shape[:axis], end - begin, *shape[axis + 1 :])
        for offsets, sizes in boxes_of(inner, random, depth - 1):
            made.append(((*offsets[:axis], offsets[axis] + begin, *offsets[axis + 1 :]), sizes))
    return made


@pytest.mark.parametrize("seed", range(40))
def test_random_cuts(seed: int) -> None:
    choose = random.Random(seed)
    shape = tuple(choose.randrange(1, 9) for _ in range(choose.randrange(1, 5)))
    tensor = torch.randn(shape)
    boxes = boxes_of(shape, choose)
    choose.shuffle(boxes)
    check_boxes(boxes, shape, "it")
    spec = TensorSpec("t", DType.F32, shape)
    source = assembled(spec, [piece(tensor, *box) for box in boxes], NOWHERE, "it")
    assert source.spec == spec
    assert read_whole(source, Allocated()) == tensor.numpy().tobytes()
    for _ in range(5):
        start = choose.randrange(tensor.numel())
        stop = choose.randrange(start, tensor.numel()) + 1
        out = memoryview(bytearray(4 * (stop - start)))
        assert bytes(source.open(Allocated()).read(start, stop, out)) == tensor.flatten()[start:stop].numpy().tobytes()


def test_parts_that_lie_across_each_other() -> None:
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    check_boxes(boxes, (3, 3), "it")
    with pytest.raises(sm.FormatError, match="lie across each other"):
        assembled(TensorSpec("t", DType.F32, (3, 3)), [piece(torch.ones(3, 3), *box) for box in boxes], NOWHERE, "it")


def test_as_many_elements_at_the_wrong_places() -> None:
    boxes = [((0,), (2,)), ((1,), (2,))]
    check_boxes(boxes, (4,), "it")
    with pytest.raises(sm.FormatError, match="overlap"):
        assembled(TensorSpec("t", DType.F32, (4,)), [piece(torch.ones(4), *box) for box in boxes], NOWHERE, "it")
    boxes = [((0,), (1,)), ((2,), (1,)), ((3,), (1,)), ((3,), (1,))]
    with pytest.raises(sm.FormatError, match=r"hole|overlap"):
        assembled(TensorSpec("t", DType.F32, (4,)), [piece(torch.ones(4), *box) for box in boxes], NOWHERE, "it")


@pytest.mark.parametrize("boxes", [[((0,), (1,)), ((2,), (2,))], [((0,), (1,)), ((1,), (2,))], [((1,), (3,))]])
def test_a_hole_is_never_zeros(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    with pytest.raises(sm.FormatError, match="has a hole"):
        check_boxes(boxes, (4,), "it")
    with pytest.raises(sm.FormatError, match=r"has a hole|another part of it is missing"):
        assembled(TensorSpec("t", DType.F32, (4,)), [piece(torch.ones(4), *box) for box in boxes], NOWHERE, "it")
