"""What is made for a module: the shapes of its factors, and the memory that it needs."""

from __future__ import annotations

import pytest
import torch

from streammerge.factoring.layers import COMPARE, DECOMPOSE, EMBEDDING, LINEAR, STACK, TRANSPOSED, Layer, share
from streammerge.factoring.truncated import Wanted
from streammerge.sources.memory import in_memory
from streammerge.tensors.dtypes import DType


def layer(shape: tuple[int, ...], form: str = LINEAR, way: str = DECOMPOSE) -> Layer:
    source = in_memory("m.w.weight", torch.zeros(shape))
    return Layer("m.w.weight", shape, way, (source,), Wanted(4, 0.0, DType.F32), form)


@pytest.mark.parametrize(
    ("shape", "form", "down", "up"),
    [
        ((6, 5), LINEAR, (2, 5), (6, 2)),
        ((6, 5, 3), LINEAR, (2, 5, 3), (6, 2, 1)),
        ((6, 5, 3, 2), LINEAR, (2, 5, 3, 2), (6, 2, 1, 1)),
        ((6, 5), TRANSPOSED, (2, 6), (5, 2)),
        ((6, 5), EMBEDDING, (2, 6), (5, 2)),
    ],
)
def test_factors_have_the_shapes_of_peft(
    shape: tuple[int, ...], form: str, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    one, other = layer(shape, form).specs(2)
    assert (one.shape, other.shape) == (down, up)
    ending = ("lora_embedding_A", "lora_embedding_B") if form == EMBEDDING else ("lora_A.weight", "lora_B.weight")
    assert (one.name, other.name) == tuple(f"base_model.model.m.w.{each}" for each in ending)
    assert layer(shape, form).most_bytes() >= 4 * (one.numel + other.numel)


def test_memory_grows_with_the_matrix_and_comparisons_need_little() -> None:
    assert layer((4096, 4096)).needed_bytes() < 200 << 20
    assert layer((14336, 4096)).needed_bytes() < 200 << 20
    assert layer((4096, 14336)).needed_bytes() < 250 << 20
    assert layer((64, 64)).needed_bytes() < layer((1024, 1024)).needed_bytes()
    table = in_memory("e.weight", torch.zeros(1).expand(1 << 20, 512))
    compared = Layer("e.weight", (1 << 20, 512), COMPARE, (table, table), Wanted(4, 0.0, DType.F32))
    assert compared.needed_bytes() < 8 << 20
    assert compared.most_bytes() == 0


def test_stacked_factors_have_all_their_ranks() -> None:
    left, right = (in_memory("m.weight", torch.zeros(shape)) for shape in ((6, 9), (9, 5)))
    assert Layer("m.weight", (6, 5), STACK, (left, right), Wanted(9, 0.0, DType.F32)).most_bytes() == 4 * 9 * 11


def test_the_share_of_nothing_is_nothing() -> None:
    assert (share(1.0, 4.0), share(0.0, 0.0)) == (0.5, 0.0)
