"""Headers of current models: names, dtypes and configurations as their makers publish them, with few and small tensors.

A line of a table is names, a shape and maybe a dtype. ``{0-2}`` and ``{q,k}`` stand for several names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8}
_SPAN = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Header:
    """``part``: begins the names of a part that some variants of the model lack. ``file``: the name of the weights.
    ``copied``: patterns of tensors that no mean makes sense of, such as the factors of an adapter inside a model."""

    name: str
    config: dict[str, Any]
    table: str
    part: str
    file: str = "model.safetensors"
    copied: tuple[str, ...] = ()

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns name -> shape and dtype."""
        found = {}
        for line in self.table.strip().splitlines():
            names, shape, *dtype = line.split()
            for name in expanded(names):
                found[name] = tuple(map(int, shape.split("x"))) if shape != "-" else (), (dtype or ["BF16"])[0]
        return found

    def write(self, folder: Path, without: str | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
        """Writes a folder whose file has holes in place of numbers. Returns its tensors."""
        tensors = {n: each for n, each in self.tensors().items() if without is None or not n.startswith(without)}
        folder.mkdir(parents=True)
        header, at = dict[str, Any](__metadata__={"format": "pt"}), 0
        for name, (shape, dtype) in tensors.items():
            size = prod(shape) * _BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / self.file).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
        (folder / "config.json").write_text(json.dumps(self.config))
        return tensors


def expanded(names: str) -> Iterator[str]:
    """Yields all names that a pattern stands for. Inner braces are expanded first."""
    found = _SPAN.search(names)
    if found is None:
        yield names
        return
    low, dash, high = found[1].partition("-")
    several = [str(n) for n in range(int(low), int(high) + 1)] if dash else found[1].split(",")
    for each in several:
        yield from expanded(names[: found.start()] + each + names[found.end() :])


def _mla(layers: str, scales: bool) -> str:
    """Attention of DeepSeek with latent keys and values."""
    kind = "F8_E4M3" if scales else "BF16"
    lines = [
        f"model.layers.{layers}.self_attn.{{q_a_proj,kv_a_proj_with_mqa,q_b_proj,kv_b_proj,o_proj}}.weight 256x256 {kind}",
        f"model.layers.{layers}.self_attn.{{q_a_layernorm,kv_a_layernorm}}.weight 128",
        f"model.layers.{layers}.{{input_layernorm,post_attention_layernorm}}.weight 128",
    ]
    if scales:
        names = "{q_a_proj,kv_a_proj_with_mqa,q_b_proj,kv_b_proj,o_proj}"
        lines.append(f"model.layers.{layers}.self_attn.{names}.weight_scale_inv 2x2 F32")
    return "\n".join(lines)


def _experts(layers: str, scales: bool = False, shared: str = "shared_experts", bias: bool = True, count: int = 3) -> str:
    """A mixture of experts as DeepSeek and Qwen name it."""
    kind = "F8_E4M3" if scales else "BF16"
    places = [f"experts.{{0-{count - 1}}}", *([shared] if shared else [])]
    lines = [f"model.layers.{layers}.mlp.gate.weight {count}x128"]
    for place in places:
        lines.append(f"model.layers.{layers}.mlp.{place}.{{gate,up,down}}_proj.weight 256x256 {kind}")
        if scales:
            lines.append(f"model.layers.{layers}.mlp.{place}.{{gate,up,down}}_proj.weight_scale_inv 2x2 F32")
    if bias:
        lines.append(f"model.layers.{layers}.mlp.gate.e_score_correction_bias {count} F32")
    return "\n".join(lines)


def _dense(prefix: str, layers: str, more: str = "") -> str:
    """A layer as Llama names it. ``more``: further projections of attention, such as norms."""
    lines = [
        f"{prefix}.{layers}.self_attn.{{q,k,v,o}}_proj.weight 32x32",
        f"{prefix}.{layers}.mlp.{{gate,up,down}}_proj.weight 32x32",
        f"{prefix}.{layers}.{{input_layernorm,post_attention_layernorm}}.weight 32",
    ]
    return "\n".join([*lines, *(f"{prefix}.{layers}.{each}" for each in more.split(";") if each)])


