"""What in a checkpoint is the state or a record of the training."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.pickles.training_state import bars, is_measurement, is_record, is_training_state


@pytest.mark.parametrize(
    ("key", "value", "stale"),
    [
        ("optimizer", {}, True),
        ("optim_g", [], True),
        ("lr_scheduler", None, True),
        ("schedulers", [], True),
        ("optimizer_states", [], True),
        ("generator_optimizer", {}, True),
        ("optimizer_history", [], False),
        ("scaler", {"scale": 1024.0}, True),
        ("scaler", {}, True),
        ("scaler", {"mean_": 1.0}, False),
        ("opt", {"lr": 0.1}, False),
        ("opt", {"state": {0: {}}, "param_groups": []}, True),
        ("model", {"w": 1}, False),
        ("epoch", 3, False),
        (3, {}, False),
    ],
)
def test_what_is_stale_after_a_merge(key: Any, value: Any, stale: bool) -> None:
    assert is_training_state(key, value) is stale


@pytest.mark.parametrize(
    "value",
    [
        {"state": {}, "param_groups": []},
        {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9},
        {"loss_scaler0": {}},
        {"last_epoch": 3, "_step_count": 4, "base_lrs": [1.0]},
    ],
)
@pytest.mark.parametrize("key", [1, "anything", "NativeMixedPrecisionPlugin"])
def test_a_state_is_known_by_its_content(key: Any, value: Any) -> None:
    assert is_training_state(key, value)
    assert not is_training_state(key, {"w": 1, "last_epoch": 3})


def test_records_and_measurements_are_no_weights() -> None:
    for key in ("callbacks", "rng_state", "train_loss", "config", "message_hub"):
        assert bars(key)
    assert not any(map(bars, ("model", "ema", "loss_fn", 3)))
    assert is_record("callbacks")
    assert not is_record("train_loss")
    assert is_measurement("train_loss")
    assert not is_measurement("feature_stats")
