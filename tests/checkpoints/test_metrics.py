"""Numbers beside a checkpoint: the trainer's state, YAML and JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm


def value(path: str = "out.safetensors") -> float:
    return float(load_safetensors(Path(path))["w"])


def test_the_trainers_state_beside_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    history = [{"step": step, "eval_loss": loss} for step, loss in ((100, 0.9), (200, 0.5), (300, 0.7))]
    for step in (100, 200, 300):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.tensor([float(step)])}, folder / "model.safetensors")
        logged = [entry for entry in history if entry["step"] <= step] + [{"step": step, "loss": 3.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logged}))
    sm.merge(["checkpoint-*"], "out.safetensors", best=2, by="eval_loss")
    assert value() == 250
    with pytest.raises(sm.RecipeError, match=r"has no number f1; it has eval_loss, loss, step"):
        sm.plan(["checkpoint-*"], best=1, by="f1")


def test_a_state_that_several_files_share_is_asked_for_each_files_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    losses = {100: 3.0, 200: 1.0, 300: 2.0}
    for step in losses:
        save_file({"w": torch.tensor([float(step)])}, f"checkpoint-{step}.safetensors")
    history = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    Path("trainer_state.json").write_text(json.dumps({"global_step": 300, "log_history": history}))
    sm.merge("checkpoint-*.safetensors", "out.safetensors", best=1, by="eval_loss")
    assert value() == 200


def test_metrics_beside_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save_file({"w": torch.tensor([float(step)])}, f"m{step}.safetensors")
        Path(f"m{step}.yaml").write_text(f"val: {{loss: {abs(step - 2)}e-3}}\n")
    Path("best_k.yml").write_text("/elsewhere/m1.safetensors: 3.5\n/elsewhere/m2.safetensors: 1.5\nm3.safetensors: 0.5\n")
    Path("hostile.yaml").write_text("!!python/object/apply:os.system [touch hacked]\n")
    assert sm.plan("m*.safetensors", best=1, by="val.loss").recipe.inputs == ("m2.safetensors",)
    assert sm.plan("m*.safetensors", best=1, by="best_k").recipe.inputs == ("m3.safetensors",)
    assert not Path("hacked").exists()
    with pytest.raises(sm.RecipeError, match=r"has no number f1; it has .*val\.loss"):
        sm.plan("m*.safetensors", best=1, by="f1")


def test_a_trainers_state_with_nan_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python writes NaN into JSON where a gradient overflowed, and reads it again."""
    monkeypatch.chdir(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.25)):
        Path(f"checkpoint-{step}").mkdir()
        save_file({"w": torch.tensor([float(step)])}, f"checkpoint-{step}/model.safetensors")
        history = [{"step": step, "grad_norm": float("nan")}, {"step": step, "eval_loss": loss}]
        Path(f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    assert "NaN" in Path("checkpoint-1/trainer_state.json").read_text()
    assert sm.plan("checkpoint-*", best=1, by="eval_loss").recipe.inputs == ("checkpoint-2",)


@pytest.mark.parametrize("name", ["CKPT.yaml", "trainer_state.json"])
def test_what_is_beside_a_file_in_a_folder_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SpeechBrain has a folder for each checkpoint, with the error rate in ``CKPT.yaml``."""
    monkeypatch.chdir(tmp_path)
    for number, rate in ((1, 9.5), (2, 7.5), (3, 8.5)):
        folder = Path(f"CKPT+0{number}")
        folder.mkdir()
        save_file({"w": torch.tensor([float(number)])}, folder / "model.safetensors")
        state = {"log_history": [{"step": 40, "WER": rate}], "global_step": 40}
        (folder / name).write_text(f"WER: {rate}\n" if name == "CKPT.yaml" else json.dumps(state))
    sm.merge("CKPT+*/model.safetensors", "out.safetensors", best=2, by="WER")
    assert value() == 2.5
    save_file({"w": torch.tensor([4.0])}, "CKPT+03/other.safetensors")
    with pytest.raises(sm.RecipeError, match="has no number WER"):
        sm.merge("CKPT+0*/*.safetensors", "two.safetensors", best=2, by="WER")
