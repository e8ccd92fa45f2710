"""NaN and infinity in a result are counted by the input that they come from."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge.kernels.agreed import AGREED
from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.running.nonfinite import may_be_nonfinite, nonfinite_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.5])
@pytest.mark.parametrize("elems", [1, 7, 4096])
def test_every_nonfinite_number_is_suspicious(dtype: torch.dtype, value: float, elems: int) -> None:
    out = torch.zeros(elems)
    out[elems // 2] = value
    assert may_be_nonfinite(out.to(dtype)) == (not math.isfinite(value))


def test_opposite_infinities_do_not_hide_each_other() -> None:
    assert may_be_nonfinite(torch.tensor([INF, -INF]))
    assert not may_be_nonfinite(torch.zeros(0))


class Models:
    """The models of a group in memory, as a worker's inputs are asked for them."""

    def __init__(self, *models: torch.Tensor) -> None:
        self.models = models

    def __len__(self) -> int:
        return len(self.models)

    def read(self, number: int, start: int, stop: int) -> torch.Tensor:
        return self.models[number][start:stop]

    def origin(self, number: int) -> str:
        return "abc"[number]


def counts_of(*models: torch.Tensor) -> dict[str, int]:
    """Returns the counts of the sum of two models."""
    source, counts = Models(*models), dict[str, int]()

    def kernel(chunk: Chunk) -> torch.Tensor:
        out = chunk.load(0).clone() + chunk.load(1)  # each load may use the same buffer
        counts.update(nonfinite_of(out, kernel, 1, chunk, source))  # type: ignore[arg-type]
        return out

    TensorGroup.of(*models).merged(kernel)
    return counts


def test_numbers_are_counted_by_their_file() -> None:
    models = torch.tensor([1, NAN, INF, INF, 2, 2]), torch.tensor([1, 2, INF, 5, 2, INF])
    assert counts_of(*models) == {AGREED: 1, "a": 2, "b": 1}


def test_an_overflow_comes_from_no_file() -> None:
    assert counts_of(torch.tensor([1, 3e38, 3e38]), torch.tensor([1, 3e38, -3e38])) == {"the result (overflow)": 1}
    assert counts_of(torch.tensor([3e38]), torch.tensor([0.0])) == {}
