"""Conventions of programs about the names of tensors and files. Data only, each with its reason.

This is the one place for such lists. A name that can be told by comparing two checkpoints does not belong here.
"""

from __future__ import annotations

WRAPPERS: dict[str, str] = {
    "module.": "DataParallel, DistributedDataParallel, AveragedModel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning Fabric, DeepSpeed",
}
"""Parts that wrap a module, anywhere in a name. They say nothing about what the tensor is."""

LEADING_WRAPPERS: dict[str, str] = {
    "xtts.": "Coqui's trainer, whose own loader removes it",
}
"""Prefixes that wrap a module. They count at the beginning of a name only."""

SPELLINGS: tuple[tuple[str, str, str], ...] = (
    (r"\.gamma$", ".weight", "LayerNorm as TensorFlow calls it; transformers reads both"),
    (r"\.beta$", ".bias", "LayerNorm as TensorFlow calls it; transformers reads both"),
    (r"\.parametrizations\.([^.]+)\.original0$", r".\1_g", "torch's weight_norm since 2.0, which reads the old name"),
    (r"\.parametrizations\.([^.]+)\.original1$", r".\1_v", "torch's weight_norm since 2.0, which reads the old name"),
    (r"\.parametrizations\.([^.]+)\.original$", r".\1_orig", "torch's spectral_norm since 1.9"),
    (r"\.parametrizations\.([^.]+)\.0\._([uv])$", r".\1_\2", "torch's spectral_norm since 1.9"),
)
"""(pattern, the other spelling, reason): two names of one tensor. They are matched where each checkpoint has one of the
two."""

_ROTARY = "rotary frequencies, which a model computes from its configuration"
_MASK = "a causal mask, which a model makes itself"
_SPECTROGRAM = "filters and windows of a spectrogram, which a model computes from its configuration"
_SCHEDULE = "the noise schedule, which a diffusion model computes from its configuration"
_INDEX = "the numbers 0, 1, 2 and so on, which a model makes itself"

IGNORED: tuple[tuple[str, str, str], ...] = (
    (r"(^|\.)(rotary_(pos_)?emb|rotary|rope)\.(inv_freq|freqs|original_inv_freq)$", "", _ROTARY),
    (r"(^|\.)(rotary_(pos_)?emb|rotary)\.(cos|sin)_cached$", "", _ROTARY),
    (r"(^|\.)freqs_cis$", "", _ROTARY),
    (r"^(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod)$", "", _SCHEDULE),
    (
        r"^(log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights)$",
        "",
        _SCHEDULE,
    ),
    (r"^denoiser\.sigmas$", "", _SCHEDULE),
    (r"^loss\.(logvar|discriminator\.|perceptual_loss\.)", "", "the loss that an autoencoder is trained with"),
    (r"(^|\.)(position_ids|token_type_ids)$", "", _INDEX),
    (r"(^|\.)relative_position_index$", "", _INDEX),
    (r"(^|\.)(mel_scale\.fb|spectrogram\.window)$", "", _SPECTROGRAM),
    (r"(^|\.)(attn|attention|self_attn)\.(bias|causal_mask|mask)$", "square mask", _MASK),
    (r"(^|\.)(attn|attention|self_attn)\.masked_bias$", "", "the number that a causal mask puts in"),
    (r"(^|\.)_extra_state$", "", "states of modules, which only the modules read"),
    (r"\.EncDecAttention\.relative_attention_bias\.weight$", "", "a bias that early T5 stored and no T5 uses"),
    (r"(^|\.)(encoder|decoder)\.version$|(^|\.)_float_tensor$", "", "marks of fairseq, which hold no weights"),
)
"""(pattern, condition on the shape, reason): tensors that loaders drop or compute again. A checkpoint may lack them.

"square mask": the shape is [1, 1, n, n]; a bias of an attention has one axis.
"""

