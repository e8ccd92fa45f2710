"""What a configuration announces and the tensors do not have."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.checkpoints.announced import unannounced
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec


def specs(layers: int = 4, *more: str, rows: int = 64, head: bool = True) -> dict[str, TensorSpec]:
    shapes = {"model.embed_tokens.weight": (rows, 8), "model.norm.weight": (8,)}
    shapes |= {f"model.layers.{n}.mlp.up_proj.weight": (16, 8) for n in range(layers)}
    shapes |= {"lm_head.weight": (rows, 8)} if head else {}
    shapes |= dict.fromkeys(more, (8, 8))
    return {name: TensorSpec(name, DType.BF16, shape) for name, shape in shapes.items()}


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
VISION = {"vision_config": {"num_hidden_layers": 2}}
MTP = {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({}, specs()),
        ({"tie_word_embeddings": True}, specs(head=False)),
        (VISION, specs(4, "visual.blocks.0.q.weight", "visual.blocks.1.q.weight")),
        (VISION, specs(4, "vpm.encoder.layers.0.q.weight", "vpm.encoder.layers.1.q.weight")),
        (MTP, specs(5)),
        (MTP, specs(4, "mtp.fc.weight")),
        ({"num_nextn_predict_layers": 0}, specs()),
        ({"num_hidden_groups": 1, "num_hidden_layers": 12}, specs(1)),
        ({"text_config": {"num_hidden_layers": 4, "vocab_size": 64}, "num_hidden_layers": None}, specs()),
        ({"pad_vocab_size_multiple": 8, "vocab_size": 61}, specs()),
        ({"model_type": None}, {}),
    ],
)
def test_sound_models_raise_no_alarm(config: dict[str, Any], tensors: dict[str, TensorSpec]) -> None:
    assert unannounced({**CONFIG, **config}, tensors) == []


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({}, specs(3), "config.json says num_hidden_layers 4, and the tensors have model.layers 3"),
        ({}, specs(5), "config.json says num_hidden_layers 4, and the tensors have model.layers 5"),
        ({}, specs(rows=70), "config.json says vocab_size 64, and model.embed_tokens.weight has 70 rows"),
        ({}, specs(head=False), "config.json says that the head is not tied to model.embed_tokens.weight, and there is no"),
        ({"tie_word_embeddings": True}, specs(), "is tied to model.embed_tokens.weight, and lm_head.weight is stored too"),
        (VISION, specs(), "config.json announces vision_config, and no tensor belongs to a part for vision"),
        ({"audio_config": {}}, specs(), "config.json announces audio_config, and no tensor belongs to a part for audio"),
        (MTP, specs(), "layers that predict further tokens (num_nextn_predict_layers 1), and no tensor belongs to them"),
    ],
)
def test_what_disagrees_is_said_once(config: dict[str, Any], tensors: dict[str, TensorSpec], said: str) -> None:
    (found,) = unannounced({**CONFIG, **config}, tensors)
    assert said in found


def test_tied_names_of_a_pickle_are_one_tensor() -> None:
    assert unannounced({**CONFIG, "tie_word_embeddings": True}, specs(), ["lm_head.weight"]) == []


def test_other_configurations_are_not_judged() -> None:
    assert unannounced({"num_hidden_layers": 9, "vocab_size": 1}, specs()) == []
