"""What programs agree on about the names in adapters and about their configurations. Data only, each with its reason."""

from __future__ import annotations

PARTS: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_(A|B)(?:\.[^.]+)?\.weight", r"\1", "PEFT; between the two may stand the adapter's name"),
    (r"\.lora_(A|B)", r"\1", "mochi, and PEFT of attention modules"),
    (r"\.lora_B(?:\.[^.]+)?\.bias", "B bias", "PEFT with lora_bias"),
    (r"\.lora_embedding_(A|B)(?:\.[^.]+)?", r"embedding \1", "PEFT of embeddings"),
    (r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?", "magnitude", "PEFT with DoRA"),
    (r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?", "tokens", "PEFT's trainable tokens"),
    (r"\.trainable_tokens_delta(?:\.[^.]+)?", "tokens", "PEFT's trainable tokens as an adapter of their own"),
    (r"\.ia3_l(?:\.[^.]+)?", "ia3", "PEFT's IA3"),
    (r"\.on_input", "on_input", "LyCORIS' IA3: whether the weight beside it multiplies inputs"),
    (r"\.(hada_[wt][12](?:_[ab])?)(?:\.(?!weight$)[^.]+)?(?:\.weight)?", r"\1", "LoHa, in LyCORIS and PEFT"),
    (r"\.(lokr_[wt][12](?:_[ab])?)(?:\.(?!weight$)[^.]+)?(?:\.weight)?", r"\1", "LoKr, in LyCORIS and PEFT"),
    (r"[._]lora(?:_linear_layer)?[._](down|up|mid)\.weight", r"\1", "Kohya, LyCORIS, and diffusers before PEFT"),
    (r"\.lora_(down|up|mid)", r"\1", "ComfyUI's extraction"),
    (r"\.([ab][12])\.weight", r"\1", "GLoRA, in LyCORIS"),
    (r"\.alpha", "alpha", "Kohya, LyCORIS"),
    (r"\.dora_scale", "dora_scale", "LyCORIS, ComfyUI"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)", r"\1", "LyCORIS and ComfyUI: whole differences"),
)
"""(pattern of the end of a name, the part, whose): what an adapter's tensor is to its module."""

SAME_PARTS: dict[str, str] = {"down": "A", "up": "B", "w_norm": "diff", "b_norm": "diff_b"}
"""Parts by another word."""

REFUSED_PARTS: tuple[tuple[str, str], ...] = (
    (r"\.b?oft_(blocks|diag|[rRsS])\b", "OFT or BOFT, which multiply the weights by rotations"),
    (r"\.([pq]_layer\.weight|lambda_layer)$", "T-LoRA, whose start was taken from the base and is not in the file"),
    (r"\.vera_(lambda_[bd]|[AB])\b|\.vera_[AB]$", "VeRA, whose matrices depend on a seed"),
    (r"\.bm\.weight$", "GLoRA with a core of its own"),
    (r"\.fourierft_spectrum\b", "FourierFT"),
    (r"\.lora_E$|\.ranknum$", "AdaLoRA"),
    (r"(^|\.)prompt_embeddings$", "a prompt, which changes no weight"),
)
"""(pattern, what it tells): factors that are no sum of products."""

WRAPPERS: tuple[tuple[str, str, str], ...] = (
    (r"^base_model\.model\.", "", "PEFT"),
    (r"(?<=\.)base_model\.model\.", "", "PEFT inside a module (GPT-SoVITS)"),
    (r"\.modules_to_save(\.[^.]+(?=\.)|(?=\.[^.]+$))", "", "PEFT's whole modules, in older files and beside a vocabulary"),
    (r"\.token_adapter(?=\.base_layer\.)", "", "PEFT's trainable tokens of a resized vocabulary"),
    (r"\.original_module(?=\.)", "", "PEFT's whole modules, as they were"),
    (r"\.processor\.(to_[qkv])_lora\b", r".\1.lora", "diffusers before PEFT"),
    (r"\.processor\.to_out_lora\b", ".to_out.0.lora", "diffusers before PEFT"),
    (r"^module\.|(?<=\.)_orig_mod\.|^_orig_mod\.", "", "torch's wrappers"),
)
"""(pattern, what to put there, whose): parts of names that say nothing about the module."""

COPIES: tuple[str, ...] = (".modules_to_save.", ".original_module.")
"""Parts of names of further copies of a whole module, the better first. PEFT writes them where embeddings were resized, and
reads the copy without such a part."""

COMPONENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_unet_", ("unet/", "transformer/", "model.diffusion_model.", "diffusion_model.", "")),
    ("lora_transformer_", ("transformer/", "model.diffusion_model.", "diffusion_model.", "")),
    ("lora_prior_unet_", ("prior/", "model.diffusion_model.", "")),
    (
        "lora_te1_",
        (
            "text_encoder/",
            "conditioner.embedders.0.transformer.",
            "cond_stage_model.transformer.",
            "text_encoders.clip_l.transformer.",
            "",
        ),
    ),
    ("lora_te2_", ("text_encoder_2/", "conditioner.embedders.1.model.", "text_encoders.clip_g.transformer.", "")),
    ("lora_te3_", ("text_encoder_3/", "text_encoders.t5xxl.transformer.", "")),
    ("lora_te_", ("text_encoder/", "cond_stage_model.transformer.", "cond_stage_model.model.", "")),
    ("lycoris_", ("unet/", "transformer/", "model.diffusion_model.", "diffusion_model.", "")),
    ("lora_", ("", "unet/", "model.diffusion_model.")),
    ("unet.", ("unet/", "model.diffusion_model.", "diffusion_model.", "")),
    ("transformer.", ("transformer/", "model.diffusion_model.", "diffusion_model.", "")),
    ("text_encoder.", ("text_encoder/", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "")),
    ("text_encoder_2.", ("text_encoder_2/", "conditioner.embedders.1.model.", "")),
    ("text_encoder_3.", ("text_encoder_3/", "")),
    ("diffusion_model.", ("model.diffusion_model.", "diffusion_model.", "unet/", "transformer/", "")),
    ("model.diffusion_model.", ("model.diffusion_model.", "diffusion_model.", "unet/", "transformer/", "")),
)
"""(start of a module's name in an adapter, starts of the names of the same part in a base, in the order of looking)."""