def _ends(width: int = 32, prefix: str = "model", head: str = "lm_head.weight") -> str:
    lines = [f"{prefix}.embed_tokens.weight 96x{width}", f"{prefix}.norm.weight {width}"]
    return "\n".join([*lines, *([f"{head} 96x{width}"] if head else [])])


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_MTP = """
model.layers.3.{enorm,hnorm}.weight 128
model.layers.3.eh_proj.weight 128x256
model.layers.3.embed_tokens.weight 96x128
model.layers.3.shared_head.norm.weight 128
model.layers.3.shared_head.head.weight 96x128
"""
_NORMS = "self_attn.{q_norm,k_norm}.weight 32"
_NEXT = """
model.layers.{0-2}.linear_attn.{in_proj_qkvz,in_proj_ba,out_proj}.weight 32x32
model.layers.{0-2}.linear_attn.conv1d.weight 32x1x4
model.layers.{0-2}.linear_attn.{A_log,dt_bias} 4
model.layers.{0-2}.linear_attn.norm.weight 32 F32
model.layers.3.self_attn.{q,k,v,o}_proj.weight 32x32
model.layers.3.self_attn.{q_norm,k_norm}.weight 8
model.layers.{0-3}.{input_layernorm,post_attention_layernorm}.weight 32
model.layers.{0-3}.mlp.experts.{0-3}.{gate,up,down}_proj.weight 32x32
model.layers.{0-3}.mlp.shared_expert.{gate,up,down}_proj.weight 32x32
model.layers.{0-3}.mlp.shared_expert_gate.weight 1x32
model.layers.{0-3}.mlp.gate.weight 4x32
mtp.fc.weight 32x64
mtp.{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight 32
mtp.layers.0.self_attn.{q,k,v,o}_proj.weight 32x32
mtp.layers.0.self_attn.{q_norm,k_norm}.weight 8
mtp.layers.0.{input_layernorm,post_attention_layernorm}.weight 32
mtp.layers.0.mlp.experts.{0-3}.{gate,up,down}_proj.weight 32x32
mtp.layers.0.mlp.shared_expert.{gate,up,down}_proj.weight 32x32
mtp.layers.0.mlp.shared_expert_gate.weight 1x32
mtp.layers.0.mlp.gate.weight 4x32
"""
_SIGLIP = """
vision_tower.vision_model.embeddings.patch_embedding.weight 32x3x4x4
vision_tower.vision_model.embeddings.patch_embedding.bias 32
vision_tower.vision_model.embeddings.position_embedding.weight 16x32
vision_tower.vision_model.encoder.layers.{0-3}.self_attn.{q_proj,k_proj,v_proj,out_proj}.weight 32x32
vision_tower.vision_model.encoder.layers.{0-3}.self_attn.{q_proj,k_proj,v_proj,out_proj}.bias 32
vision_tower.vision_model.encoder.layers.{0-3}.mlp.{fc1,fc2}.weight 32x32
vision_tower.vision_model.encoder.layers.{0-3}.mlp.{fc1,fc2}.bias 32
vision_tower.vision_model.encoder.layers.{0-3}.{layer_norm1,layer_norm2}.{weight,bias} 32
vision_tower.vision_model.post_layernorm.{weight,bias} 32
"""
_MAMBA = """
model.layers.{0-2}.mamba.{in_proj,out_proj}.weight 32x32
model.layers.{0-2}.mamba.conv1d.weight 32x1x4
model.layers.{0-2}.mamba.conv1d.bias 32
model.layers.{0-2}.mamba.{A_log,D,dt_bias} 4
model.layers.{0-2}.mamba.norm.weight 32
"""

_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}

