"""Other names of the same tensors."""

from __future__ import annotations

import pytest

from streammerge.adapters.layouts import other_names

PAIRS = (
    ("input_blocks.1.0.in_layers.0.weight", "down_blocks.0.resnets.0.norm1.weight"),
    (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    ),
    ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
    ("middle_block.2.out_layers.3.bias", "mid_block.resnets.1.conv2.bias"),
    ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
    ("output_blocks.11.1.proj_in.weight", "up_blocks.3.attentions.2.proj_in.weight"),
    ("output_blocks.11.0.skip_connection.weight", "up_blocks.3.resnets.2.conv_shortcut.weight"),
    ("time_embed.2.weight", "time_embedding.linear_2.weight"),
    ("double_blocks.3.img_mlp.0.weight", "transformer_blocks.3.ff.net.0.proj.weight"),
    ("single_blocks.12.linear2.bias", "single_transformer_blocks.12.proj_out.bias"),
    ("txt_in.weight", "context_embedder.weight"),
)


@pytest.mark.parametrize(("original", "theirs"), PAIRS)
def test_blocks_have_two_names(original: str, theirs: str) -> None:
    assert theirs in [other.name for other in other_names(original)]
    assert original in [other.name for other in other_names(theirs)]


def test_fused_projections_are_parts_of_one_tensor() -> None:
    found = list(other_names("transformer.resblocks.3.attn.in_proj_weight"))
    assert [(each.name, each.share, each.shares) for each in found] == [
        (f"text_model.encoder.layers.3.self_attn.{part}.weight", number, 3)
        for number, part in enumerate(("q_proj", "k_proj", "v_proj"))
    ]
    found = list(other_names("single_blocks.7.linear1.weight"))
    assert [each.name for each in found] == [
        f"single_transformer_blocks.7.{part}.weight" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert not any(each.even or each.within for each in found)
    (found,) = other_names("transformer_blocks.3.attn.add_k_proj.bias")
    assert (found.name, found.share, found.shares, found.within) == ("double_blocks.3.txt_attn.qkv.bias", 1, 3, True)


def test_other_tensors_have_one_name() -> None:
    assert list(other_names("model.layers.0.self_attn.q_proj.weight")) == []
