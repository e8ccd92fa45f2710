"""Weights of a run's checkpoints: schedules that stand in for a decay of the learning rate."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import Cli, load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.schedules import exponential_weights, schedule_weights

DECAYED = {
    "linear": lambda x: 1 - x,
    "minus-sqrt": lambda x: 1 - x**0.5,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("schedule", DECAYED)
def test_a_schedule_equals_steps_that_are_multiplied_by_the_decay(schedule: str, count: int) -> None:
    """Warmup-Stable and Merge: the weighted mean of checkpoints is the first one plus each later step times the decay."""
    checkpoints = [0.0]
    for place in range(1, count):
        checkpoints.append(checkpoints[-1] + 1.7**place)
    decayed = checkpoints[0]
    for place in range(1, count):
        decayed += DECAYED[schedule](place / count) * (checkpoints[place] - checkpoints[place - 1])
    weights = schedule_weights(schedule, count)
    assert sum(w * c for w, c in zip(weights, checkpoints, strict=True)) == pytest.approx(decayed)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


def test_the_weights_of_four_checkpoints() -> None:
    assert schedule_weights("linear", 4) == pytest.approx([0.25] * 4)
    assert schedule_weights("minus-sqrt", 4) == pytest.approx(
        [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    )
    assert schedule_weights("cosine", 4) == pytest.approx([0.1464466, 0.3535534, 0.3535534, 0.1464466])
    assert schedule_weights("wma", 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert schedule_weights("ema:0.5", 4) == pytest.approx([0.125, 0.125, 0.25, 0.5])


def test_exponential_weights() -> None:
    assert exponential_weights(0.5, 3) == [0.25, 0.25, 0.5]
    assert exponential_weights(0.0, 2) == [0.0, 1.0]
    assert sum(exponential_weights(0.9, 50)) == pytest.approx(1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for step in (100, 200, 1000, 90):
        Path(f"step-{step}").mkdir()
        save_file({"w": torch.tensor([float(step)])}, f"step-{step}/model.safetensors")
    return tmp_path


def merged(path: str) -> float:
    found = Path(path)
    return float(load_safetensors(found / "model.safetensors" if found.is_dir() else found)["w"])


def test_the_last_checkpoints_of_a_run_by_a_schedule(run: Path, cli: Cli) -> None:
    shown = cli("merge", "step-*", "--last", "3", "--schedule", "wma", "-o", "out.safetensors")
    assert merged("out.safetensors") == pytest.approx(float(Fraction(100 + 2 * 200 + 3 * 1000, 6)))
    said = "weights of the schedule wma: step-100 0.166667, step-200 0.333333, step-1000 0.5"
    assert said in shown.stdout + shown.stderr
    assert said in cli("plan", "step-*", "--last", "3", "--schedule", "wma").stdout


def test_inputs_named_one_by_one_are_put_in_the_order_of_their_numbers(run: Path) -> None:
    sm.merge(["step-1000", "step-200"], "out.safetensors", schedule="wma")
    assert merged("out.safetensors") == pytest.approx((200 + 2 * 1000) / 3)
    notes = sm.plan(["step-1000", "step-200"], schedule="wma").notes
    assert any(note.startswith("put in the order of their numbers, the oldest first: step-200") for note in notes)


def test_a_schedule_is_written_into_the_recipe_as_weights(run: Path, cli: Cli) -> None:
    recipe = cli("plan", "step-*", "--schedule", "minus-sqrt", "--format", "yaml").stdout
    Path("again.yaml").write_text(recipe)
    sm.merge("step-*", "a.safetensors", schedule="minus-sqrt")
    sm.merge(recipe="again.yaml", out="b.safetensors")
    assert merged("a.safetensors") == merged("b.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "minus_sqrt"}, "`schedule` takes linear, minus-sqrt, cosine, wma, ema:0.99, not minus_sqrt"),
        ({"schedule": "ema"}, "needs its decay, like ema:0.99"),
        ({"schedule": "ema:x"}, "needs its decay, like ema:0.99, not ema:x"),
        ({"schedule": "ema:1"}, "from 0 to below 1, not 1"),
        ({"schedule": "ema:nan"}, "from 0 to below 1, not nan"),
        ({"schedule": "wma:3"}, "`schedule` takes"),
        ({"schedule": "wma", "weights": [1, 1, 1, 1]}, "`schedule` gives the weights; leave `weights` out"),
        ({"schedule": "wma", "ema_decay": 0.5}, "both give the weights"),
    ],
)
def test_what_is_no_schedule(run: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(sm.RecipeError, match=words):
        sm.plan("step-*", **options)  # type: ignore[arg-type]
