"""Choosing among checkpoints: numerically, by range, by a number in the files; exponential weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.choosing import choose, exponential_weights, number_of

LOSSES = {200: 3.0, 1000: 2.0, 90: 5.0, 400: 1.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of one training, each with its step as its only weight and its losses beside it."""
    monkeypatch.chdir(tmp_path)
    for step, loss in LOSSES.items():
        content = {
            "model": {"w": torch.tensor([float(step)])},
            "step": step,
            "model_loss": {"eval_loss": loss, "note": "x"},
        }
        torch.save(content, f"checkpoint-{step}.pt")
    return tmp_path


def value(path: str = "out.safetensors") -> float:
    return float(load_safetensors(Path(path))["w"])


def test_the_best_by_a_number_in_the_files(run: Path, cli: Cli) -> None:
    chosen = ["--best", "2", "--by", "model_loss.eval_loss"]
    cli("merge", "checkpoint-*.pt", *chosen, "-o", "out.safetensors")
    assert value() == 700
    cli("merge", "checkpoint-*.pt", *chosen, "--highest", "-o", "high.safetensors")
    assert value("high.safetensors") == 145
    shown = cli("plan", "checkpoint-*.pt", *chosen).stdout
    assert "chosen by model_loss.eval_loss, lowest first: checkpoint-400.pt (1), checkpoint-1000.pt (2)" in shown
    assert "passed over: checkpoint-200.pt (3), checkpoint-90.pt (5)" in shown


def test_ranges_and_the_last(run: Path, cli: Cli) -> None:
    for wish, expected in (
        (["--range", "200:400"], 300),
        (["--range", ":200"], 145),
        (["--range", "400:"], 700),
        (["--range", "90:400", "--last", "2"], 300),
        (["--range", "90:400", "--best", "1", "--by", "model_loss.eval_loss"], 400),
    ):
        cli("merge", "checkpoint-*.pt", *wish, "-o", "out.safetensors", "--overwrite")
        assert value() == expected, wish
    assert (
        "chosen by --range 200:400: 2 of 4, checkpoint-200.pt, checkpoint-400.pt"
        in cli("plan", "checkpoint-*.pt", "--range", "200:400").stdout
    )
    assert (
        "chosen as the last 2: checkpoint-400.pt, checkpoint-1000.pt"
        in cli("plan", "checkpoint-*.pt", "--last", "2").stdout
    )


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


def test_exponential_weights(run: Path, cli: Cli) -> None:
    assert exponential_weights(0.5, 3) == [0.25, 0.25, 0.5]
    assert exponential_weights(0.0, 2) == [0.0, 1.0]
    assert sum(exponential_weights(0.9, 50)) == pytest.approx(1)
    sm.merge("checkpoint-*.pt", "out.safetensors", ema_decay=0.5)
    average = 90.0
    for step in (200, 400, 1000):
        average = 0.5 * average + 0.5 * step
    assert value() == pytest.approx(average)
    sm.merge("checkpoint-*.pt", "ema.safetensors", method="ema", parameters={"decay": 0.5})
    assert value("ema.safetensors") == pytest.approx(average)
    assert "weight 0.125" in cli("plan", "checkpoint-*.pt", "--ema-decay", "0.5").stdout


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"best": 1}, "`best` needs `by`"),
        ({"by": "step"}, "`by` needs `best`"),
        ({"highest": True}, "`best`, which is not given"),
        ({"best": 1, "by": "step", "last": 1}, "both choose"),
        ({"best": 9, "by": "step"}, "only 4 checkpoints"),
        ({"last": 9}, "only 4 checkpoints"),
        ({"last": 0}, "positive"),
        ({"best": 1, "by": "model_loss.note"}, "has no number model_loss.note; it has model_loss.eval_loss, step"),
        ({"range": "5"}, "FROM:TO"),
        ({"range": ":"}, "FROM:TO"),
        ({"range": "a:b"}, "FROM:TO"),
        ({"range": "5000:"}, "none of the 4 checkpoints"),
        ({"ema_decay": 1.0}, "from 0 to below 1"),
        ({"ema_decay": 0.5, "weights": [1, 1, 1, 1]}, "leave `weights` out"),
    ],
)
def test_what_cannot_be_chosen(run: Path, wish: dict[str, object], words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        sm.plan("checkpoint-*.pt", **wish)  # type: ignore[arg-type]


def test_a_number_that_is_no_number(run: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "step": float("nan")}, "checkpoint-5.pt")
    with pytest.raises(sm.RecipeError, match="is nan, by which nothing can be chosen"):
        choose(["checkpoint-5.pt", "checkpoint-90.pt"], best=1, by="step")
    torch.save({"w": torch.zeros(1)}, "nameless.pt")
    with pytest.raises(sm.RecipeError, match="needs a number in each name"):
        choose(["nameless.pt"], range="1:2")


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


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("run/checkpoint-500/model.safetensors", 500),
        ("epoch=3-step=500.ckpt", 500),
        ("step=100-v1.ckpt", 100),
        ("G_12000.pth", 12000),
        ("llama-7b-checkpoint-3.bin", 3),
        ("last.pth", None),
    ],
)
def test_the_number_of_a_checkpoint(path: str, number: int | None) -> None:
    assert number_of(path) == number
