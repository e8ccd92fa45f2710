"""Kernels make tensors chunk by chunk; what goes wrong is told with tensor and elements."""

from __future__ import annotations

import pytest
import torch

from running.test_makers import CHUNK, MODELS, WEIGHTS, N, Opening, bench, kernel_maker, made
from streammerge.errors import BudgetError, TaskError
from streammerge.kernels.batch import Batch
from streammerge.kernels.chunk import Chunk
from streammerge.methods.registry import find_method
from streammerge.planning.tasks import Piece
from streammerge.running.computing import KernelMaker, bind, chunk_of, failures, no_sweep, put_batch
from streammerge.running.workspace import Outgoing
from streammerge.units import PAGE_BYTES

__all__ = ["bench"]


def test_a_chunk_has_the_numbers_of_each_model(bench: Opening) -> None:
    models = [torch.randn(N).half() for _ in range(2)]
    at = bench(models, weight=[1.0, 1.0])
    for start, stop in ((0, 10), (N - CHUNK, N), (3, 4)):
        chunk = chunk_of(at.task, at.source, at.workspace, start, stop)
        assert (chunk.start, chunk.stop, chunk.compute) == (start, stop, torch.float64)
        for found, model in zip(chunk.models, models, strict=True):
            assert torch.equal(found, model[start:stop].double())


def test_a_kernel_must_make_as_many_numbers_as_its_chunk_has(bench: Opening) -> None:
    at = bench([torch.randn(100).half()], weight=[1.0])

    def short(chunk: Chunk) -> torch.Tensor:
        return chunk.load(0)[1:]

    with pytest.raises(ValueError, match="its kernel made 99 numbers of a chunk of 100"):
        made(KernelMaker(short, at.task, at.source, at.workspace, CHUNK), 0, 100, 2)


def test_a_kernel_may_make_rows(bench: Opening) -> None:
    model = torch.randn(100).half()
    at = bench([model], weight=[1.0])
    maker = KernelMaker(lambda chunk: chunk.load(0).view(10, 10), at.task, at.source, at.workspace, CHUNK)
    assert made(maker, 0, 100, 2) == bytes(model.view(torch.uint8).numpy())


def test_a_method_that_makes_other_passes_is_told(bench: Opening) -> None:
    at = bench([torch.randn(100).half() for _ in range(2)], method=find_method("slerp"), t=0.3)
    with pytest.raises(ValueError, match="other passes when it is bound a second time"):
        bind(at.task, no_sweep)


def test_errors_name_tensor_and_elements_but_our_own_are_left(bench: Opening) -> None:
    at = bench([torch.randn(100).half()], weight=[1.0])
    said = r"^w \(linear, elements 3 to 7\) failed: division by zero$"
    with pytest.raises(TaskError, match=said) as caught, failures(at.task, 3, 7):
        raise ZeroDivisionError("division by zero")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(BudgetError, match=r"^full$"), failures(at.task, 3, 7):
        raise BudgetError("full")


@pytest.mark.parametrize("odd", [None, float("nan"), float("inf")])
def test_tensors_of_one_shape_are_made_at_once_unless_a_number_is_not_finite(odd: float | None, bench: Opening) -> None:
    """Two tensors of 50 elements lie one after the other in each input."""
    models = [torch.randn(100).half() for _ in range(2)]
    if odd is not None:
        models[1][70] = odd
    at = bench(models, method=find_method("slerp"), t=0.3)
    batches = list[Batch]()
    method = at.task.method

    def batch(given: Batch, parameters: object) -> torch.Tensor:
        batches.append(given)
        return given.chunk.load(0).add_(given.chunk.load(1, "other"))

    object.__setattr__(at.task, "method", _With(method, batch))
    pieces = [Piece(at.task, number, 0, 50) for number in range(2)]
    outgoing = Outgoing(lambda data, offset: None, memoryview(bytearray(1 << 20)[: (1 << 19) + PAGE_BYTES]), 0)
    before = outgoing.room(64)
    before[:] = b"x" * 64
    data = put_batch(pieces, at.source, at.workspace, outgoing, None)
    assert (len(batches[0].names), batches[0].models, batches[0].chunk.elems) == (2, 2, 100)
    if odd is None:
        assert data is not None
        assert bytes(data) == bytes(models[0].double().add(models[1].double()).half().view(torch.uint8).numpy())
        assert outgoing.last(200) == data
    else:
        assert data is None
        assert outgoing.last(64) == b"x" * 64, "what was made is taken back"


class _With:
    """A method with another ``batch``."""

    def __init__(self, method: object, batch: object) -> None:
        self._method, self.batch = method, batch

    def __getattr__(self, name: str) -> object:
        return getattr(self._method, name)


def test_counts_of_chunks_are_summed(bench: Opening) -> None:
    models = [torch.randn(N).half() for _ in range(MODELS)]
    for place in (5, CHUNK + 5, CHUNK + 6):
        models[2][place] = torch.nan
    at = bench(models, weight=WEIGHTS)
    maker = kernel_maker(at)
    made(maker, 0, N, 2)
    assert maker.nonfinite == {at.source.origin(2): 3}
