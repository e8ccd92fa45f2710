"""Models whose tensors have the same shapes, and that compute differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.config_differences import differences

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("one", "two", "keys"),
    [
        ({"rope_theta": 10000}, {"rope_theta": 10000.0}, []),
        ({"rope_theta": 10000}, {"rope_theta": 500000}, ["rope_theta"]),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, []),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}, ["rope_theta"]),
        ({"rope_theta": 1}, {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 4}}, ["rope_scaling"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, []),
        ({"rope_scaling": None, "rope_theta": 1}, {"rope_theta": 1}, []),
        (
            {"rope_theta": 1, "rope_local_base_freq": 2, "rope_scaling": {"rope_type": "linear", "factor": 8}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1, "rope_type": "linear", "factor": 8},
                    "sliding_attention": {"rope_theta": 2, "rope_type": "default"},
                }
            },
            [],
        ),
        ({"model_type": "llama"}, {"model_type": "llama", "rope_theta": 1000000}, ["rope_theta"]),
        ({"model_type": "llama"}, {"model_type": "llama", "rope_theta": 10000}, []),
        ({"num_attention_heads": 8}, {"num_attention_heads": 4}, ["num_attention_heads"]),
        ({"num_attention_heads": 8}, {}, []),
        ({"hidden_act": "silu"}, {"hidden_act": "swish"}, []),
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}, ["hidden_act"]),
        ({"text_config": {"rms_norm_eps": 1e-5}}, {"text_config": {"rms_norm_eps": 1e-6}}, ["rms_norm_eps"]),
        ({"text_config": {"rms_norm_eps": 1e-5}}, {"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
        (
            {"vision_config": {"layer_norm_eps": 1}},
            {"vision_config": {"layer_norm_eps": 2}},
            ["vision_config.layer_norm_eps"],
        ),
        ({"sliding_window": 8}, {"sliding_window": None}, ["sliding_window"]),
        ({"sliding_window": 8, "use_sliding_window": False}, {"sliding_window": None, "use_sliding_window": False}, []),
        ({"layer_types": ["a", "b"]}, {"layer_types": ["b", "a"]}, ["layer_types"]),
        ({"layer_types": ["a", "b"]}, {"layer_types": ["a"]}, []),
        ({"time_scale": float("nan")}, {"time_scale": float("nan")}, []),
        ({"model_type": "llama"}, {"model_type": "mistral"}, ["model_type"]),
        ({"architectures": ["UNet"]}, {"architectures": ["VAE"]}, ["architectures"]),
        ({"id2label": {"0": "NEG", "1": "POS"}}, {"id2label": {"0": "POS", "1": "NEG"}}, ["id2label"]),
        ({"id2label": {"0": "NEG", "1": "POS"}}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, []),
        ({"id2label": {"0": "NEG", "1": "POS"}}, {"id2label": {"0": "neg", "1": "pos"}}, []),
        (LLAMA, LLAMA | {"architectures": ["LlamaModel"], "torch_dtype": "float16", "use_cache": False}, []),
        (LLAMA, LLAMA | {"transformers_version": "5", "_name_or_path": "x", "eos_token_id": 3, "vocab_size": 9}, []),
    ],
)
def test_differences(one: dict[str, Any], two: dict[str, Any], keys: list[str]) -> None:
    assert [key for key, *_ in differences(one, two)] == keys
    assert [key for key, *_ in differences(two, one)] == keys


def folder(name: str, config: dict[str, Any] | None) -> None:
    Path(name).mkdir()
    save_file({"w": torch.ones(4)}, f"{name}/model.safetensors", {"format": "pt"})
    if config is not None:
        Path(name, "config.json").write_text(json.dumps(config))


def test_a_merge_warns_with_both_values_and_both_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder("a", LLAMA)
    folder("b", LLAMA | {"rope_theta": 500000.0, "rms_norm_eps": 1e-6})
    folder("same", LLAMA | {"torch_dtype": "float16"})
    folder("bare", None)
    plan = sm.plan(["a", "bare", "same", "b"])
    assert plan.warnings == [
        "a and b compute differently by their config.json: rope_theta is 10000.0 and 500000.0; rms_norm_eps is 1e-05 and "
        "1e-06. Weights of models that compute differently may not fit each other"
    ]
    assert not sm.plan(["bare", "a"]).warnings
    heads = {f"n{n}_heads": n for n in range(8)}
    folder("c", heads)
    folder("d", dict.fromkeys(heads, 9))
    assert "n5_heads is 5 and 9; and 2 more keys." in sm.plan(["c", "d"]).warnings[0]