FACTORS: tuple[tuple[str, str], ...] = (
    (r"(^|[._])lora_(A|B|E|embedding_[AB]|magnitude_vector|up|down|mid)\b", "LoRA"),
    (r"[._]lora\.(up|down|mid)\.", "LoRA"),
    (r"\.dora_scale$", "DoRA"),
    (r"\.hada_[wt][12](_[ab])?\b", "LoHa"),
    (r"\.lokr_[wt][12](_[ab])?\b", "LoKr"),
    (r"\.b?oft_(blocks|diag|[rRsS])\b", "OFT"),
    (r"\.vera_(lambda_[bd]|[AB])\b", "VeRA"),
    (r"^(lora|lycoris)_[^.]+\.([ab][12]|bm)\.weight$", "GLoRA"),
    (r"^(lora|lycoris)_[^.]+\.([pq]_layer\.weight|lambda_layer)$", "T-LoRA"),
)
"""(pattern, kind of adapter): factors. The product of two factors is the update of a weight, and the mean of factors does
not give the mean of updates.

Adapters whose numbers enter linearly, such as IA3, are not among them.
"""

EXPERT_ROLES: dict[str, str] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate and up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "w13": "gate and up",
}
"""Name of a matrix of an expert -> its role. In "gate and up" the gate comes first."""

EXPERT_STACKS = ("experts", "switch_mlp")
"""Names of the module that holds the experts of a layer."""

AVERAGED = (
    r"(?i)(.*[_.])?(ema\d*|ema_.*|model_avg|avg_model|average_model(_.*)?|averaged|teacher|swa(_.*)?|shadow(_params)?)"
    r"([_.].*)?"
)
"""Matches a part of a name, or a key, that means a running mean of the weights."""

AVERAGED_NAME = r"(?i)(?<![a-z])(ema|swa|avg|ave|averaged?)(?![a-z])"
"""Found in the name of a file that holds an average of others, or a running one: NeMo's ``epoch=3-EMA.ckpt``, ESPnet's
``valid.acc.ave_10best.pth``, icefall's ``epoch-30-avg-9.pt``."""

LATEST_NAME = r"(?i)(?<![a-z])(last|latest|final)(?![a-z])"
"""Found in the name of a file without a number that a training wrote last: Lightning's ``last.ckpt``."""

SWAPPED: tuple[tuple[str, str, str, str], ...] = (
    ("state_dict", "ema_state_dict", "message_hub", "mmengine's EMAHook"),
    ("state_dict", "current_model_state", "averaging_state", "Lightning's WeightAveraging"),
)
"""(key of the average, key of the plain weights, key beside them, program): the average stands where loaders look for the
weights, and the plain weights beside it."""

COUNTERS: frozenset[str] = frozenset(
    (
        *("step", "steps", "global_step", "global_steps", "global_samples", "optimization_step"),
        *("iteration", "iterations", "iter", "iters", "iter_num", "n_iter"),
        *(
            "epoch",
            "epochs",
            "current_epoch",
            "cur_epoch",
            "batch_idx_train",
            "update",
            "updates",
            "num_updates",
            "n_averaged",
        ),
        "num_batches_tracked",
        "count",
        "initted",
    )
)
"""Keys that count the length of the training. A merge has the largest value of its inputs, because a mean is not a count.
"""

PROGRESS = r"(?i)(.*_)?timestamp"
"""A key of a record that only makes sense as a whole, as that of Composer: a merge has that of the longest training."""

FACTS: frozenset[str] = frozenset(("hash", "id", "sha256", "md5", "uuid"))
"""Keys whose value is true of one file only. A merge does not copy them from the first input."""

CHECKSUM_FILES: tuple[str, ...] = (
    "checklist.chk",
    ".md5",
    ".sha256",
    ".sha512",
    "md5sums",
    "sha256sums",
    "integrity.json",  # Megatron, which refuses to load files that it does not describe
)
"""Endings, in lower case, of files that hold checksums of the files beside them."""

