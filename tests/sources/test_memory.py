"""Tensors that the caller holds, of torch and numpy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from conftest import load_safetensors

import streammerge as sm
from sources.suite import DTYPES, SHAPES, Case, Disk, SourceSuite, draw, room
from sources.test_strided import views
from streammerge.kernels.chunk import Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import MergeMethod
from streammerge.sources.base import read_whole
from streammerge.sources.memory import in_memory
from streammerge.sources.rows import gathered


class TestTorch(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            for shape in SHAPES:
                tensor = draw(shape, dtype)
                yield Case(in_memory("w", tensor), tensor)
            for view in views(dtype):
                yield Case(in_memory("w", view), view)
        numbers = draw((6, 5), torch.complex64)
        for view in (numbers.conj(), numbers.conj().t(), numbers.conj().imag):
            yield Case(in_memory("w", view), view)
        parameter = torch.nn.Parameter(draw((300, 500), torch.float32))
        yield Case(in_memory("w", parameter), parameter.detach())
        yield Case(gathered(in_memory("w", parameter.t()), [4, 2, 2]), parameter.detach().t()[[4, 2, 2]])


class TestNumpy(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64, torch.int64, torch.uint8, torch.bool):
            for shape in SHAPES:
                tensor = draw(shape, dtype)
                yield Case(in_memory("w", tensor.numpy()), tensor)
            for view in views(dtype):
                yield Case(in_memory("w", view.numpy()), view)
        turned = draw((300, 500), torch.float32)
        yield Case(in_memory("w", turned.numpy()[::-1, ::-2]), turned.flip(0, 1)[:, ::2])
        yield Case(in_memory("w", numpy.float32(3)), torch.tensor(3.0))
        frozen = turned.numpy().copy()
        frozen.flags.writeable = False
        yield Case(in_memory("w", frozen), turned)


def test_the_callers_numbers_cannot_be_changed_through_what_is_read() -> None:
    for values in (torch.arange(9.0), numpy.arange(9.0, dtype="f4")):
        reader = in_memory("w", values).open(room())
        made = reader.read(3, 6, memoryview(bytearray(12)))
        torch.frombuffer(made, dtype=torch.float32).mul_(2)
        assert values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
        values[3] = 70
        assert torch.frombuffer(reader.read(3, 6, memoryview(bytearray(12))), dtype=torch.float32).tolist() == [70, 4, 5]


@pytest.mark.parametrize("shape", [(1,), (7, 3), (300_001,)])
def test_a_method_that_changes_raw_numbers_in_place(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Inputs are never written, also those in memory."""

    def doubling(group: TensorGroup) -> Kernel:
        return lambda chunk: chunk.raw(0).mul_(2)

    doubling.contract = MergeMethod("doubling", doubling, passes=False)  # type: ignore[attr-defined]
    for number, values in enumerate((torch.ones(shape), numpy.ones(shape, dtype="f4"))):
        sm.merge([{"w": values}], tmp_path / f"{number}.safetensors", method=doubling)
        assert bool((values == 1).all())
        assert bool((load_safetensors(tmp_path / f"{number}.safetensors")["w"] == 2).all())


def test_the_same_numbers_are_one_tensor() -> None:
    base = torch.arange(12.0)
    array = base.numpy()
    assert in_memory("a", base).place == in_memory("b", base[:]).place == in_memory("c", base.detach()).place
    assert in_memory("a", array).place == in_memory("b", array[:]).place
    for other in (base[1:], base[:11], base.view(3, 4), base.view(torch.int32), base.clone()):
        assert in_memory("a", base).place != in_memory("a", other).place
    assert bytes(read_whole(in_memory("a", base.view(3, 4).t()), room())) != bytes(read_whole(in_memory("a", base), room()))


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
        torch.nn.LazyLinear(3).weight,
        numpy.ones(3, dtype=">f4"),
        numpy.array(["a"]),
        numpy.array([None]),
    ],
)
def test_what_cannot_be_read_is_refused(values: object) -> None:
    with pytest.raises(sm.FormatError, match="tensor w"):
        in_memory("w", values)