HEADERS = [
    Header(
        "deepseek-v3",
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_hidden_layers": 3,
            "num_nextn_predict_layers": 1,
            "first_k_dense_replace": 1,
            "n_routed_experts": 3,
            "vocab_size": 96,
            "tie_word_embeddings": False,
            "quantization_config": _FP8,
        },
        "\n".join(
            [
                _ends(128),
                _mla("{0-3}", True),
                "model.layers.0.mlp.{gate,up,down}_proj.weight 256x256 F8_E4M3",
                "model.layers.0.mlp.{gate,up,down}_proj.weight_scale_inv 2x2 F32",
                _experts("{1-3}", scales=True),
                _MTP.strip(),
            ]
        ),
        part="model.layers.3.",
    ),
    Header(
        "kimi-k2",
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            "num_hidden_layers": 3,
            "num_nextn_predict_layers": 0,
            "first_k_dense_replace": 1,
            "vocab_size": 96,
            "tie_word_embeddings": False,
        },
        "\n".join(
            [_ends(128), _mla("{0-2}", False), "model.layers.0.mlp.{gate,up,down}_proj.weight 128x128", _experts("{1-2}")]
        ),
        part="model.layers.1.mlp.gate.e_score",
    ),
    Header(
        "glm-4.5",
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "num_hidden_layers": 3,
            "num_nextn_predict_layers": 1,
            "first_k_dense_replace": 1,
            "vocab_size": 96,
            "tie_word_embeddings": False,
        },
        "\n".join(
            [
                _ends(128),
                "model.layers.{0-3}.self_attn.{q,k,v,o}_proj.weight 128x128",
                "model.layers.{0-3}.self_attn.{q,k,v}_proj.bias 128",
                "model.layers.{0-3}.{input_layernorm,post_attention_layernorm}.weight 128",
                "model.layers.0.mlp.{gate,up,down}_proj.weight 128x128",
                _experts("{1-3}"),
                _MTP.strip(),
            ]
        ),
        part="model.layers.3.",
    ),
    Header(
        "qwen3-moe",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_hidden_layers": 2,
            "num_experts": 3,
            "vocab_size": 96,
            "tie_word_embeddings": False,
        },
        "\n".join(
            [
                _ends(128),
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight 128x128",
                "model.layers.{0-1}.self_attn.{q_norm,k_norm}.weight 16",
                "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 128",
                _experts("{0-1}", shared="", bias=False),
            ]
        ),
        part="model.layers.1.mlp.experts.",
    ),
    Header(
        "qwen3-next",
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "num_hidden_layers": 4,
            "full_attention_interval": 4,
            "num_experts": 4,
            "vocab_size": 96,
            "tie_word_embeddings": False,
        },
        _ends() + _NEXT.rstrip(),
        part="mtp.",
    ),
    Header(
        "qwen2.5-vl",
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "num_hidden_layers": 2,
            "vocab_size": 96,
            "tie_word_embeddings": False,
            "vision_config": {"depth": 3, "hidden_size": 32, "model_type": "qwen2_5_vl"},
        },
        "\n".join(
            [
                _ends(),
                _dense("model.layers", "{0-1}", "self_attn.{q,k,v}_proj.bias 32"),
                "visual.patch_embed.proj.weight 32x3x2x4x4",
                "visual.blocks.{0-2}.attn.qkv.weight 96x32",
                "visual.blocks.{0-2}.attn.qkv.bias 96",
                "visual.blocks.{0-2}.attn.proj.weight 32x32",
                "visual.blocks.{0-2}.attn.proj.bias 32",
                "visual.blocks.{0-2}.mlp.{gate,up,down}_proj.weight 32x32",
                "visual.blocks.{0-2}.mlp.{gate,up,down}_proj.bias 32",
                "visual.blocks.{0-2}.{norm1,norm2}.weight 32",
                "visual.merger.ln_q.weight 32",
                "visual.merger.mlp.{0,2}.weight 32x32",
                "visual.merger.mlp.{0,2}.bias 32",
            ]
        ),
        part="visual.",
    ),
    Header(
        "qwen3-vl",
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "tie_word_embeddings": True,
            "text_config": {
                "num_hidden_layers": 2,
                "vocab_size": 96,
                "tie_word_embeddings": True,
                "model_type": "qwen3_vl_text",
            },
            "vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1], "model_type": "qwen3_vl"},
        },
        "\n".join(
            [
                _ends(prefix="model.language_model", head=""),
                _dense("model.language_model.layers", "{0-1}", _NORMS),
                "model.visual.patch_embed.proj.weight 32x3x2x4x4",
                "model.visual.patch_embed.proj.bias 32",
                "model.visual.pos_embed.weight 16x32",
                "model.visual.blocks.{0-2}.attn.qkv.weight 96x32",
                "model.visual.blocks.{0-2}.attn.qkv.bias 96",
                "model.visual.blocks.{0-2}.attn.proj.weight 32x32",
                "model.visual.blocks.{0-2}.attn.proj.bias 32",
                "model.visual.blocks.{0-2}.mlp.{linear_fc1,linear_fc2}.weight 32x32",
                "model.visual.blocks.{0-2}.mlp.{linear_fc1,linear_fc2}.bias 32",
                "model.visual.blocks.{0-2}.{norm1,norm2}.{weight,bias} 32",
                "model.visual.{merger,deepstack_merger_list.{0-1}}.norm.{weight,bias} 32",
                "model.visual.{merger,deepstack_merger_list.{0-1}}.{linear_fc1,linear_fc2}.weight 32x32",
                "model.visual.{merger,deepstack_merger_list.{0-1}}.{linear_fc1,linear_fc2}.bias 32",
            ]
        ),
        part="model.visual.",
    ),
    Header(
        "llama-4",
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": {
                "num_hidden_layers": 2,
                "vocab_size": 96,
                "num_local_experts": 3,
                "model_type": "llama4_text",
                "tie_word_embeddings": False,
            },
            "vision_config": {"num_hidden_layers": 3, "model_type": "llama4_vision_model"},
        },
        "\n".join(
            [
                _ends(prefix="language_model.model", head="language_model.lm_head.weight"),
                "language_model.model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight 32x32",
                "language_model.model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 32",
                "language_model.model.layers.{0-1}.feed_forward.experts.gate_up_proj 3x32x128",
                "language_model.model.layers.{0-1}.feed_forward.experts.down_proj 3x64x32",
                "language_model.model.layers.{0-1}.feed_forward.router.weight 3x32",
                "language_model.model.layers.{0-1}.feed_forward.shared_expert.{gate,up,down}_proj.weight 32x32",
                "vision_model.patch_embedding.linear.weight 32x48",
                "vision_model.class_embedding 32",
                "vision_model.positional_embedding_vlm 17x32",
                "vision_model.{layernorm_pre,layernorm_post}.{weight,bias} 32",
                "vision_model.model.layers.{0-2}.self_attn.{q,k,v,o}_proj.weight 32x32",
                "vision_model.model.layers.{0-2}.self_attn.{q,k,v,o}_proj.bias 32",
                "vision_model.model.layers.{0-2}.mlp.{fc1,fc2}.weight 32x32",
                "vision_model.model.layers.{0-2}.mlp.{fc1,fc2}.bias 32",
                "vision_model.model.layers.{0-2}.{input_layernorm,post_attention_layernorm}.{weight,bias} 32",
                "vision_model.vision_adapter.mlp.{fc1,fc2}.weight 32x32",
                "multi_modal_projector.linear_1.weight 32x32",
            ]
        ),
        part="vision_model.",
    ),
    Header(
        "gemma-3",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {"num_hidden_layers": 2, "vocab_size": 96, "model_type": "gemma3_text"},
            "vision_config": {"num_hidden_layers": 4, "model_type": "siglip_vision_model"},
        },
        "\n".join(
            [
                _ends(prefix="language_model.model", head=""),
                _dense("language_model.model.layers", "{0-1}", _NORMS),
                "language_model.model.layers.{0-1}.{pre,post}_feedforward_layernorm.weight 32",
                "multi_modal_projector.mm_input_projection_weight 32x32",
                "multi_modal_projector.mm_soft_emb_norm.weight 32",
                _SIGLIP.strip(),
            ]
        ),
        part="vision_tower.",
    ),
    Header(
        "mistral-small-3.1",
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "text_config": {
                "num_hidden_layers": 2,
                "vocab_size": 96,
                "model_type": "mistral",
                "tie_word_embeddings": False,
            },
            "vision_config": {"num_hidden_layers": 3, "model_type": "pixtral"},
            "spatial_merge_size": 2,
        },
        "\n".join(
            [
                _ends(prefix="language_model.model", head="language_model.lm_head.weight"),
                _dense("language_model.model.layers", "{0-1}"),
                "vision_tower.patch_conv.weight 32x3x4x4",
                "vision_tower.ln_pre.weight 32",
                "vision_tower.transformer.layers.{0-2}.attention.{q,k,v,o}_proj.weight 32x32",
                "vision_tower.transformer.layers.{0-2}.feed_forward.{gate,up,down}_proj.weight 32x32",
                "vision_tower.transformer.layers.{0-2}.{attention_norm,ffn_norm}.weight 32",
                "multi_modal_projector.{linear_1,linear_2}.weight 32x32",
                "multi_modal_projector.norm.weight 32",
                "multi_modal_projector.patch_merger.merging_layer.weight 32x128",
            ]
        ),
        part="vision_tower.",
    ),
    Header(
        "phi-4-multimodal",
        {
            "architectures": ["Phi4MMForCausalLM"],
            "model_type": "phi4mm",
            "num_hidden_layers": 2,
            "vocab_size": 96,
            "tie_word_embeddings": True,
            "audio_processor": {"config": {"num_blocks": 3, "num_attention_heads": 4}, "name": "cascades"},
            "embd_layer": {"embedding_cls": "image_audio"},
            "speech_lora": {"r": 4},
            "vision_lora": {"r": 4},
        },
        "\n".join(
            [
                _ends(head=""),
                "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 32",
                "model.layers.{0-1}.{self_attn.qkv_proj,self_attn.o_proj}.base_layer.weight 32x32",
                "model.layers.{0-1}.{mlp.gate_up_proj,mlp.down_proj}.base_layer.weight 32x32",
                "model.layers.{0-1}.{self_attn.qkv_proj,self_attn.o_proj}.lora_A.{speech,vision}.weight 4x32",
                "model.layers.{0-1}.{mlp.gate_up_proj,mlp.down_proj}.lora_A.{speech,vision}.weight 4x32",
                "model.layers.{0-1}.{self_attn.qkv_proj,self_attn.o_proj}.lora_B.{speech,vision}.weight 32x4",
                "model.layers.{0-1}.{mlp.gate_up_proj,mlp.down_proj}.lora_B.{speech,vision}.weight 32x4",
                "model.embed_tokens_extend.audio_embed.audio_projection.{speech,vision}.{0,2}.weight 32x32",
                "model.embed_tokens_extend.audio_embed.encoder.encoders.{0-2}.self_attn.linear_{q,k,v,out}.weight 32x32",
                "model.embed_tokens_extend.audio_embed.encoder.encoder_embedding.{global_mean,global_invstd} 16",
                "model.embed_tokens_extend.image_embed.img_projection.{0,2}.weight 32x32",
                "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.{0-3}.mlp.{fc1,fc2}.weight 32x32",
                "model.embed_tokens_extend.image_embed.{glb_GN,sub_GN} 1x1x1x32",
            ]
        ),
        part="model.embed_tokens_extend.image_embed.",
        copied=("*.lora_A.*", "*.lora_B.*"),
    ),
    Header(
        "gpt-oss",
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "num_hidden_layers": 2,
            "num_local_experts": 3,
            "vocab_size": 96,
            "tie_word_embeddings": False,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            },
        },
        "\n".join(
            [
                _ends(64),
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight 64x64",
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.bias 64",
                "model.layers.{0-1}.self_attn.sinks 4",
                "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 64",
                "model.layers.{0-1}.mlp.router.weight 3x64",
                "model.layers.{0-1}.mlp.router.bias 3",
                "model.layers.{0-1}.mlp.experts.gate_up_proj_blocks 3x128x2x16 U8",
                "model.layers.{0-1}.mlp.experts.gate_up_proj_scales 3x128x2 U8",
                "model.layers.{0-1}.mlp.experts.gate_up_proj_bias 3x128",
                "model.layers.{0-1}.mlp.experts.down_proj_blocks 3x64x2x16 U8",
                "model.layers.{0-1}.mlp.experts.down_proj_scales 3x64x2 U8",
                "model.layers.{0-1}.mlp.experts.down_proj_bias 3x64",
            ]
        ),
        part="model.layers.1.self_attn.sinks",
    ),
    Header(
        "minimax-m2",
        {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "num_hidden_layers": 2,
            "num_local_experts": 3,
            "vocab_size": 96,
            "tie_word_embeddings": False,
            "use_mtp": True,
            "num_mtp_modules": 3,
            "mtp_transformer_layers": 1,
            "quantization_config": {**_FP8, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]},
        },
        "\n".join(
            [
                _ends(128),
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight 256x256 F8_E4M3",
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight_scale_inv 2x2 F32",
                "model.layers.{0-1}.self_attn.{q_norm,k_norm}.weight 128",
                "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 128",
                "model.layers.{0-1}.block_sparse_moe.gate.weight 3x128 F32",
                "model.layers.{0-1}.block_sparse_moe.e_score_correction_bias 3 F32",
                "model.layers.{0-1}.block_sparse_moe.experts.{0-2}.{w1,w2,w3}.weight 256x256 F8_E4M3",
                "model.layers.{0-1}.block_sparse_moe.experts.{0-2}.{w1,w2,w3}.weight_scale_inv 2x2 F32",
            ]
        ),
        part="model.layers.1.block_sparse_moe.e_score",
    ),
    Header(
        "granite-4-hybrid",
        {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "mamba", "attention"],
            "num_local_experts": 3,
            "vocab_size": 96,
            "tie_word_embeddings": True,
        },
        "\n".join(
            [
                _ends(head=""),
                _MAMBA.strip(),
                "model.layers.3.self_attn.{q,k,v,o}_proj.weight 32x32",
                "model.layers.{0-3}.{input_layernorm,post_attention_layernorm}.weight 32",
                "model.layers.{0-3}.block_sparse_moe.input_linear.weight 3x64x32",
                "model.layers.{0-3}.block_sparse_moe.output_linear.weight 3x32x32",
                "model.layers.{0-3}.block_sparse_moe.router.layer.weight 3x32",
                "model.layers.{0-3}.shared_mlp.{input_linear,output_linear}.weight 32x32",
            ]
        ),
        part="model.layers.2.shared_mlp.",
    ),
    Header(
        "falcon-h1",
        {
            "architectures": ["FalconH1ForCausalLM"],
            "model_type": "falcon_h1",
            "num_hidden_layers": 3,
            "vocab_size": 96,
            "tie_word_embeddings": False,
        },
        "\n".join(
            [
                "model.embed_tokens.weight 96x32",
                "model.final_layernorm.weight 32",
                "lm_head.weight 96x32",
                _MAMBA.strip(),
                "model.layers.{0-2}.self_attn.{q,k,v,o}_proj.weight 32x32",
                "model.layers.{0-2}.feed_forward.{gate,up,down}_proj.weight 32x32",
                "model.layers.{0-2}.{input_layernorm,pre_ff_layernorm}.weight 32",
            ]
        ),
        part="model.layers.2.mamba.norm",
    ),
    Header(
        "mixtral",
        _MIXTRAL,
        "\n".join(
            [
                _ends(),
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight 32x32",
                "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 32",
                "model.layers.{0-1}.block_sparse_moe.gate.weight 3x32",
                "model.layers.{0-1}.block_sparse_moe.experts.{0-2}.{w1,w2,w3}.weight 32x32",
            ]
        ),
        part="model.layers.1.block_sparse_moe.experts.2.",
    ),
    Header(
        "mixtral-fused",
        _MIXTRAL,
        "\n".join(
            [
                _ends(),
                "model.layers.{0-1}.self_attn.{q,k,v,o}_proj.weight 32x32",
                "model.layers.{0-1}.{input_layernorm,post_attention_layernorm}.weight 32",
                "model.layers.{0-1}.mlp.gate.weight 3x32",
                "model.layers.{0-1}.mlp.experts.gate_up_proj 3x128x32",
                "model.layers.{0-1}.mlp.experts.down_proj 3x32x64",
            ]
        ),
        part="model.layers.1.mlp.experts.",
    ),
    Header(
        "whisper",
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_hidden_layers": 2,
            "vocab_size": 96,
        },
        "\n".join(
            [
                "model.encoder.conv{1,2}.weight 32x32x3 F16",
                "model.encoder.conv{1,2}.bias 32 F16",
                "model.encoder.embed_positions.weight 50x32 F16",
                "model.decoder.embed_tokens.weight 96x32 F16",
                "model.decoder.embed_positions.weight 20x32 F16",
                "model.encoder.layers.{0-1}.self_attn.{q_proj,k_proj,v_proj,out_proj}.weight 32x32 F16",
                "model.encoder.layers.{0-1}.self_attn.{q_proj,v_proj,out_proj}.bias 32 F16",
                "model.encoder.layers.{0-1}.{fc1,fc2}.weight 32x32 F16",
                "model.encoder.layers.{0-1}.{fc1,fc2}.bias 32 F16",
                "model.encoder.layers.{0-1}.{self_attn_layer_norm,final_layer_norm}.{weight,bias} 32 F16",
                "model.decoder.layers.{0-2}.{self_attn,encoder_attn}.{q_proj,k_proj,v_proj,out_proj}.weight 32x32 F16",
                "model.decoder.layers.{0-2}.{self_attn,encoder_attn}.{q_proj,v_proj,out_proj}.bias 32 F16",
                "model.decoder.layers.{0-2}.{fc1,fc2}.weight 32x32 F16",
                "model.decoder.layers.{0-2}.{fc1,fc2}.bias 32 F16",
                "model.decoder.layers.{0-2}.{self_attn_layer_norm,encoder_attn_layer_norm}.{weight,bias} 32 F16",
                "model.decoder.layers.{0-2}.final_layer_norm.{weight,bias} 32 F16",
                "model.{encoder,decoder}.layer_norm.{weight,bias} 32 F16",
            ]
        ),
        part="model.decoder.layers.2.encoder_attn.",
    ),
    Header(
        "t5",
        {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "num_layers": 2,
            "num_decoder_layers": 3,
            "vocab_size": 96,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        "\n".join(
            [
                "shared.weight 96x32 F32",
                "lm_head.weight 96x32 F32",
                "{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight 8x4 F32",
                "encoder.block.{0-1}.layer.0.SelfAttention.{q,k,v,o}.weight 32x32 F32",
                "encoder.block.{0-1}.layer.{0,1}.layer_norm.weight 32 F32",
                "encoder.block.{0-1}.layer.1.DenseReluDense.{wi_0,wi_1,wo}.weight 32x32 F32",
                "decoder.block.{0-2}.layer.0.SelfAttention.{q,k,v,o}.weight 32x32 F32",
                "decoder.block.{0-2}.layer.1.EncDecAttention.{q,k,v,o}.weight 32x32 F32",
                "decoder.block.{0-2}.layer.{0,1,2}.layer_norm.weight 32 F32",
                "decoder.block.{0-2}.layer.2.DenseReluDense.{wi_0,wi_1,wo}.weight 32x32 F32",
                "{encoder,decoder}.final_layer_norm.weight 32 F32",
            ]
        ),
        part="decoder.block.2.layer.1.",
    ),
    Header(
        "flux",
        {"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 3, "guidance_embeds": True},
        "\n".join(
            [
                "{x_embedder,context_embedder,proj_out,norm_out.linear}.weight 32x32",
                "{x_embedder,context_embedder,proj_out,norm_out.linear}.bias 32",
                "time_text_embed.{timestep_embedder,guidance_embedder,text_embedder}.linear_{1,2}.weight 32x32",
                "time_text_embed.{timestep_embedder,guidance_embedder,text_embedder}.linear_{1,2}.bias 32",
                "transformer_blocks.{0-1}.attn.{to_{q,k,v},to_out.0,add_{q,k,v}_proj,to_add_out}.weight 32x32",
                "transformer_blocks.{0-1}.attn.{to_{q,k,v},to_out.0,add_{q,k,v}_proj,to_add_out}.bias 32",
                "transformer_blocks.{0-1}.attn.{norm_q,norm_k,norm_added_q,norm_added_k}.weight 8",
                "transformer_blocks.{0-1}.{norm1,norm1_context}.linear.weight 192x32",
                "transformer_blocks.{0-1}.{ff,ff_context}.net.{0.proj,2}.weight 32x32",
                "single_transformer_blocks.{0-2}.attn.{to_q,to_k,to_v}.weight 32x32",
                "single_transformer_blocks.{0-2}.attn.{norm_q,norm_k}.weight 8",
                "single_transformer_blocks.{0-2}.{norm.linear,proj_mlp,proj_out}.weight 32x32",
            ]
        ),
        part="time_text_embed.guidance_embedder.",
        file="diffusion_pytorch_model.safetensors",
    ),
]
