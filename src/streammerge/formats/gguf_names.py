"""Names of llama.cpp for tensors, and those of transformers. Data, and the changes that llama.cpp makes to some tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_MIXTRAL = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
_QWEN_MOE = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_GEMMA_2 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Architecture(NamedTuple):
    """What llama.cpp's files of an architecture have. ``layer``: the names in a layer. ``interleaved``: whether the rows of
    queries and keys are interleaved. ``raised``: whether norms are stored with 1 added. ``experts``: their prefix and
    names."""

    layer: Mapping[str, str]
    interleaved: bool = False
    raised: bool = False
    experts: tuple[str, Mapping[str, str]] = ("", {})


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        _LAYER | {"ffn_gate_inp": "block_sparse_moe.gate"}, True, experts=("block_sparse_moe.experts", _MIXTRAL)
    ),
    "mistral": Architecture(_LAYER, True),
    "qwen2": Architecture(_LAYER),
    "qwen3": Architecture(_LAYER),
    "qwen2moe": Architecture(_LAYER | _QWEN_MOE, experts=("mlp.experts", _EXPERTS)),
    "qwen3moe": Architecture(_LAYER | _QWEN_MOE, experts=("mlp.experts", _EXPERTS)),
    "gemma": Architecture(_LAYER, raised=True),
    "gemma2": Architecture(_LAYER | _GEMMA_2, raised=True),
    "gemma3": Architecture(_LAYER | _GEMMA_2, raised=True),
}
"""The architectures whose names are known. Files of others keep their names and layouts."""
DROPPED = re.compile(r"(^|\.)(rope_freqs|rope_factors_long|rope_factors_short)\.weight$")
"""Tensors that llama.cpp makes of the configuration."""
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_NOT_IN_LAYER = re.compile(r"(\w+)\.(weight|bias)")


class Named(NamedTuple):
    """What a tensor is called in transformers.

    ``expert``: the form of the name of one expert, if all are stacked. ``heads``: the key of the number of heads whose rows
    are interleaved. ``raised``: whether 1 was added.
    """

    name: str
    expert: str = ""
    heads: str = ""
    raised: bool = False


def named(architecture: str, name: str) -> Named | None:
    """Returns what a tensor of such a file is called in transformers; None if that is not known."""
    kind = ARCHITECTURES.get(architecture)
    if kind is None:
        return None
    if found := _NOT_IN_LAYER.fullmatch(name):
        module = _OUTSIDE.get(found[1])
        return None if module is None else Named(f"{module}.{found[2]}", raised=kind.raised and found[1].endswith("norm"))
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return None
    number, module, end = found.groups()
    prefix, experts = kind.experts
    if module in experts:
        form = f"model.layers.{number}.{prefix}.{{}}.{experts[module]}.{end}"
        return Named(form, expert=form)
    if module not in kind.layer:
        return None
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(module, "") if kind.interleaved else ""
    return Named(f"model.layers.{number}.{kind.layer[module]}.{end}", heads=heads, raised=kind.raised and "norm" in module)


def head_count(metadata: Mapping[str, Any], architecture: str, key: str) -> int | None:
    """Returns a number of heads; None if the file does not state it as one number."""
    attention = f"{architecture}.attention."
    found = metadata.get(attention + key, metadata.get(attention + "head_count"))
    return found if type(found) is int and found > 0 else None
