"""Which elements survive. Whole methods: test_task_arithmetic.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import streammerge as sm
from streammerge.kernels.chunk import Chunk
from streammerge.kernels.group import TensorGroup
from streammerge.methods import sparsify
from streammerge.tensors.spec import GRAIN

pytestmark = pytest.mark.usefixtures("compiled_or_not")

Tensor = torch.Tensor


def applied(group: TensorGroup, chosen: sparsify.Sparsify, model: int = 0) -> Tensor:
    return group.merged(lambda chunk: chosen(chunk, model, chunk.delta(model)))


def drawn(elems: int, seed: int = 0) -> Tensor:
    return torch.randn(elems, generator=torch.Generator().manual_seed(seed))


def group_of(*deltas: Tensor) -> TensorGroup:
    return TensorGroup.of(*deltas, base=torch.zeros_like(deltas[0]))


@pytest.mark.parametrize("elems", [1, 2, 7, 1001, GRAIN + 1])
@pytest.mark.parametrize("density", [1e-9, 0.3, 0.999, 1.0])
def test_magnitude_keeps_the_largest(elems: int, density: float) -> None:
    delta = drawn(elems)
    group = group_of(delta)
    count = elems if density == 1 else max(int(density * elems), 1)
    order = delta.abs().argsort(descending=True, stable=True)
    wanted = torch.zeros(elems).index_copy(0, order[:count], delta[order[:count]])
    assert torch.equal(applied(group, sparsify.magnitude(group, [density])), wanted)


@pytest.mark.parametrize("elems", [1, 2, 10, 1001])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.0), (0.5, 0.1), (0.9, 0.5), (1.0, 0.3)])
def test_outliers_are_dropped_first(elems: int, density: float, gamma: float) -> None:
    delta = drawn(elems)
    group = group_of(delta)
    kept = elems if density == 1 else int(density * elems)
    dropped = 0 if density == 1 else min(int(gamma * elems), elems - kept)
    chosen = delta.abs().argsort(descending=True, stable=True)[dropped : dropped + kept]
    wanted = torch.zeros(elems).index_copy(0, chosen, delta[chosen])
    assert torch.equal(applied(group, sparsify.magnitude_outliers(group, [density], [gamma])), wanted)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_bernoulli_keeps_its_share(density: float) -> None:
    group = group_of(drawn(100_000, 1), drawn(100_000, 2))
    for model, each in enumerate((drawn(100_000, 1), drawn(100_000, 2))):
        kept = applied(group, sparsify.bernoulli(group, [density] * 2), model)
        assert ((kept == 0) | (kept == each)).all()
        assert float((kept != 0).float().mean()) == pytest.approx(density, abs=0.01)


def test_larger_ones_survive_more_often() -> None:
    delta = drawn(200_000)
    group = group_of(delta)
    kept = applied(group, sparsify.magprune(group, [0.5], [0.4])) != 0
    order = delta.abs().argsort()
    shares = [float(kept[part].float().mean()) for part in order.chunk(4)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.02)
    only = group_of(torch.tensor([3.0]))
    assert applied(only, sparsify.magprune(only, [0.01], [0.0])).tolist() == [3.0]


def test_rescaling_keeps_the_sum_of_magnitudes_and_nan() -> None:
    delta = drawn(3001)
    group = group_of(delta)
    kept = applied(group, sparsify.rescaled(group, sparsify.magnitude(group, [0.2])))
    assert int((kept != 0).sum()) == 600
    assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    tiny = group_of(torch.full((5,), 1e-9))
    assert applied(tiny, sparsify.rescaled(tiny, sparsify.magnitude(tiny, [0.2]))).tolist() == pytest.approx(
        [1e-9, 0, 0, 0, 0]
    )
    lost = group_of(torch.tensor([1.0, torch.nan]))
    assert applied(lost, sparsify.rescaled(lost, sparsify.everything)).isnan().all()


@pytest.mark.parametrize(
    ("shape", "fibres", "row"),
    [
        ((), (1, 1, 1), 1),
        ((5,), (1, 5, 1), 5),
        ((3, 4), (3, 4, 1), 4),
        ((2, 3, 4, 5), (2, 3, 20), 60),
        ((0, 4), (0, 4, 1), 4),
    ],
)
def test_rows_as_they_are_ranked(shape: tuple[int, ...], fibres: tuple[int, ...], row: int) -> None:
    values = torch.zeros(shape).reshape(-1)
    assert tuple(sparsify.fibre_view(values, shape).shape) == fibres
    assert sparsify.fibre_row(shape, {}) == row


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"density": (0.5, -0.1)}, "density"),
        ({"density": (float("inf"),)}, "density"),
        ({"density": (float("nan"),)}, "density"),
        ({"density": (0.5,), "gamma": (1.0,)}, "gamma"),
        ({"density": (0.5,), "gamma": (-0.1,)}, "gamma"),
        ({"density": (0.1,), "epsilon": (0.1,)}, "epsilon"),
        ({"density": (0.9,), "epsilon": (0.1,)}, "epsilon"),
        ({"density": (0.5,), "epsilon": (-0.1,)}, "epsilon"),
    ],
)
def test_densities_that_are_none(values: sparsify.Values, words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        sparsify.check_density(values)


def test_densities_at_their_limits() -> None:
    sparsify.check_density({"density": (1.0, 1e-9), "gamma": (0.0, 0.99)})
    sparsify.check_density({"density": (0.0, 1.3), "gamma": (0.0, 0.99)})
    sparsify.check_density({"density": (0.0, 1.3), "epsilon": (0.2, 0.2)})
    sparsify.check_density({"density": (1.0, 0.5), "epsilon": (7.0, 0.49)})


def test_everything_is_everything() -> None:
    group = group_of(drawn(7))
    assert torch.equal(applied(group, sparsify.everything), drawn(7))
    assert isinstance(next(iter(group.sweep(lambda chunk: (), lambda look, chunks: list(chunks), 0, 7)))[0], Chunk)


@pytest.mark.parametrize("elems", [1, 7, 1001, GRAIN + 1])
def test_a_density_of_zero_drops_all_and_above_one_keeps_all(elems: int) -> None:
    group = group_of(drawn(elems), drawn(elems, 1))
    density, gamma = [0.0, 1.5], [0.1, 0.1]
    for made in (
        sparsify.magnitude(group, density),
        sparsify.magnitude_outliers(group, density, gamma),
        sparsify.bernoulli(group, density),
        sparsify.magprune(group, density, [0.1, 0.1]),
        sparsify.rescaled(group, sparsify.magnitude(group, density)),
    ):
        assert not applied(group, made, 0).any()
        assert torch.equal(applied(group, made, 1), drawn(elems, 1))


@pytest.mark.parametrize("elems", [8, 13, GRAIN + 1, 3 * GRAIN + 5])
def test_a_mask_multiplies_as_it_would_number_by_number(elems: int) -> None:
    """NaN and infinity come out as the product has them, and nothing warns of them."""
    delta, bits = drawn(elems), torch.randint(0, 2, (elems,), generator=torch.Generator().manual_seed(1))
    delta[::7], delta[1::11], delta[2::13], delta[3::17] = torch.inf, torch.nan, -torch.inf, -0.0
    for factor in (1.0, 1.7, torch.inf):
        masked = sparsify.Masked(group_of(delta), lambda chunk, model, delta: 0.5)
        wanted, found = delta * bits.float() * factor, delta.clone()
        packed, table = np.packbits(bits.numpy().astype(bool)), masked._table(0, factor, delta.dtype)
        sparsify._multiply(found, packed, table, torch.empty(elems))
        assert torch.equal(found.nan_to_num(7e7), wanted.nan_to_num(7e7))
        assert torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan())


def test_rows_whose_grains_are_no_whole_bytes_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.zeros(3 * (GRAIN // 3) * 3)
    model = torch.randn(len(base), generator=torch.Generator().manual_seed(1))
    made = []
    for elems in (4 * GRAIN, GRAIN):  # several grains in a chunk, and one
        group = TensorGroup.of(model, base=base, row=3, chunk_elems=elems)
        apply = sparsify.rescaled(group, sparsify.bernoulli(group, [0.3]))
        made.append(group.merged(lambda chunk, apply=apply: apply(chunk, 0, chunk.delta(0))))
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_masks_of_other_dtypes(dtype: torch.dtype) -> None:
    delta, bits = torch.ones(3000).to(dtype), np.packbits(np.arange(3000) % 3 == 0)
    table = (torch.from_numpy(sparsify._of_bytes(torch.float64 if dtype.itemsize == 8 else torch.float32)) * 2).numpy()
    sparsify._multiply(delta, bits, table, torch.empty(3000, dtype=torch.float64 if dtype.itemsize == 8 else torch.float32))
    assert torch.equal(delta, (torch.arange(3000) % 3 == 0).to(dtype) * 2)
