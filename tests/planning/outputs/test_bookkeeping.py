"""Counters and facts of a merged .pth: the largest counter, no hash of another file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


def saved(number: int, **more: Any) -> None:
    torch.save({"model": {"w": torch.full((3,), float(number))}, **more}, f"{number}.pth")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def merged() -> tuple[dict[str, Any], sm.Result]:
    result = sm.merge(["1.pth", "2.pth"], "out.pth")
    return torch.load("out.pth", weights_only=True), result


@pytest.mark.parametrize(
    "key", ["step", "epoch", "iteration", "iters", "update", "num_updates", "n_averaged", "global_step", "batch_idx_train"]
)
def test_counters_at_any_level(key: str) -> None:
    for number, counted in ((1, 70), (2, 700)):
        saved(number, **{key: counted, "ema_state": {"decay": 0.9, key: counted + 1}, "config": {key: counted}})
    made, result = merged()
    assert made[key] == 700
    assert made["ema_state"] == {"decay": 0.9, key: 701}
    assert made["config"] == {key: 70}, "a setting is the first's"
    assert f"bookkeeping: {key} = 700, ema_state.{key} = 701" in result.notes


def test_a_kept_optimizer_has_its_own_step() -> None:
    for number in (1, 2):
        saved(number, optimizer={"state": {}, "param_groups": [], "step": number}, scheduler={"step": number}, step=number)
    sm.merge(["1.pth", "2.pth"], "out.pth", keep_optimizer=True)
    made = torch.load("out.pth", weights_only=True)
    assert made["optimizer"]["step"] == made["scheduler"]["step"] == 1
    assert made["step"] == 2


def test_what_is_true_of_the_first_file_only() -> None:
    for number in (1, 2):
        saved(number, hash=f"{number}abc", id=f"id{number}", name=f"voice {number}", optimizer=None, sr="40k")
    made, result = merged()
    assert made.keys() == {"model", "name", "optimizer", "sr"}
    assert made["optimizer"] is None, "an optimizer that was emptied stays"
    assert "left out of the output: hash, id (true of the first input only)" in result.notes
    assert "'name' is still voice 1, as the first input has it" in result.notes
    sm.convert("1.pth", "same.pth")
    assert torch.load("same.pth", weights_only=True)["hash"] == "1abc", "a conversion is of one file"


def test_checksums_of_files_are_not_copied() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        save_file({"w": torch.ones(3)}, f"{name}/model.safetensors")
        Path(name, "checklist.chk").write_text("0123  model.safetensors\n")
        Path(name, "params.json").write_text("{}")
    result = sm.merge(["a", "b"], "out/")
    assert not Path("out/checklist.chk").exists()
    assert Path("out/params.json").exists()
    assert any(note.startswith("left out of the output: checklist.chk (a checksum") for note in result.notes)


def test_counters_in_a_list_of_records() -> None:
    for number in (0, 1):
        torch.save(
            {
                "model": {"w": torch.ones(2)},
                "optimizer_history": [{"name": "x", "num_updates": 5}, {"name": "x", "num_updates": 10 + number}],
            },
            f"{number}.pt",
        )
    result = sm.merge(["0.pt", "1.pt"], "out.pt")
    history = torch.load("out.pt", weights_only=True)["optimizer_history"]
    assert history == [{"name": "x", "num_updates": 5}, {"name": "x", "num_updates": 11}]
    assert any("optimizer_history.1.num_updates = 11" in note for note in result.notes)


@pytest.mark.parametrize("longer", [{"h": [{"step": 9}, {"step": 10}]}, {"h": None}, {"h": [7]}, {}])
def test_lists_of_two_lengths_have_no_counters_in_common(longer: dict[str, Any]) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "h": [{"step": 5}]}, "0.pt")
    torch.save({"model": {"w": torch.ones(2)}, **longer}, "1.pt")
    sm.merge(["0.pt", "1.pt"], "out.pt")
    assert torch.load("out.pt", weights_only=True)["h"] == [{"step": 5}]


def test_a_shown_name_is_still_the_firsts() -> None:
    for number in (0, 1):
        torch.save({"weight": {"w": torch.ones(2)}, "info": f"{number + 1}0epoch", "sr": "40k"}, f"{number}.pth")
    result = sm.merge(["0.pth", "1.pth"], "out.pth")
    assert "'info' is still 10epoch, as the first input has it" in result.notes


def test_metadata_of_two_kinds_of_prediction() -> None:
    for number, kind in ((1, "epsilon"), (2, "v")):
        metadata = {"modelspec.prediction_type": kind, "modelspec.title": f"model {number}"}
        save_file({"w": torch.full((3,), float(number))}, f"{number}.safetensors", metadata)
    result = sm.merge(["1.safetensors", "2.safetensors"], "out.safetensors")
    said = "'modelspec.prediction_type' differs: epsilon in 1.safetensors, v in 2.safetensors; the first is kept"
    assert said in result.warnings
    again = sm.merge(["1.safetensors", "1.safetensors"], "same.safetensors")
    assert not any("modelspec" in warning for warning in again.warnings)


def test_weights_under_different_keys() -> None:
    """speakers_xtts.pth of two people: the mean is that of two voices, which nobody may have meant."""
    for number, speaker in ((1, "Ana"), (2, "Bo")):
        torch.save({speaker: {"gpt_cond_latent": torch.full((2,), float(number))}}, f"{number}.pth")
    result = sm.merge(["1.pth", "2.pth"], "out.pth")
    assert "the weights that are merged are those of Ana in 1.pth, Bo in 2.pth" in result.notes
    saved(1)
    saved(2)
    result = sm.merge(["1.pth", "2.pth"], "again.pth")
    assert not any("weights that are merged" in note for note in result.notes)