WEIGHT_FILES: tuple[tuple[str, str, str], ...] = (
    ("model", ".safetensors", "transformers, sentence-transformers, timm"),
    ("diffusion_pytorch_model", ".safetensors", "diffusers"),
    ("open_clip_model", ".safetensors", "open_clip"),
    ("open_clip_pytorch_model", ".safetensors", "open_clip, as first converted"),
    ("pytorch_model", ".bin", "transformers, sentence-transformers, timm"),
    ("diffusion_pytorch_model", ".bin", "diffusers"),
    ("open_clip_pytorch_model", ".bin", "open_clip"),
    ("model", ".pth", "XTTS and other programs"),
    ("model", ".pt", "programs of one file"),
    ("model", ".ckpt", "SpeechBrain"),
    ("adapter_model", ".safetensors", "peft"),
    ("adapter_model", ".bin", "peft"),
    ("consolidated", ".safetensors", "Mistral"),
    ("consolidated.00", ".pth", "Llama, Mistral"),
)
"""(stem, ending, program): the names by which loaders find the weights in a folder, in the order of their search."""

SEVERAL: frozenset[tuple[str, str]] = frozenset((("model", ".ckpt"),))
"""(stem, ending) among them that is the name of one network of several. SpeechBrain saves each part of a training under
its own name in one folder, so ``wav2vec2.ckpt`` beside ``model.ckpt`` is a part too."""

WEIGHTS_KEY = "transformers_weights"
"""A key of ``config.json`` that names the file of the weights, or their index. transformers looks for it first."""

ADAPTERS: frozenset[str] = frozenset(("adapter_model",))
"""Stems among them that hold other weights beside those of a model. They are not another form of the model's weights."""

INDEX_FIRST: frozenset[str] = frozenset(("diffusion_pytorch_model",))
"""Stems whose loader looks for an index before it looks for a single file."""

INDEXED: frozenset[str] = frozenset(("model", "pytorch_model", "diffusion_pytorch_model"))
"""Stems whose loader reads an index, so that the weights may be cut into shards."""

AS_SAFETENSORS: dict[str, str] = {
    "pytorch_model": "model",
    "diffusion_pytorch_model": "diffusion_pytorch_model",
    "open_clip_pytorch_model": "open_clip_model",
    "adapter_model": "adapter_model",
}
"""Stem of a pickle -> the stem under which the same loader looks for safetensors first."""

PIPELINES: dict[str, str] = {
    "model_index.json": "diffusers: a mapping from the names of subfolders to [library, class]",
    "modules.json": "sentence-transformers: a list of modules, each with the path of its subfolder, or an empty one",
}
"""Files that name the subfolders with the parts of a model."""

ROUTED: tuple[str, ...] = ("router_config.json", "config.json")
"""Files by which a module of sentence-transformers names modules of its own: the keys of ``types`` are their subfolders."""

EXPORT_FILES: tuple[str, ...] = (
    r".*\.(gguf|msgpack|h5|ot|tflite|mlmodel|distcp)",
    r"((pytorch_|diffusion_pytorch_|encoder_|decoder_)?model)([-_]\w+)*\.(onnx|onnx_data|onnx\.data)",
    r"openvino_\w+\.(xml|bin)",
)
"""Files for other programs, made from the weights of a checkpoint. Any other ``.onnx`` file is another network."""

EXPORT_FOLDERS: frozenset[str] = frozenset(("onnx", "openvino", "coreml", "gguf", "tflite", "ggml"))
"""Subfolders that hold only such files."""

TRAINING_FILES = (
    r"training_args\.bin|trainer_state\.json|events\.out\.tfevents.*|zero_to_fp32\.py|latest"
    r"|(optimizer|scheduler|scaler|rng_state|random_states|custom_checkpoint_\d|sampler|dl_state_dict)[\w-]*"
    r"\.(pt|pth|bin|pkl|ckpt|safetensors)|.*\.distcp"
)
"""Files of a training run that no loader of a model reads. They do not belong to a merged model."""

TRAINING_FOLDERS = r"(checkpoint|step|epoch|global_step)[-_]?\d+|runs|logs|wandb|tensorboard|lightning_logs|mlruns"
"""Subfolders of a training run that no loader of a model reads."""
