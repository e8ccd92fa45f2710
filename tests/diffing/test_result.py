"""How a comparison is shown, and its advice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm

BASE = {f"m.layers.{n}.w": torch.randn(40, 50, generator=torch.Generator().manual_seed(n)) for n in range(20)}
STRANGER = {name: torch.randn(40, 50, generator=torch.Generator().manual_seed(n + 50)) for n, name in enumerate(BASE)}


def changed(share_of_other: float, seed: int) -> dict[str, torch.Tensor]:
    """Returns the base with a change that is in part a common one."""
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    return {
        name: tensor
        + 0.01 * share_of_other * torch.randn(tensor.shape, generator=common)
        + 0.01 * torch.randn(tensor.shape, generator=own)
        for name, tensor in BASE.items()
    }


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (changed(3, 1), changed(3, 2), "The changes agree (cosine 0."),
        (changed(0.6, 1), changed(0.6, 2), "The changes agree in part (cosine 0."),
        (changed(0, 1), changed(0, 2), "The changes are nearly independent (cosine "),
        (changed(3, 1), changed(-3, 2), "The changes oppose each other (cosine -0."),
        (BASE, changed(0, 1), "A equals the base"),
        (changed(0, 1), BASE, "B equals the base"),
        (STRANGER, changed(0, 1), "|A - C| is 1.4"),
        (changed(0, 1), STRANGER, "|B - C| is 1.4"),
        (BASE, BASE, "Neither A nor B changes the base."),
    ],
)
def test_advice(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], said: str) -> None:
    diff = sm.diff(one, two, BASE)
    assert diff.advice.startswith(said)
    assert diff.advice in str(diff)
    if "(cosine" in said:
        assert "equal signs, the largest 10% overlap by" in diff.advice


def test_the_summary_shows_the_layers_that_moved_most() -> None:
    other = {name: tensor * (1 + 0.001 * n) for n, (name, tensor) in enumerate(BASE.items())}
    diff = sm.diff(BASE, other)
    lines = str(diff).splitlines()
    assert "20 layers and other modules, the 12 that moved most, the farthest first" in lines
    shown = [line.split()[-1] for line in lines if "m.layers." in line and line.startswith("  ")]
    assert shown == [f"m.layers.{n}" for n in range(19, 7, -1)]
    assert diff.to_json()["moved_most"] == shown
    assert [each["layer"] for each in diff.to_json()["layers"]] == [f"m.layers.{n}" for n in range(20)]
    assert max(map(len, lines)) <= 80
    every = diff.text(tensors=True).splitlines()
    assert [line.split()[-1] for line in every if line.endswith(".w") and line.startswith("  ")] == list(BASE)
    few = sm.diff(BASE, BASE | {"m.layers.3.w": BASE["m.layers.4.w"]})
    assert "20 layers and other modules, 1 of them different" in str(few)
    assert repr(diff).endswith("19 of 20 tensors differ>")


def test_strangers_are_told() -> None:
    assert "relatives  hardly" in str(sm.diff(BASE, STRANGER))
    assert "relatives" not in str(sm.diff(BASE, changed(0, 1)))


def test_json_holds_numbers_that_json_has() -> None:
    diff = sm.diff({"x": torch.zeros(2), "y": torch.ones(2)}, {"x": torch.ones(2), "y": torch.full((2,), torch.nan)})
    data = json.loads(json.dumps(diff.to_json(), allow_nan=False))
    assert (data["equal"], data["tensors_compared"], data["tensors_different"]) == (False, 2, 2)
    assert [each["name"] for each in data["tensors"]] == ["x", "y"]
    assert data["tensors"][0]["relative"] is None
    assert data["tensors"][1]["nonfinite"] == 2
    assert "tensors" not in diff.to_json(tensors=False)
    assert "agreement" in sm.diff(BASE, BASE, BASE).to_json()


def test_what_has_no_distance_has_dashes(tmp_path: Path) -> None:
    a = {"whole": torch.tensor([1, 2]), "other": torch.ones(3), "w": torch.tensor([1.0, torch.nan])}
    save_file(a, tmp_path / "a.safetensors")
    save_file(a | {"whole": torch.tensor([1, 3]), "other": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    found = sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    rows = {line.split()[-1]: line.split()[:-1] for line in str(found).splitlines() if line.split()[-1:] != []}
    assert rows["whole"] == ["-", "-", "-", "50.0%"]
    assert rows["other"] == ["-", "-", "-", "-"]
    assert "1 element is NaN or infinite; norms and cosines are without it" in str(found)
    assert "<td" in found._repr_html_()


def test_a_cosine_that_rounds_to_zero_has_no_sign() -> None:
    from streammerge.diffing.result import _cosine

    assert [_cosine(value, 2) for value in (-0.001, 0.001, -0.01, None)] == ["0.00", "0.00", "-0.01", "-"]
