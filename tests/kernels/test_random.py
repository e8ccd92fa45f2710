"""Random numbers are a function of seed, name, model and element, and look random."""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import pytest
import torch

from streammerge.kernels.random import chosen, chosen_of_each, limits, uniform
from streammerge.tensors.spec import GRAIN

pytestmark = pytest.mark.usefixtures("compiled_or_not")

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


def plain(seed: int, name: str, model: int, element: int) -> int:
    """The 24 bits of one number, computed with Python's integers from the description in the module."""
    grain, counter = divmod(element, GRAIN)
    digest = blake2b(f"{seed}/{model}/{grain}/{name}".encode(), digest_size=8).digest()
    word = counter
    for key in (digest[:4], digest[4:]):
        word ^= int.from_bytes(key, "little")
        word ^= word >> 16
        word = word * 0x85EBCA6B & 0xFFFFFFFF
        word ^= word >> 13
        word = word * 0xC2B2AE35 & 0xFFFFFFFF
        word ^= word >> 16
    return word


def hashed(element: int) -> int:
    """Returns the hash that :func:`draw` makes a number of."""
    return plain(0, "w", 0, element)


def test_they_are_the_described_hashes() -> None:
    for start in (0, 5, GRAIN - 3, 3 * GRAIN + 7):
        expected = [(plain(9, "w.x", 2, start + i) >> 8) / (1 << 24) for i in range(50)]
        assert draw(50, seed=9, name="w.x", model=2, start=start).tolist() == expected


def below(
    start: int, count: int, chance: float | torch.Tensor, seed: int = 0, name: str = "w", model: int = 0
) -> torch.Tensor:
    """Returns 1 where an element is chosen, else 0."""
    most = min(count, GRAIN)
    spare = torch.empty(most), torch.empty(most, dtype=torch.int32), torch.empty(count, dtype=torch.bool)
    bits = chosen(seed, name, model, start, chance, *spare)
    return torch.from_numpy(np.unpackbits(bits, count=count)).float()


@pytest.mark.parametrize("chance", [1.5, 0.5, 0.25, 0.3, 2.0**-24, 1e-9, 1 - 2.0**-24, 1 - 1e-9, 0.0, 1.0])
@pytest.mark.parametrize("start", [11, 16])  # compiled functions begin with whole bytes
@pytest.mark.sampled(2)
def test_those_below_a_chance_are_chosen(chance: float, start: int) -> None:
    numbers, count = draw(2 * GRAIN, start=start), 2 * GRAIN
    chance = next((float(n) for n in numbers if chance == 0.3), chance)  # a number is not below itself
    assert torch.equal(below(start, count, chance), (numbers < chance).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [GRAIN - 50, GRAIN - 48])
def test_each_element_has_its_own_chance(dtype: torch.dtype, start: int) -> None:
    count = GRAIN + 100
    numbers = draw(count, start=start)
    chances = torch.rand(count, dtype=dtype).clamp_(min=1e-9)
    chances[:30] = numbers[:30].clamp(min=1e-9)
    chances[30] = 1.0
    assert torch.equal(below(start, count, limits(chances)), (numbers < chances).float())


def test_the_next_chance_above_a_number_chooses_it() -> None:
    """Also where all bits of a hash below those of its number are set, which is the limit itself."""
    numbers = draw(4096)
    above = numbers + 2.0**-24
    assert below(0, 4096, limits(above)).all()
    full = [number for number in range(4096) if hashed(number) & 0xFF == 0xFF]
    assert len(full) > 8
    for number in full:
        assert below(0, number + 1, float(above[number]))[number] == 1


@pytest.mark.parametrize("n", [1, 7, 1000, GRAIN // 2])
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.3, 1.0, None])
def test_tensors_one_after_the_other_have_the_numbers_of_each(n: int, chance: float | None) -> None:
    """``None``: each element has a chance of its own."""
    names = ["a", "b", "c", "d", "e"]
    each = limits(torch.rand(len(names) * n, generator=torch.Generator().manual_seed(0)))
    out, scratch = torch.empty(len(names) * n), torch.empty(len(names) * n, dtype=torch.int32)
    made = chosen_of_each(3, names, 2, each if chance is None else chance, out, scratch).view(len(names), n)
    for name, row, own in zip(names, made, each.view(len(names), n), strict=True):
        assert torch.equal(row, below(0, n, own if chance is None else chance, seed=3, name=name, model=2))
