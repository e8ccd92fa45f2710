"""Weighted sums of small tensors that are computed together have the bytes that each has alone."""

from __future__ import annotations

import pytest
import torch

from streammerge.kernels.batch import Batch
from streammerge.kernels.group import TensorGroup
from streammerge.methods.inner_products import Products, combined, solved
from streammerge.methods.linear import Combination, combination

KERNELS = {
    "all alike": [combination([1.0, 2.0, -0.5], 0.25)] * 4,
    "each its own": [combination([n - 1.0, 0.3 * n, 1.0], 1.5 - n) for n in range(4)],
    "no base": [combination([n + 0.1, 0.3, -1.0]) for n in range(4)],
    "the base of some": [combination([0.0, 0.0, n * 0.5], n % 2 * 0.7) for n in range(4)],
}


def group_of(compute: torch.dtype) -> tuple[list[torch.Tensor], TensorGroup]:
    """Returns four tensors of a base and three models, and the group of all as one. Many numbers are -0."""
    make = torch.Generator().manual_seed(3)
    each = [torch.randn(4, 33, generator=make) * torch.randint(0, 2, (4, 33), generator=make).neg() for _ in range(4)]
    flat = [tensor.flatten() for tensor in each]
    return each, TensorGroup.of(*flat[1:], base=flat[0], compute=compute)


def batch_of(group: TensorGroup) -> Batch:
    (chunk,) = next(iter(group.sweep(lambda chunk: (), lambda look, chunks: list(chunks), 0, group.elems)))
    return Batch(["a", "b", "c", "d"], (33,), group.models, 0, chunk)


def bits(values: torch.Tensor) -> list[int]:
    found: list[int] = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).flatten().tolist()
    return found


@pytest.mark.parametrize("compute", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_the_sums_are_those_of_each_tensor(kernels: list[Combination], compute: torch.dtype) -> None:
    each, group = group_of(compute)
    made = combined(batch_of(group), kernels, {}).view(4, 33)
    for number, kernel in enumerate(kernels):
        base, *models = (tensor[number] for tensor in each)
        alone = TensorGroup.of(*models, base=base, compute=compute)
        assert bits(made[number]) == bits(alone.merged(kernel))


@pytest.mark.parametrize("compute", [torch.float64, torch.float32])
@pytest.mark.parametrize("deltas", [False, True, None])
def test_each_tensor_is_solved_by_itself(deltas: bool | None, compute: torch.dtype) -> None:
    """And what the products have left in memory is used only if it is what the sum needs."""
    told = list[tuple[str, bool]]()

    def solve(products: Products, name: str, based: bool, values: dict[str, float]) -> Combination:
        told.append((name, based))
        return combination([products[0][0], values["w"], products[2][1]], products[1][1])

    each, group = group_of(compute)
    made = solved(solve, deltas)(batch_of(group), {"w": 0.3})
    assert told == [(name, True) for name in "abcd"]
    assert made is not None
    for number in range(4):
        base, *models = (tensor[number] for tensor in each)
        alone = TensorGroup.of(*models, base=base, compute=compute)
        kernel = solve(alone.gram(deltas is not False).tolist(), "", True, {"w": 0.3})
        assert bits(made.view(4, 33)[number]) == bits(alone.merged(kernel))
