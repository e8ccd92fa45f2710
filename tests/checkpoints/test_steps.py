"""The folder of a run stands for its checkpoints, in the order of their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.steps import with_steps


def step(folder: Path, number: float) -> None:
    folder.mkdir(parents=True)
    save_file({"w": torch.full((3,), float(number))}, folder / "model.safetensors")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(path: str) -> list[str]:
    return [Path(each).name for each in with_steps([path])]


def test_the_last_of_a_folder(cli: Cli) -> None:
    for number in (90, 1000, 200):
        step(Path(f"run/checkpoint-{number}"), number)
    Path("run/logs").mkdir()
    step(Path("run/tmp-checkpoint-2000"), 7)
    out = cli("merge", "run", "--last", "2", "-o", "out.safetensors").stderr
    assert "chosen as the last 2: run/checkpoint-200, run/checkpoint-1000" in out
    assert load_safetensors(Path("out.safetensors"))["w"].tolist() == [600] * 3
    cli("merge", "run/", "--last", "2", "--schedule", "minus-sqrt", "-o", "curve.safetensors")
    cli("merge", "run/checkpoint-*", "--last", "2", "--schedule", "minus-sqrt", "-o", "pattern.safetensors")
    assert torch.equal(load_safetensors(Path("curve.safetensors"))["w"], load_safetensors(Path("pattern.safetensors"))["w"])
    sm.merge("run", "all.safetensors", schedule="linear")
    assert load_safetensors(Path("all.safetensors"))["w"].tolist() != [600] * 3
    sm.merge("run", "range.safetensors", range="90:200")
    assert load_safetensors(Path("range.safetensors"))["w"].tolist() == [145] * 3


def test_files_are_steps_too() -> None:
    Path("run").mkdir()
    for epoch, loss in ((9, 0.25), (10, 1e-05)):
        torch.save({"w": torch.ones(1)}, f"run/epoch={epoch}-val_loss={loss}.ckpt")
    torch.save({"w": torch.ones(1)}, "run/last.ckpt")
    assert names("run") == ["epoch=9-val_loss=0.25.ckpt", "epoch=10-val_loss=1e-05.ckpt"]


def test_a_model_beside_its_steps_stays_alone_if_nothing_is_chosen() -> None:
    step(Path("run"), 1)
    step(Path("run/checkpoint-5"), 5)
    step(Path("run/checkpoint-10"), 10)
    assert list(sm.inspect("run")) == ["w"]
    assert names("run") == ["checkpoint-5", "checkpoint-10"]
    assert with_steps(["run", "run/checkpoint-5"]) == ["run", "run/checkpoint-5"]


def test_a_broken_step_is_not_passed_over() -> None:
    step(Path("run/checkpoint-5"), 5)
    Path("run/checkpoint-10").mkdir()
    with pytest.raises(sm.FormatError, match="checkpoint-10 holds no checkpoint"):
        sm.plan("run", last=2)


def test_several_series_are_refused() -> None:
    for number in (1, 2):
        step(Path(f"run/G_{number}"), number)
        step(Path(f"run/D_{number}"), number)
    with pytest.raises(sm.RecipeError, match=r"several series: run/D_\*, run/G_\*; give one of these patterns"):
        sm.plan("run", last=2)


def test_parts_of_one_checkpoint_are_no_steps() -> None:
    for number in (1, 2):
        Path(f"run/model-0000{number}-of-00002.safetensors").parent.mkdir(exist_ok=True)
        save_file({f"w{number}": torch.ones(2)}, f"run/model-0000{number}-of-00002.safetensors")
        Path(f"ranks/mp_rank_0{number}").mkdir(parents=True)
    for path in ("run", "ranks"):
        assert with_steps([path]) == [path]
    with pytest.raises(sm.RecipeError, match="run is a folder without steps of a run"):
        sm.plan("run", last=2)


@pytest.mark.parametrize("below", ["checkpoints", "checkpoint", "lightning_logs/version_0/checkpoints"])
def test_steps_are_found_below_the_folder_of_a_run(below: str, cli: Cli) -> None:
    """accelerate, torchtitan and Lightning put them there."""
    for number in (5, 10, 100):
        step(Path(f"run/{below}/step_{number}"), number)
    Path("run/tb/x").mkdir(parents=True)
    assert names("run") == ["step_5", "step_10", "step_100"]
    cli("merge", "run", "--last", "2", "-o", "out.safetensors")
    assert load_safetensors(Path("out.safetensors"))["w"].tolist() == [55] * 3


def test_steps_of_two_runs_are_refused() -> None:
    for version in (0, 1):
        for number in (1, 2):
            step(Path(f"run/logs/version_{version}/checkpoints/s_{number}"), number)
    with pytest.raises(
        sm.RecipeError,
        match=r"several series: run/logs/version_0/checkpoints/s_\*, run/logs/version_1/checkpoints/s_\*; give",
    ):
        sm.plan("run", last=2)


def test_the_files_of_ranks_are_no_steps(cli: Cli) -> None:
    """Below the only step of a run, and where there is no run at all."""
    Path("run/checkpoint-10/ranks").mkdir(parents=True)
    for rank in (0, 1):
        torch.save({"w": torch.ones(3)}, f"run/checkpoint-10/ranks/model_{rank}.pt")
    said = cli("merge", "run", "--last", "2", "-o", "out.safetensors", code=2).stderr
    assert "--last 2, but run is a folder without steps of a run; give a pattern of them, like 'run/checkpoint-*'" in said


@pytest.mark.parametrize("options", [["--last", "2"], ["--best", "2", "--by", "loss"], ["--schedule", "wma"]])
def test_how_to_leave_out_a_last_step_that_is_not_whole(options: list[str], cli: Cli) -> None:
    """A training was killed while it saved. The command that the error names then works."""
    for number in (5, 10, 100):
        step(Path(f"run/checkpoint-{number}"), number)
        Path(f"run/checkpoint-{number}/trainer_state.json").write_text(f'{{"loss": {1 / number}}}')
    with Path("run/checkpoint-100/model.safetensors").open("r+b") as file:
        file.truncate(80)
    for inputs in ("run", "run/checkpoint-*"):
        said = cli("merge", inputs, *options, "-o", "out.safetensors", code=4).stderr
        assert "checkpoint-100 is the newest and may not be whole: --range :10 leaves it out" in said
    cli("merge", "run", *options, "--range", ":10", "-o", "out.safetensors")
    with Path("run/checkpoint-10/model.safetensors").open("r+b") as file:
        file.truncate(80)
    assert "leaves it out" not in cli("merge", "run", *options, "-o", "out2.safetensors", code=4).stderr


def test_what_is_no_newest_step_gets_no_advice(cli: Cli) -> None:
    """The file of an optimizer has the number of the step beside it."""
    Path("run").mkdir()
    for number in (1, 2):
        torch.save({"w": torch.ones(3)}, f"run/model_{number}.pt")
        torch.save({"state": {}, "param_groups": []}, f"run/opt_{number}.pt")
    said = cli("merge", "run/*.pt", "--last", "2", "-o", "out.pt", code=4).stderr
    assert "opt_2.pt" in said
    assert "leaves it out" not in said
