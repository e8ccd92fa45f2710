"""Modules of several adapters are the same, whatever their dialect calls them."""

from __future__ import annotations

import pytest

import streammerge as sm
from adapters.arithmetic import adapter_of, drawn
from streammerge.adapters.modules import Adapter, read_adapter
from streammerge.factoring.naming import aligned, is_flat, said

KOHYA, DIFFUSERS = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")


def adapter(name: str, *modules: str) -> Adapter:
    tensors = {}
    for module in modules:
        down, up = KOHYA if is_flat(module) else DIFFUSERS
        tensors |= {module + down: drawn(1, 2, 6), module + up: drawn(2, 4, 2)}
    return read_adapter(adapter_of(tensors, name))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora_unet_mid_block_attentions_0_to_out_0", "unet.mid_block.attentions.0.to_out.0"),
        ("lora_unet_input_blocks_4_1_proj_in", "unet.down_blocks.1.attentions.0.proj_in"),
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"),
        ("unet.up_blocks.0.resnets.1.conv1", "lora_unet_output_blocks_1_0_in_layers_2"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("diffusion_model.double_blocks.0.img_attn.proj", "transformer.transformer_blocks.0.attn.to_out.0"),
        ("lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
    ],
)
def test_one_module_in_two_dialects(first: str, second: str) -> None:
    adapters = [adapter("one", first), adapter("other", second)]
    (name,) = found = aligned(adapters)
    assert name == first
    assert [number for number, _ in found[name]] == [0, 1]
    assert len(said(adapters, found)) == (first != second)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (
            "lora_unet_mid_block_attentions_0_to_q",
            "unet.down_blocks.0.attentions.1.to_k",
            "lora_unet_down_blocks_0_attentions_1_to_k",
        ),
        ("lora_unet_input_blocks_1_1_to_q", "unet.mid_block.attentions.0.to_q", "lora_unet_middle_block_1_to_q"),
        ("lora_unet_mid_block_attentions_0_to_q", "text_encoder.layers.0.fc1", "lora_te_layers_0_fc1"),
        ("lora_unet_mid_block_attentions_0_to_q", "text_encoder_2.layers.0.fc1", "lora_te2_layers_0_fc1"),
        ("unet.blocks.0.to_out.0", "lora_unet_blocks_11_to_out_0", "unet.blocks.11.to_out.0"),
        ("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.0.k_proj"),
    ],
)
def test_a_module_that_the_first_lacks_is_named_like_its_modules(first: str, second: str, name: str) -> None:
    adapters = [adapter("one", first), adapter("other", second)]
    found = aligned(adapters)
    assert list(found) == [first, name]
    assert any("only in other.safetensors" in note for note in said(adapters, found))


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ("unet.mid_block.attentions.0.to_q", "lora_unet_mid_block_attentions_0_to_out_0", "its dots cannot be told"),
        (
            "diffusion_model.double_blocks.0.img_attn.qkv",
            "transformer.transformer_blocks.0.attn.to_q",
            "division of its rows",
        ),
        ("lora_unet_double_blocks_0_img_mod_lin", "lora_unet_transformer_blocks_0_attn_to_q", "no counterpart"),
    ],
)
def test_a_name_without_counterpart_is_refused(first: str, second: str, match: str) -> None:
    with pytest.raises(sm.MismatchError, match=match):
        aligned([adapter("one", first), adapter("other", second)])


def test_two_modules_that_are_one_in_the_first_are_refused() -> None:
    two = adapter("two", "lora_unet_a_0_b", "unet.a.0.b")
    with pytest.raises(sm.MismatchError, match=r"are both lora_unet_a_0_b of one"):
        aligned([adapter("one", "lora_unet_a_0_b"), two])
    with pytest.raises(sm.MismatchError, match="one module in two dialects"):
        aligned([two])
