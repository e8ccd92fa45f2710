"""Choosing among checkpoints: numerically, by range, by a number in the files; exponential weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.choosing import choose

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


def test_a_measure_that_may_be_better_where_it_is_higher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step, accuracy in ((1, 0.5), (2, 0.9)):
        torch.save({"model": {"w": torch.ones(2) * step}, "eval": {"accuracy": accuracy, "wer": accuracy}}, f"s-{step}.pt")
    note = "eval.accuracy may be better where it is higher: `highest=True` takes the highest"
    assert note in sm.plan(["s-*.pt"], best=1, by="eval.accuracy").notes
    assert note not in sm.plan(["s-*.pt"], best=1, by="eval.accuracy", highest=True).notes
    assert not [each for each in sm.plan(["s-*.pt"], best=1, by="eval.wer").notes if "may be better" in each]


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


def test_exponential_weights(run: Path, cli: Cli) -> None:
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
        ({"range": "5000:"}, r"none of the 4 checkpoints has such a number; they have \d+, \d+"),
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


@pytest.mark.parametrize(
    ("names", "chosen", "passed"),
    [
        (["9epoch", "10epoch", "checkpoint", "valid.acc.ave_10best"], ["9epoch", "10epoch"], ["averages", "no number"]),
        (["epoch-1", "epoch-2", "epoch-2-avg-1", "pretrained"], ["epoch-1", "epoch-2"], ["averages", "no number"]),
        (["m--epoch=1", "m--epoch=2", "m--epoch=1-EMA", "m--epoch=2-EMA"], ["m--epoch=1", "m--epoch=2"], ["averages"]),
        (["epoch=8", "epoch=9", "last"], ["epoch=9", "last"], []),
        (["m_ema-1", "m_ema-2"], ["m_ema-1", "m_ema-2"], []),
        (["wave-1", "wave-2"], ["wave-1", "wave-2"], []),
    ],
)  # fmt: skip
def test_the_last_are_steps_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], chosen: list[str], passed: list[str]
) -> None:
    """ESPnet, icefall and NeMo leave averages and copies of another purpose beside the steps."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(names):
        torch.save({"w": torch.tensor([float(number)])}, f"{name}.pt")
    found, notes = choose(["*.pt"], last=2)
    assert found == [f"{name}.pt" for name in chosen]
    assert len(notes) == len(passed) + 1
    for note, word in zip(notes, passed, strict=False):
        assert note.startswith("passed over")
        assert word in note


@pytest.mark.parametrize("wish", [{"last": 2}, {"range": "1:30"}])
def test_steps_and_epochs_have_no_common_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("epoch-29", "epoch-30", "checkpoint-1000"):
        torch.save({"w": torch.ones(1)}, f"{name}.pt")
    with pytest.raises(sm.RecipeError, match=r"checkpoint-1000.pt has a step, and epoch-29.pt an epoch"):
        choose(["*.pt"], **wish)  # type: ignore[arg-type]
    assert choose(["epoch-*.pt"], last=2)[0] == ["epoch-29.pt", "epoch-30.pt"]


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_best_by_a_tensor_of_one_element(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nanoGPT writes its loss as a tensor."""
    monkeypatch.chdir(tmp_path)
    for number in (3, 1, 2):
        loss = torch.full(shape, number).to(dtype)
        torch.save({"model": {"w": torch.ones(2)}, "best": {"val_loss": loss}, "two": torch.ones(2)}, f"{number}.pt")
    chosen, notes = choose(["1.pt", "2.pt", "3.pt"], best=2, by="best.val_loss", highest=True)
    assert chosen == ["2.pt", "3.pt"]
    assert "chosen by best.val_loss, highest first: 3.pt (3), 2.pt (2)" in notes
    with pytest.raises(sm.RecipeError, match="has no number two"):
        choose(["1.pt", "2.pt"], best=1, by="two")


def test_shards_of_one_checkpoint_are_not_merged_with_each_other(run: Path) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        for number in (1, 2):
            save_file({f"w{number}": torch.ones(2)}, f"{folder}/model-0000{number}-of-00002.safetensors")
    with pytest.raises(sm.RecipeError, match="are shards of one checkpoint; give its folder, a"):
        choose(["a/model-*.safetensors"])
    assert choose(["a/model-00001-of-00002.safetensors", "b/model-00001-of-00002.safetensors"])[1] == []
    (note,) = sm.inspect("a/model-00001-of-00002.safetensors").notes
    assert "is one shard of a checkpoint" in note
    assert sm.inspect("a").notes != [note]
