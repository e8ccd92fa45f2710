"""Names of adapters' factors, as programs write them."""

from __future__ import annotations

import pytest

from streammerge.tensors.adapters import factors, holds_its_base, is_adapter


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (
            [
                "base_model.model.model.layers.0.q_proj.lora_A.weight",
                "base_model.model.model.layers.0.q_proj.lora_B.weight",
            ],
            "LoRA",
        ),
        (["model.q.lora_A.default.weight", "model.q.lora_magnitude_vector.default.weight"], "LoRA"),
        (["base_model.model.wte.lora_embedding_A", "base_model.model.wte.lora_embedding_B"], "LoRA"),
        (
            [
                "lora_unet_x.lora_up.weight",
                "lora_unet_x.lora_down.weight",
                "lora_unet_x.lora_mid.weight",
                "lora_unet_x.alpha",
            ],
            "LoRA",
        ),
        (["unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight"], "LoRA"),
        (["unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight"], "LoRA"),
        (["lora_x.hada_w1_a", "lora_x.hada_w2_b", "lora_x.hada_t1", "lora_x.alpha"], "LoHa"),
        (["lora_x.lokr_w1", "lora_x.lokr_w2_a", "lora_x.alpha"], "LoKr"),
        (["m.oft_r.default.weight", "n.oft_blocks"], "OFT"),
        (["m.vera_lambda_b", "m.vera_lambda_d"], "VeRA"),
    ],
)
def test_factors(names: list[str], kind: str) -> None:
    assert factors(["model.norm.weight", *names]) == dict.fromkeys(names, kind)
    assert is_adapter(names)


def test_what_only_looks_like_one() -> None:
    """Low-rank parts of models themselves, scales that enter linearly, and an alpha of its own."""
    names = [
        "layers.0.attn.w_lora.lora.0.weight",
        "layers.0.self_attn.kv_a_proj.weight",
        "base_model.model.h.0.ia3_l",
        "snake.alpha",
        "lora.weight",
        "explora_A.weight",
    ]
    assert factors(names) == {}
    assert not is_adapter(names)
    assert not is_adapter([])


def test_most_tensors_make_an_adapter() -> None:
    pair = ["m.q.lora_A.weight", "m.q.lora_B.weight"]
    assert is_adapter([*pair, "m.head.weight"])
    assert not is_adapter([*pair, "m.q.weight", "m.head.weight"])


def test_a_model_with_an_adapter_in_it_is_told_from_an_adapter() -> None:
    pair = ["m.q.lora_A.default.weight", "m.q.lora_B.default.weight"]
    assert holds_its_base([*pair, "m.q.base_layer.weight"])
    assert not holds_its_base([*pair, "m.q.base_layer.bias"])  # PEFT saves the biases of an adapter so
    assert not holds_its_base(["m.experts.base_layer.lora_A.weight"])
