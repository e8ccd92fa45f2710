"""The arguments of an extraction."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge as sm
from streammerge.requests.extractions import extracting
from streammerge.tensors.dtypes import DType

DEFAULTS = {name: each.default for name, each in inspect.signature(sm.extract).parameters.items()}
BASE, TUNED = {"m.weight": torch.zeros(80, 90)}, {"m.weight": torch.ones(80, 90)}


def wanted(**given: Any) -> tuple[int, float, DType]:
    made = extracting({**DEFAULTS, "tuned": TUNED, "base": BASE, **given})
    return tuple(made.layers[0].wanted)  # type: ignore[return-value]


def test_rank_and_energy_say_how_much_is_kept() -> None:
    assert wanted() == (64, 0.0, DType.F32)
    assert wanted(energy=0.9) == (0, 0.9, DType.F32)
    assert wanted(energy="95%", rank=8, dtype="bfloat16") == (8, 0.95, DType.BF16)


def test_invalid_values_are_refused(tmp_path: Path) -> None:
    for given in (
        {"energy": 0},
        {"energy": 1.1},
        {"rank": 0},
        {"alpha": 0},
        {"alpha": "x"},
        {"dtype": "int8"},
        {"base": None},
    ):
        with pytest.raises(sm.RecipeError):
            wanted(**given)
    with pytest.raises(sm.RecipeError, match="does not exist"):
        wanted(base=str(tmp_path / "absent"))
