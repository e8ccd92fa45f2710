"""Conventions of programs about the keys of a configuration. Data only.

A key whose value shows its meaning does not belong here, such as a list with an entry for each layer.
"""

from __future__ import annotations

from typing import NamedTuple

CONFIG_FILES = ("config.json", "params.json", "open_clip_config.json")
"""Configurations of a model beside its weights: transformers and diffusers; Meta and Mistral; open_clip."""

DTYPES = ("dtype", "torch_dtype")
"""Keys that state the dtype of the weights."""

QUANTISATION = ("quantization_config", "compression_config")
"""Mappings that state how the weights are quantised."""

NOT_OF_THE_MODEL = frozenset((*QUANTISATION, "id2label", "label2id", "task_specific_params", "auto_map"))
"""Mappings in a configuration that do not describe the layers, the vocabulary or the dtype of a model."""

PARTS: dict[str, str] = {
    **dict.fromkeys(("vision", "visual", "vit", "image", "siglip"), "vision"),
    **dict.fromkeys(("audio", "speech"), "audio"),
    **dict.fromkeys(("text", "language", "llm", "lm"), "text"),
}
"""Words in names of tensors and in keys -> the part of a model that they speak of."""

NO_PART = frozenset(("config", "cfg", "model", "params", "args", "num", "n", "hidden", "module"))
"""Words in keys that speak of no part."""

LAYER_PARTS = ("layer", "block", "idx", "indices", "indexes")
LAYER_WORDS = frozenset(("ids", "at"))
"""Parts of keys, and whole words in keys, that speak of layers."""

NOT_PER_LAYER = frozenset(
    (
        *("architectures", "token", "tokens", "section", "limit", "mean", "std", "label", "labels", "size", "shape"),
        *("multipliers", "languages", "prompts", "stages", "depths", "dims", "channels", "dim", "betas", "range"),
    )
)
"""Words in the keys of lists that are never lists with an entry for each layer, whatever their length."""

PER_LAYER = frozenset(("intermediate_size",))
"""Keys with such words that may have an entry for each layer all the same."""

FLAGS = frozenset(("no_rope_layers", "moe_layer_freq", "hybrid_layer_pattern", "attn_type_list"))
"""Lists of 0 and 1 for each layer, although their keys sound like lists of the numbers of layers."""

EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Layers behind the last one in the same stack of tensors, which the depth does not count (multi-token prediction)."""

ALL_EXTRA_LAYERS = (*EXTRA_LAYERS, "mtp_num_hidden_layers")
"""The same, also in stacks of their own. ``num_mtp_modules`` is not one: MiniMax-M2 announces three and publishes none, so
all its models would seem broken (github.com/MiniMax-AI/MiniMax-M2/issues/47)."""

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
"""Keys that state the number of layers of a stack of tensors."""

SHARED_LAYERS = ("num_hidden_groups", "num_mem_blocks")
"""Keys of models in which several layers share their tensors."""

NOT_SETTLED: dict[str, str] = {
    "scale_depth": "the outputs of all layers are scaled by the number of layers",
    "scale_attn_by_inverse_layer_idx": "the attention of each layer is scaled by the layer's number",
}
"""Keys with effects that depend on the numbers of the layers in a way that no configuration can state."""

NOT_MOVED: dict[str, str] = {
    "num_mem_blocks": "layers share blocks, which have an adapter for each layer in the order of the layers",
}
"""Keys with which no layer can be moved, because the model would not find its tensors."""


class Placing(NamedTuple):
    """A key that says by a number which layers are special.

    ``form``, of layer i of n for the value k. A list or text instead of a number is repeated: entry i modulo its length::

        every      (i + 1) % k == 0
        from zero  i % k == 0
        offset     i % k == the value of the key ``second``
        leading    i < k
        up to      i <= k, and all layers if k is negative
        trailing   i >= n - k

    ``unless``: lists that a loader uses instead if they are given. ``needs``: a key that must not be false, because the
    loader ignores this key otherwise.
    """

    form: str
    second: str = ""
    unless: tuple[str, ...] = ()
    needs: str = ""


_ATTENTION = ("layer_types", "layers_block_type")
_EXPERTS = ("mlp_layer_types", "moe_layers")
PLACINGS: dict[str, Placing] = {
    "attn_layer_period": Placing("offset", "attn_layer_offset", _ATTENTION),
    "expert_layer_period": Placing("offset", "expert_layer_offset"),
    "decoder_sparse_step": Placing("every", unless=_EXPERTS),
    "encoder_sparse_step": Placing("every"),
    "interleave_moe_layer_step": Placing("every", unless=_EXPERTS),
    "moe_layer_interval": Placing("every", unless=_EXPERTS),
    "moe_layer_start_index": Placing("leading", unless=_EXPERTS),
    "moe_layer_end_index": Placing("up to", unless=_EXPERTS),
    "moe_layer_freq": Placing("from zero", unless=_EXPERTS),
    "moe_every_n_layers": Placing("every", unless=_EXPERTS),
    "first_k_dense_replace": Placing("leading", unless=_EXPERTS),
    "num_dense_layers": Placing("leading", unless=_EXPERTS),
    "full_attention_interval": Placing("every", unless=_ATTENTION),
    "sliding_window_pattern": Placing("every", unless=_ATTENTION, needs="sliding_window"),
    "_sliding_window_pattern": Placing("every", unless=_ATTENTION, needs="sliding_window"),
    "global_attn_every_n_layers": Placing("from zero", unless=_ATTENTION),
    "no_rope_layer_interval": Placing("every", unless=("no_rope_layers",)),
    "max_window_layers": Placing("leading", unless=_ATTENTION, needs="use_sliding_window"),
    "num_kv_shared_layers": Placing("trailing"),
    "layer_group_size": Placing("every", unless=_ATTENTION),
    "mb_per_layer": Placing("from zero", unless=_ATTENTION),
    "block_types": Placing("every", unless=_ATTENTION),
    "_block_types": Placing("every", unless=_ATTENTION),
}

IMPLIED: dict[str, dict[str, int]] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3": {"sliding_window_pattern": 6},
    "gemma3_text": {"sliding_window_pattern": 6},
    "gemma3n_text": {"sliding_window_pattern": 5},
    "cohere2": {"sliding_window_pattern": 4},
    "gpt_oss": {"sliding_window_pattern": 2},
    "qwen3_next": {"full_attention_interval": 4},
    "llama4_text": {"no_rope_layer_interval": 4},
    "smollm3": {"no_rope_layer_interval": 4},
    "modernbert": {"global_attn_every_n_layers": 3},
}
"""``model_type`` -> the values that its program takes for keys that a configuration leaves out."""

VOCABULARY = r"vocab|(^|_)(num|number|n)_(\w+_)?(tokens|embeddings|symbols)$"
"""Keys that state how many rows embeddings have."""

POSITIONS = r"position|n_ctx|context_length|max_seq_len|seq_length"
"""The same of embeddings of positions."""

OF_POSITIONS = r"pos(?!t)|wpe"
"""Names of embeddings of positions."""

ARITHMETIC = (
    r"(^|_)(rope|rotary|theta|heads?|head_dim|qk_norm|eps|epsilon|act|activation|sliding|window|scale|scales|scaled|scaling|multipliers?|"
    r"softcap\w*|alibi|residual|position_embedding_type|parallel_attn|experts_per_tok|top_?k|norm_topk_prob|mult)(_|$)|"
    r"activation_function|hidden_act|logit_scale|layer_types|shift_factor|sampl\w*_rate|hop_length|n_mels|n_fft|prediction_type|"
    r"add_cross_attention|is_decoder|pooling_mode|routed_scaling"
)
"""Keys that change what a model computes, while the shapes of its tensors stay."""

NOT_ARITHMETIC = (
    r"(^|_)(dropout|drop|init|initializer|attn_implementation|cache|loss|aux)(_|$)|^(top_k|use_cache|_.*|image_token.*)$"
)
"""Words of keys that have no effect on the results of a trained model."""

LEFT_OUT: dict[str, dict[str, float]] = {
    "llama": {"rope_theta": 10000.0},
}
"""``model_type`` -> values that change the arithmetic, and that configurations of early releases leave out."""

ALIKE: tuple[frozenset[str], ...] = (
    frozenset(("silu", "swish")),
    frozenset(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")),
    frozenset(("gelu", "gelu_python")),
)
"""Names of one function. The results differ in their last bits only."""
