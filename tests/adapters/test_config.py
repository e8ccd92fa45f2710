"""PEFT's configuration."""

from __future__ import annotations

import math
from typing import Any

import pytest

from streammerge.adapters.config import config_of
from streammerge.errors import FormatError, MismatchError


@pytest.mark.parametrize(
    ("tree", "module", "rank", "scale"),
    [
        ({}, "m.q", 8, 1.0),
        ({"r": 4, "lora_alpha": 6}, "m.q", 4, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, "m.q", 4, 3.0),
        ({"r": 4, "rank_pattern": {"q": 2}}, "m.q", 2, 4.0),
        ({"r": 4, "rank_pattern": {"q": 2}}, "m.proj_q", 4, 2.0),
        ({"r": 4, "rank_pattern": {"m.*": 3, "q": 2}}, "m.q", 3, 8 / 3),
        ({"r": 4, "rank_pattern": {"^m.0.q": 3}, "alpha_pattern": {"0.q": 9}}, "m.0.q", 3, 3.0),
        ({"r": 4, "alpha_pattern": {"(": 9, "q": 2}}, "m.q", 4, 0.5),
        ({"peft_type": "LOHA", "r": 4, "alpha": 2}, "m.q", 4, 0.5),
    ],
)
def test_rank_and_scale(tree: dict[str, Any], module: str, rank: int, scale: float) -> None:
    config = config_of(tree, "c")
    assert config.rank(module) == rank
    assert math.isclose(config.scale(module), scale)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"peft_type": "VERA"}, "kind VERA cannot be merged"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is set"),
        ({"megatron_config": {"x": 1}}, "megatron_config is set"),
        ({"future": True}, "future is set, and what it does"),
        ({"init_lora_weights": "loftq"}, "replaced the base by a quantised one"),
        ({"init_lora_weights": "corda"}, "data of the training"),
        ({"init_lora_weights": "something"}, "it is not known"),
    ],
)
def test_what_cannot_be_merged_is_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        config_of(tree, "c")


@pytest.mark.parametrize(
    "tree",
    [
        {"r": "8"},
        {"r": 0},
        {"r": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": None},
        {"r": None},
        {"rank_pattern": [1]},
        {"use_dora": "yes"},
        {"target_parameters": [3]},
        {"trainable_token_indices": ["a"]},
    ],
)
def test_values_of_other_kinds_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="takes"):
        config_of(tree, "c")


def test_what_is_not_set_does_not_matter() -> None:
    assert config_of({"future": None, "other": [], "third": False, "use_qalora": False}, "c").r == 8
    assert config_of({"init_lora_weights": "gaussian"}, "c").init == ""
    assert config_of({"init_lora_weights": "pissa"}, "c").init == "pissa"
    assert config_of({"trainable_token_indices": [1, 2]}, "c").tokens == {"": (1, 2)}
    assert config_of({"peft_type": "IA3", "feedforward_modules": ["down"]}, "c").is_feedforward("m.down")
    assert config_of({"peft_type": "IA3", "feedforward_modules": ".*down"}, "c").is_feedforward("m.down")