NEEDED = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "init_lora_weights"),
        *("feedforward_modules", "token_indices"),
    )
)
"""Keys of PEFT's configuration that the numbers depend on."""

TOLD = frozenset(
    (
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
        *("task_type", "ensure_weight_tying"),
    )
)
"""Keys whose meaning is in the names of the tensors too."""

TRAINING = frozenset(
    (
        *("lora_dropout", "inference_mode", "revision", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("eva_config", "velora_config", "monteclora_config", "runtime_config", "lora_ga_config", "corda_config"),
        *("loftq_config", "megatron_core", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"),
        *("use_effective_conv2d", "decompose_both", "decompose_factor", "init_ia3_weights", "layer_replication"),
        *("megatron_config", "qalora_group_size", "bdlora_config"),
    )
)
"""Keys that have no effect after training, and those that :mod:`streammerge.adapters.config` looks at itself."""

REFUSED: dict[str, str] = {
    "use_qalora": "QALoRA pools the inputs of each group",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA has singular values of its own",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so it cannot be in the weights",
    "arrow_config": "Arrow chooses among adapters for each token",
    "layer_replication": "its model has layers more than once; merge those with slices first",
    "megatron_config": "it is cut over several ranks",
}
"""Keys that change what the factors mean -> why they cannot be merged."""

PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica", "lora_only", "default")
"""Initialisations that leave the base as it is."""

LOST_INITS: dict[str, str] = {
    "pissa_niter": "its start is random, so the changed base cannot be computed again",
    "loftq": "it replaced the base by a quantised one",
    "corda": "the changed base depends on data of the training",
    "lora_ga": "the changed base depends on gradients of the training",
}
"""Initialisations that changed the base in a way that the adapter does not tell -> why."""

IN_OUT_EXPERTS = ("gpt_oss", "llama4", "llama4_text")
"""Model types whose fused experts are stored as [experts, in, out]. Asked only where shapes do not tell."""
