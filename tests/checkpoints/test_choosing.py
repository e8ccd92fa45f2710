"""Choosing among checkpoints: numerically, by range, by a number in the files; exponential weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.choosing import choose, exponential_weights
from streammerge.checkpoints.numbers import in_order, metric_in, number_of, numbers_of

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
    sm.merge("checkpoint-*.pt", "ema.safetensors", method="ema", decay=0.5)
    assert value("ema.safetensors") == pytest.approx(average)
    assert "weight 0.125" in cli("plan", "checkpoint-*.pt", "--ema-decay", "0.5").stdout


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"best": 1}, "--best needs --by KEY"),
        ({"by": "step"}, "--by needs --best N"),
        ({"highest": True}, "--best, which is not given"),
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
        ({"ema_decay": 0.5, "weights": [1, 1, 1, 1]}, "leave --weights out"),
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


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("Conformer--val_wer=0.0899-epoch=97.ckpt", 97),
        ("Conformer--val_wer=0.0899-epoch=97-last.ckpt", 97),
        ("weights.97-0.1250.hdf5", 97),
        ("epoch=7-train_loss_step=0.5.ckpt", 7),
        ("step=12000-val_loss=1e-05.ckpt", 12000),
        ("step=12000-epoch=3.ckpt", 12000),
        ("model_iteration_500.pth", 500),
        ("voice_e20_s1040.pth", 1040),
        ("voice-e15.ckpt", 15),
        ("model-v1.5-300.pth", 300),
        ("epoch-3.pt", 3),
        ("updates_10k.pt", 10_000),
        ("model-0.5.pth", 5),  # nothing else is there
    ],
)
def test_a_metric_is_no_number_of_a_checkpoint(path: str, number: int) -> None:
    assert number_of(path) == number


def test_the_kind_of_number_in_which_names_differ() -> None:
    """What all names share tells nothing; a step that starts again in each epoch is no number."""
    assert numbers_of(["epoch=1-batch=32.pt", "epoch=2-batch=32.pt"]) == {
        "epoch=1-batch=32.pt": 1,
        "epoch=2-batch=32.pt": 2,
    }
    assert list(numbers_of(["step2/epoch=5.pt", "step2/epoch=7.pt"]).values()) == [5, 7]
    assert list(numbers_of(["step2/model_5.pt", "step2/model_7.pt"]).values()) == [5, 7]
    assert list(numbers_of(["global_step90/rank_00.pt", "global_step200/rank_00.pt"]).values()) == [90, 200]
    assert list(numbers_of(["epoch=1-step=900.pt", "epoch=2-step=100.pt"]).values()) == [1, 2]
    names = ["e2_s100.pt", "e1_s900.pt", "e2_s50.pt"]
    assert in_order(names) == ["e1_s900.pt", "e2_s50.pt", "e2_s100.pt"]
    assert in_order(["epoch=2-step=2000.pt", "epoch=10-step=900.pt"]) == ["epoch=2-step=2000.pt", "epoch=10-step=900.pt"]
    assert in_order(["best.pt", "step=9.pt", "step=10.pt"]) == ["best.pt", "step=9.pt", "step=10.pt"]


def test_last_range_and_the_exponential_weights_count_by_the_same_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for epoch, error in {9: 0.3, 10: 0.05, 97: 0.0899, 98: 0.2}.items():
        save_file({"w": torch.tensor([float(epoch)])}, f"val_wer={error:.4f}-epoch={epoch}.safetensors")
    everything = "val_wer=*.safetensors"
    sm.merge(everything, "last.safetensors", last=2)
    assert value("last.safetensors") == 97.5
    sm.merge(everything, "range.safetensors", range="97:98")
    assert value("range.safetensors") == 97.5
    sm.merge(everything, "best.safetensors", best=1, by="val_wer")
    assert value("best.safetensors") == 10, "the metric stands in the name"
    sm.merge(everything, "ema.safetensors", ema_decay=0.5)
    average = 9.0
    for epoch in (10, 97, 98):
        average = 0.5 * average + 0.5 * epoch
    assert value("ema.safetensors") == pytest.approx(average)


def test_metrics_in_names() -> None:
    assert metric_in("epoch=3-val_loss=0.123.ckpt", "val_loss") == 0.123
    assert metric_in("epoch_3_loss_0.5.pth", "loss") == 0.5
    assert metric_in("epoch=3-val_loss=-1.5e-3-v1.ckpt", "val_loss") == -0.0015
    assert metric_in("epoch=3-val_loss=0.123.ckpt", "loss") is None, "val_loss is another metric"
    assert metric_in("val_loss=0.25/model.safetensors", "val_loss") == 0.25


@pytest.mark.parametrize("way", ["link", "hard link", "copy", "folder"])
def test_a_checkpoint_that_a_glob_meets_twice_counts_once(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (100, 200):
        place = Path(f"best_{step}")
        if way == "folder":
            place.mkdir()
        save_file({"w": torch.tensor([float(step)])}, place / "model.safetensors" if way == "folder" else place)
    if way == "link":
        Path("best").symlink_to("best_200")
    elif way == "hard link":
        Path("best").hardlink_to("best_200")
    elif way == "copy":
        shutil.copy("best_200", "best")
    else:
        shutil.copytree("best_200", "best")
    planned = sm.plan("best*")
    assert planned.recipe.inputs == ("best_100", "best_200"), "the name with a number stays"
    assert "best is the same checkpoint as best_200, so it counts once" in planned.notes
    assert sm.plan(["best", "best_100", "best_200"], last=2).recipe.inputs == ("best_100", "best_200")
    named = sm.plan(["best", "best_100", "best_200"])
    assert len(named.recipe.inputs) == 3, "what was named one by one counts as often as it was named"
    assert ("best_200 is the same checkpoint as best, and counts twice" in named.notes) == ("link" in way)


def test_checkpoints_of_one_size_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte in the middle of the file differs, far from its end."""
    monkeypatch.chdir(tmp_path)
    tensor = torch.zeros(100_000)
    save_file({"w": tensor}, "a1.safetensors")
    tensor[10] = 1
    save_file({"w": tensor}, "a2.safetensors")
    assert len(sm.plan("a*.safetensors").recipe.inputs) == 2


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
