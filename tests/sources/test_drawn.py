"""Random numbers as a tensor: their distribution, and that no number depends on how it is read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sources.suite import GRAIN, Case, Disk, SourceSuite, room
from streammerge.sources.base import read_whole
from streammerge.sources.drawn import drawn


def numbers(shape: tuple[int, ...], seed: int = 0, name: str = "t", normal: bool = True) -> torch.Tensor:
    return torch.frombuffer(read_whole(drawn(name, shape, seed, normal), room()), dtype=torch.float64).view(shape)


class TestDrawn(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for shape in ((1,), (3, 5), (GRAIN + 7,)):
            yield Case(drawn("t", shape, 3), numbers(shape, 3))


@pytest.mark.parametrize(("normal", "deviation"), [(True, 1.0), (False, 3**-0.5)])
def test_the_distribution(normal: bool, deviation: float) -> None:
    made = numbers((400, 1000), normal=normal).flatten()
    assert abs(made.mean()) < 4 * deviation / 632
    assert abs(made.std() - deviation) < 4 * deviation / 632
    assert made.isfinite().all()
    if not normal:
        assert made.abs().max() <= 1
    else:
        assert abs((made.abs() < 1).double().mean() - 0.6827) < 0.004


def test_numbers_depend_on_seed_and_name() -> None:
    one = numbers((64,))
    assert torch.equal(one, numbers((64,)))
    assert not torch.equal(one, numbers((64,), seed=1))
    assert not torch.equal(one, numbers((64,), name="u"))
    assert torch.equal(one, numbers((GRAIN,))[:64])
