"""Groups of outputs that one read makes; more in test_sweeping.py."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from streammerge.running.session import RunOptions
from streammerge.sweeps.making import Maker, identity_of
from streammerge.sweeps.points import Point


def test_an_identity_follows_from_recipe_and_inputs(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    inputs = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    maker = Maker({"base": None}, inputs, lambda point: str(tmp_path / f"{point.name}.safetensors"), RunOptions())
    points = [Point({"n": str(n)}, {"weights": weights}) for n, weights in enumerate(([1, 0], [1, 0], [0, 1]))]
    found = [identity_of(maker.plan_of(point)[1]) for point in points]
    assert found[0] == found[1] != found[2]
    save_file({"w": torch.ones(4)}, tmp_path / "b.safetensors")
    save_file({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    assert identity_of(maker.plan_of(points[0])[1]) != found[0]
