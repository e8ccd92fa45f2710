"""Random numbers are a function of seed, name, model and element, and look random."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge.kernels.random import uniform
from streammerge.tensors.spec import GRAIN

Tensor = torch.Tensor


def draw(count: int, seed: int = 0, name: str = "w", model: int = 0, start: int = 0) -> Tensor:
    return uniform(seed, name, model, start, torch.empty(count), torch.empty(count, dtype=torch.int32))


def test_they_do_not_depend_on_how_they_are_asked_for() -> None:
    whole = draw(3 * GRAIN + 5)
    for a, b in ((0, 1), (GRAIN - 1, GRAIN + 1), (17, 2 * GRAIN + 3), (3 * GRAIN, 3 * GRAIN + 5)):
        assert torch.equal(draw(b - a, start=a), whole[a:b])


def test_they_depend_on_seed_name_and_model() -> None:
    draws = [draw(1000), draw(1000, seed=1), draw(1000, name="v"), draw(1000, model=1)]
    draws.append(draw(1000, start=GRAIN))
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.15
            assert (a != b).float().mean() > 0.99


@pytest.mark.parametrize("bits", [8, 12])
def test_chi_square_of_the_leading_and_of_the_trailing_bits(bits: int) -> None:
    count, bins = 1 << 22, 1 << bits
    whole = (draw(count).double() * (1 << 24)).long()
    for part in (whole >> (24 - bits), whole & (bins - 1)):
        seen = torch.bincount(part, minlength=bins).double()
        chi = float(((seen - count / bins) ** 2 / (count / bins)).sum())
        assert abs(chi - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1)), chi


def test_chi_square_of_neighbours_and_of_grains() -> None:
    whole = (draw(64 * GRAIN) * 64).long()
    for lag in (1, 2, 1024, GRAIN):
        seen = torch.bincount(whole[:-lag] * 64 + whole[lag:], minlength=4096).double()
        mean = seen.sum() / 4096
        chi = float(((seen - mean) ** 2 / mean).sum())
        assert abs(chi - 4095) < 5 * math.sqrt(2 * 4095), (lag, chi)
