"""A group of tensors in memory, by which methods are tried."""

from __future__ import annotations

import pytest
import torch

from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.tensors.spec import GRAIN


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (GRAIN + 1,), (2, GRAIN, 2)])
def test_a_kernel_is_given_every_element_once(shape: tuple[int, ...]) -> None:
    one, two = (torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(2))
    group = TensorGroup.of(one, two.transpose(0, -1).contiguous().transpose(0, -1) if shape else two)
    spans: list[tuple[int, int]] = []

    def kernel(chunk: Chunk) -> torch.Tensor:
        spans.append((chunk.start, chunk.stop))
        return chunk.models[0] - chunk.models[1]

    assert torch.equal(group.merged(kernel), one - two)
    assert (group.shape, group.elems, group.models, group.based) == (shape, one.numel(), 2, False)
    assert sum(b - a for a, b in spans) == one.numel()


@pytest.mark.parametrize(
    ("dtypes", "given", "compute"),
    [
        (["bfloat16", "float16"], None, torch.float32),
        (["float32", "float64"], None, torch.float64),
        (["float64", "float64"], torch.float32, torch.float32),
    ],
)
def test_arithmetic_is_wide_where_an_input_is(dtypes: list[str], given: torch.dtype | None, compute: torch.dtype) -> None:
    group = TensorGroup.of(*(torch.ones(3, dtype=getattr(torch, name)) for name in dtypes), compute=given)
    assert group.compute == compute
    assert group.merged(lambda chunk: chunk.models[1]).dtype == compute


def test_the_base_is_no_model() -> None:
    base, model = torch.ones(3), torch.full((3,), 5.0)
    group = TensorGroup.of(model, base=base)
    assert (group.models, group.based) == (1, True)
    assert group.merged(lambda chunk: chunk.models[0] - chunk.base).tolist() == [4.0] * 3


@pytest.mark.parametrize("row", [1, 700, GRAIN + 5])
def test_rows_stay_together(row: int) -> None:
    group = TensorGroup.of(torch.zeros(9 * row), row=row, chunk_elems=2 * GRAIN)
    assert group.grain % row == 0
    assert group.grain == max(GRAIN // row, 1) * row
    (spans,) = group.sweep(lambda chunk: (), lambda look, chunks: [(c.start, c.stop) for c in chunks], 0, group.elems)
    assert all(a % row == 0 and b % row == 0 for a, b in spans)


def test_random_numbers_follow_the_elements_and_not_the_chunks() -> None:
    drawn = {
        tuple(
            TensorGroup.of(torch.zeros(3 * GRAIN), seed=4, chunk_elems=chunk)
            .merged(lambda c: TensorGroup.of(torch.zeros(1), seed=4).uniform(c, 0))[::1000]
            .tolist()
        )
        for chunk in (GRAIN, 3 * GRAIN)
    }
    assert len(drawn) == 1
    assert 0 <= min(next(iter(drawn))) < max(next(iter(drawn))) < 1
