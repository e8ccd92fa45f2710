"""What a checkpoint's name says: its step, its epoch, another number, metrics."""

from __future__ import annotations

import pytest

from streammerge.checkpoints.numbers import in_order, metric_in, number_of, numbers_of, numeric_order


def test_numbers_in_names_are_compared_as_numbers() -> None:
    assert sorted(["c-1000", "c-200", "c-200b"], key=numeric_order) == ["c-200", "c-200b", "c-1000"]
    assert sorted(["10", "9", "a", ""], key=numeric_order) == ["", "9", "10", "a"]
    assert sorted(["e1-s10", "e1-s9", "e01-s1", "e10-s0"], key=numeric_order)[-1] == "e10-s0"
    assert sorted(["\u0662", "3"], key=numeric_order) == ["3", "\u0662"], "digits of other scripts are letters"


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


def test_dates_are_one_number() -> None:
    """By the seconds alone, the last of these would be the one of the year before."""
    names = ["2023-12-31_23-59-59.pt", "2024-01-31_12-00-00.pt", "2024-02-01_09-00-00.pt"]
    assert in_order(names[::-1]) == names
    assert list(numbers_of(names).values()) == [20231231235959, 20240131120000, 20240201090000]
    names = ["run_20231231-235959.pt", "run_20240131-120000.pt", "run_20240201T090000.pt"]
    assert in_order(names[::-1]) == names
    assert in_order(["a_2024-02-01.pt", "a_2023-12-31.pt"]) == ["a_2023-12-31.pt", "a_2024-02-01.pt"]
    assert number_of("model_2024-01-31_step=500.pt") == 500
    assert number_of("ckpt_2024-01-31_5.pt") == 5
    assert list(numbers_of(["model_20000101.pt", "model_20500000.pt"]).values()) == [20000101, 20500000], (
        "eight digits are a step"
    )


def test_metrics_in_names() -> None:
    assert metric_in("epoch=3-val_loss=0.123.ckpt", "val_loss") == 0.123
    assert metric_in("epoch_3_loss_0.5.pth", "loss") == 0.5
    assert metric_in("epoch=3-val_loss=-1.5e-3-v1.ckpt", "val_loss") == -0.0015
    assert metric_in("epoch=3-val_loss=0.123.ckpt", "loss") is None, "val_loss is another metric"
    assert metric_in("val_loss=0.25/model.safetensors", "val_loss") == 0.25
