"""Every maker makes the same bytes and finds the same numbers that are not finite, whoever settles them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from streammerge.kernels.agreed import AGREED
from streammerge.methods.registry import COPY, find_method
from streammerge.planning.budget import Budget, Cost
from streammerge.planning.summed import summed_bytes
from streammerge.planning.tasks import MergeTask
from streammerge.running.computing import KernelMaker, bind, no_sweep
from streammerge.running.copying import ReaderCopier, StoredCopier
from streammerge.running.makers import Maker
from streammerge.running.plain import NumpyMaker, PlainNumbers
from streammerge.running.summing import ProductMaker, by_products
from streammerge.running.workspace import Inputs, Outgoing, Workspace, prepare_torch
from streammerge.sources.stored import Stored
from streammerge.stores.inputs import InputFiles, statuses
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec
from streammerge.units import PAGE_BYTES

MODELS, N, CHUNK = 7, 3 * GRAIN + 1234, GRAIN
WEIGHTS = [0.1, 0.3, 0.2, 0.25, 0.5, -0.4, 0.7]


class Bench(NamedTuple):
    """What a worker gives to a maker."""

    task: MergeTask
    source: Inputs
    files: InputFiles
    workspace: Workspace


def kernel_maker(at: Bench) -> KernelMaker:
    return KernelMaker(bind(at.task, no_sweep), at.task, at.source, at.workspace, CHUNK)


def product_maker(at: Bench) -> Maker:
    made = by_products(kernel_maker(at), at.workspace.octets("summed"), at.workspace, at.source)
    assert isinstance(made, ProductMaker)
    return made


def numpy_maker(at: Bench) -> Maker:
    return NumpyMaker(PlainNumbers(at.workspace.octets("slots")), at.task, at.source, CHUNK, lambda: kernel_maker(at))


def stored_copier(at: Bench) -> Maker:
    (stored,) = at.task.sources
    assert isinstance(stored, Stored)
    return StoredCopier(stored, at.files, at.workspace, 1 << 14)


def reader_copier(at: Bench) -> Maker:
    return ReaderCopier(at.task, at.source, 1 << 14)


Opening = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Opening]:
    """Yields what puts tensors into files, and opens them for a task."""
    opened = list[InputFiles]()

    def opening(models: list[torch.Tensor], mapped: bool = True, method: Any = None, **parameters: Any) -> Bench:
        kind = next(kind for kind in DType if kind.torch == models[0].dtype)
        spec, sources = TensorSpec("w", kind, tuple(models[0].shape)), list[Stored]()
        for number, each in enumerate(models):
            path = tmp_path / f"{number}.bin"
            path.write_bytes(b"?" * 64 + bytes(each.view(torch.uint8).numpy()))
            sources.append(Stored(spec, parse(str(path)), 64))
        method = method or find_method("linear")
        values = method.resolve(parameters, len(models)) if method is not COPY else {}
        task = MergeTask(spec, method, tuple(sources), 0, 0, values, "float64")
        files = InputFiles(statuses([source.path for source in sources]))
        opened.append(files)
        summed = summed_bytes(len(models), kind.element_bytes)
        budget = Budget(1, CHUNK, 1 << 20, 1 << 20, Cost(8, 3, 4, 4), 0, summed_bytes=summed)
        workspace = Workspace(budget)
        return Bench(task, Inputs(files, task.sources, workspace, mapped, -1, lambda: None), files, workspace)

    prepare_torch()
    yield opening
    for each in opened:
        each.close()


def made(maker: Maker, start: int, stop: int, size: int) -> bytes:
    """Returns the bytes of a piece, and makes sure that its chunks cover it and stand last in the output's memory."""
    found, at = bytearray(), start

    def write(data: memoryview, offset: int) -> None:
        assert offset == 100 + len(found)
        found.extend(data)

    outgoing = Outgoing(write, memoryview(bytearray((1 << 20) + PAGE_BYTES)), 100)
    for a, b in maker.spans(start, stop):
        assert a == at < b
        part = maker.put(a, b, outgoing)
        assert len(part) == (b - a) * size
        assert part == outgoing.last(len(part))
        at = b
    assert at == stop
    outgoing.flush()
    return bytes(found)


def wanted(models: list[torch.Tensor]) -> torch.Tensor:
    """The sum model by model in float64, rounded once."""
    total = torch.zeros(len(models[0]), dtype=torch.float64)
    for each, weight in zip(models, WEIGHTS, strict=True):
        total = total + each.double() * weight
    return (total / sum(WEIGHTS)).to(models[0].dtype)


COMPUTED = [kernel_maker, product_maker, numpy_maker]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("maker", COMPUTED)
def test_sums_are_those_of_the_formula_and_what_is_not_finite_is_counted(
    maker: Callable[[Bench], Maker], mapped: bool, bench: Opening
) -> None:
    """One chunk is finite, one has NaN of one model, one agreed infinities, and the last an overflow."""
    models = [torch.randn(N, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(MODELS)]
    models[4][GRAIN + 5] = math.nan
    for each in models:
        each[2 * GRAIN + 7 : 2 * GRAIN + 10] = -math.inf
        each[3 * GRAIN + 3] = 3e38 * (1 if each is not models[5] else -1)
    at = bench(models, mapped, weight=WEIGHTS)
    tested = maker(at)
    found = torch.frombuffer(bytearray(made(tested, 0, N, 2)), dtype=torch.bfloat16)
    expected = wanted(models)
    assert expected[GRAIN + 5].isnan()
    assert expected[3 * GRAIN + 3].isinf()
    expected[2 * GRAIN + 7 : 2 * GRAIN + 10] = -math.inf
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert tested.nonfinite == {AGREED: 3, at.source.origin(4): 1, "the result (overflow)": 1}


@pytest.mark.parametrize("maker", COMPUTED)
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (GRAIN, N), (GRAIN, 2 * GRAIN)])
def test_a_part_of_a_tensor_has_its_own_elements(
    maker: Callable[[Bench], Maker], start: int, stop: int, bench: Opening
) -> None:
    models = [torch.randn(N, generator=torch.Generator().manual_seed(n)).half() for n in range(MODELS)]
    tested = maker(bench(models, weight=WEIGHTS))
    assert made(tested, start, stop, 2) == bytes(wanted(models)[start:stop].view(torch.uint8).numpy())
    assert not tested.nonfinite


@pytest.mark.parametrize("maker", [stored_copier, reader_copier])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_copies_have_the_bytes_of_the_source(maker: Callable[[Bench], Maker], dtype: torch.dtype, bench: Opening) -> None:
    model = torch.randn(5001, dtype=dtype)
    at = bench([model], False, COPY)
    numbers = model.view(torch.float64) if dtype.is_complex else model
    for start, stop in ((0, 0), (0, len(numbers)), (8, len(numbers))):
        tested = maker(at)
        found = made(tested, start, stop, numbers.element_size())
        assert found == bytes(numbers[start:stop].contiguous().view(torch.uint8).numpy())
        assert not tested.nonfinite


@pytest.mark.parametrize("maker", [*COMPUTED, stored_copier, reader_copier])
def test_what_is_read_is_counted_once(maker: Callable[[Bench], Maker], bench: Opening) -> None:
    copies = maker in (stored_copier, reader_copier)
    models = [torch.randn(N).half() for _ in range(1 if copies else MODELS)]
    at = bench(models, True, COPY) if copies else bench(models, True, weight=WEIGHTS)
    made(maker(at), 0, N, 2)
    assert at.workspace.asked_bytes == len(models) * N * 2
