"""Where chunks begin and end, and what a kernel finds in one."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge.kernels.chunk import Chunk, chunk_spans, whole_grains, whole_rows
from streammerge.kernels.group import TensorGroup
from streammerge.tensors.spec import GRAIN


@pytest.mark.parametrize("row", [1, 7, 1000, GRAIN, GRAIN + 1, 3 * GRAIN])
@pytest.mark.parametrize("elems", [1, GRAIN, 2 * GRAIN + 5, 10 * GRAIN])
@pytest.mark.parametrize("rows", [0, 1, 2, 13])
def test_chunks_are_whole_rows_that_follow_each_other(row: int, elems: int, rows: int) -> None:
    total, first = rows * row, 5 * row
    spans = list(chunk_spans(first, first + total, elems, row))
    assert [a for a, _ in spans] == [first, *(b for _, b in spans)][: len(spans)]
    assert sum(b - a for a, b in spans) == total
    grain = max(GRAIN // row, 1) * row
    for number, (a, b) in enumerate(spans):
        assert (b - a) % row == 0
        if number < len(spans) - 1:
            assert b - a == max(elems // grain, 1) * grain


@pytest.mark.parametrize("sparse", [1, 16])
@pytest.mark.parametrize("row", [1, 3000])
def test_a_sample_is_one_of_so_many_spans(sparse: int, row: int) -> None:
    total = 40 * GRAIN // row * row
    spans = list(chunk_spans(0, total, GRAIN, row, sparse))
    assert all((b - a) % row == 0 and b - a <= max(2048, row) for a, b in spans)
    assert sum(b - a for a, b in spans) == pytest.approx(total / sparse, rel=0.05)


def test_rows_and_grains_are_never_none() -> None:
    assert [whole_rows(elems, 7) for elems in (0, 6, 7, 20)] == [7, 7, 7, 14]
    assert [whole_grains(elems, 1) for elems in (0, GRAIN - 1, 3 * GRAIN - 1)] == [GRAIN, GRAIN, 2 * GRAIN]


def group(*models: torch.Tensor, base: torch.Tensor | None = None) -> tuple[TensorGroup, Chunk]:
    """A group of one chunk, and that chunk."""
    made = TensorGroup.of(*models, base=base)
    (chunks,) = made.sweep(lambda chunk: (), lambda look, chunks: list(chunks), 0, made.elems)
    (chunk,) = chunks
    return made, chunk


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_numbers_come_in_the_compute_dtype_and_deltas_are_rounded_once(shape: tuple[int, ...]) -> None:
    make = torch.Generator().manual_seed(1)
    base, one, two = (torch.randn(shape, generator=make).bfloat16() for _ in range(3))
    _, chunk = group(one, two, base=base)
    assert [m.dtype for m in chunk.models] == [torch.float32] * 2
    assert torch.equal(chunk.models[1], two.float().reshape(-1))
    assert torch.equal(chunk.base, base.float().reshape(-1))
    assert torch.equal(chunk.delta(0), (one.float() - base.float()).reshape(-1))
    assert torch.equal(chunk.delta(1, dtype=torch.float64), (two.double() - base.double()).reshape(-1))
    assert torch.equal(chunk.raw(1), two.reshape(-1))
    assert chunk.raw(1).dtype == torch.bfloat16
    assert chunk.elems == one.numel()


def test_models_are_apart_from_each_other_and_from_the_input() -> None:
    one, two = torch.ones(5), torch.full((5,), 2.0)
    _, chunk = group(one, two, base=torch.zeros(5))
    chunk.models[0].zero_()
    assert chunk.models[1].tolist() == [2.0] * 5
    kept = chunk.keep(chunk.raw(0))
    chunk.load(1)[:] = 9.0
    assert kept.tolist() == [1.0] * 5
    assert (one.tolist(), two.tolist()) == ([1.0] * 5, [2.0] * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sort_keys_are_in_the_order_of_the_numbers(dtype: torch.dtype) -> None:
    values = torch.tensor([-torch.inf, -1e30, -1.5, -1e-42, 0.0, 1e-42, 1.5, 1e30, torch.inf], dtype=dtype)
    _, chunk = group(values)
    keys = chunk.sort_keys(values.clone(), signed=True)
    assert keys.tolist() == sorted(set(keys.tolist()))
    magnitudes = values[4:].clone()
    keys = group(magnitudes)[1].sort_keys(magnitudes, signed=False)
    assert keys.tolist() == sorted(set(keys.tolist()))


@pytest.mark.parametrize("elems", [1, GRAIN, 2 * GRAIN + 5])
def test_blocks_of_a_chunk_have_its_numbers(elems: int) -> None:
    values, base = (torch.randn(elems, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    made = TensorGroup.of(values, base=base, chunk_elems=3 * GRAIN)
    ((chunk,),) = made.sweep(lambda chunk: (), lambda look, chunks: list(chunks), 0, made.elems)
    found = [(block.start, block.stop, block.delta(0).clone()) for block in chunk.blocks(GRAIN)]
    assert [span[:2] for span in found] == list(chunk_spans(0, elems, GRAIN, 1))
    assert torch.equal(torch.cat([delta for *_, delta in found]), values - base)


def test_blocks_hide_what_their_chunk_hides() -> None:
    values = torch.ones(2 * GRAIN)
    values[[3, GRAIN + 3]] = math.inf
    made = TensorGroup.of(values, base=values.clone(), chunk_elems=2 * GRAIN)
    ((chunk,),) = made.sweep(lambda chunk: (), lambda look, chunks: list(chunks), 0, made.elems)
    assert [float(block.load(0).sum()) for block in chunk.hiding().blocks(GRAIN)] == [GRAIN - 1] * 2
    assert [float(block.load(0).sum()) for block in chunk.blocks(GRAIN)] == [math.inf] * 2
