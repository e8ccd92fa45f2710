"""Names of llama.cpp and of transformers."""

from __future__ import annotations

import pytest

from streammerge.formats.gguf_names import ARCHITECTURES, DROPPED, Named, head_count, named

LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("architecture", "name", "found"),
    [
        ("llama", "token_embd.weight", Named("model.embed_tokens.weight")),
        ("llama", "output.weight", Named("lm_head.weight")),
        ("llama", "blk.3.attn_q.weight", Named(f"{LAYER}self_attn.q_proj.weight", heads="head_count")),
        ("llama", "blk.3.attn_k.bias", Named(f"{LAYER}self_attn.k_proj.bias", heads="head_count_kv")),
        ("llama", "blk.3.attn_v.weight", Named(f"{LAYER}self_attn.v_proj.weight")),
        ("llama", "blk.3.ffn_gate_inp.weight", Named(f"{LAYER}block_sparse_moe.gate.weight")),
        (
            "llama",
            "blk.3.ffn_up_exps.weight",
            Named(*[f"{LAYER}block_sparse_moe.experts.{{}}.w3.weight"] * 2),
        ),
        ("mistral", "blk.3.attn_q.weight", Named(f"{LAYER}self_attn.q_proj.weight", heads="head_count")),
        ("qwen2", "blk.3.attn_q.weight", Named(f"{LAYER}self_attn.q_proj.weight")),
        ("qwen3", "blk.3.attn_k_norm.weight", Named(f"{LAYER}self_attn.k_norm.weight")),
        ("qwen3moe", "blk.3.ffn_down_exps.weight", Named(*[f"{LAYER}mlp.experts.{{}}.down_proj.weight"] * 2)),
        ("qwen2moe", "blk.3.ffn_gate_inp_shexp.weight", Named(f"{LAYER}mlp.shared_expert_gate.weight")),
        ("gemma", "blk.3.ffn_norm.weight", Named(f"{LAYER}post_attention_layernorm.weight", raised=True)),
        ("gemma2", "blk.3.ffn_norm.weight", Named(f"{LAYER}pre_feedforward_layernorm.weight", raised=True)),
        ("gemma3", "blk.3.post_ffw_norm.weight", Named(f"{LAYER}post_feedforward_layernorm.weight", raised=True)),
        ("gemma3", "output_norm.weight", Named("model.norm.weight", raised=True)),
        ("gemma3", "blk.3.attn_q.weight", Named(f"{LAYER}self_attn.q_proj.weight")),
        ("llama", "blk.3.ssm_a", None),
        ("llama", "blk.3.ssm_a.weight", None),
        ("llama", "cls.weight", None),
        ("mamba", "token_embd.weight", None),
        ("", "token_embd.weight", None),
    ],
)
def test_a_name_of_transformers(architecture: str, name: str, found: Named | None) -> None:
    assert named(architecture, name) == found


def test_tensors_that_are_made_of_the_configuration() -> None:
    assert DROPPED.search("rope_freqs.weight")
    assert DROPPED.search("blk.0.rope_factors_long.weight")
    assert not DROPPED.search("blk.0.attn_q.weight")
    assert set(ARCHITECTURES) >= {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"}


def test_heads_are_one_positive_number() -> None:
    stated = {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 2}
    assert head_count(stated, "llama", "head_count_kv") == 2
    assert head_count({"llama.attention.head_count": 8}, "llama", "head_count_kv") == 8
    for wrong in ({}, {"llama.attention.head_count": 0}, {"llama.attention.head_count": True}):
        assert head_count(wrong, "llama", "head_count") is None
