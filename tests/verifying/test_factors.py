"""Factors of an adapter from adapters are computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from factoring.test_combination import two
from streammerge.verifying import factors as checking


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("options", [{}, {"method": "ties", "parameters": {"density": 0.5}}])
def test_an_adapter_is_verified(options: dict[str, Any]) -> None:
    two()
    sm.merge(["one", "other"], "made/", **options)
    found = sm.verify("made/", sample=1.0)
    assert (found.sampled_tensors, found.repeated_elems) == (6, found.sampled_elems)
    weights = Path("made/adapter_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(sm.VerifyError, match="is not as it was written"):
        sm.verify("made/")


def test_inputs_that_changed_are_noticed() -> None:
    two()
    sm.merge(["one", "other"], "made/")
    config = Path("other/adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
    with pytest.raises(sm.VerifyError, match="is not the file that was merged"):
        sm.verify("made/", sample=1.0)
    assert "is not the file that was merged" in sm.verify("made/").notes[0]


def test_factors_of_another_machine_are_compared_as_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with another BLAS library may turn a pair of singular vectors."""
    two()
    sm.merge(["one", "other"], "made/", method="svd", parameters={"rank": 3})
    real = checking.stored

    def turned(layer: Any, found: Any) -> tuple[Any, Any]:
        down, up = real(layer, found)
        return -down, -up

    monkeypatch.setattr(checking, "stored", turned)
    found = sm.verify("made/", sample=1.0)
    assert (found.repeated_elems, found.equal_elems) == (0, 0)
    monkeypatch.setattr(checking, "stored", lambda layer, found: tuple(1.01 * each for each in real(layer, found)))
    with pytest.raises(sm.VerifyError, match="differs from the result"):
        sm.verify("made/", sample=1.0)
