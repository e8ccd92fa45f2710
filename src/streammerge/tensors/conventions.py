"""What the field's programs agree on about the names of tensors. Data only, each with its reason.

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
"""The same, where they stand before a name."""

SPELLINGS: tuple[tuple[str, str, str], ...] = (
    (r"\.gamma$", ".weight", "LayerNorm as TensorFlow calls it; transformers reads both"),
    (r"\.beta$", ".bias", "LayerNorm as TensorFlow calls it; transformers reads both"),
    (r"\.parametrizations\.([^.]+)\.original0$", r".\1_g", "torch's weight_norm since 2.0, which reads the old name"),
    (r"\.parametrizations\.([^.]+)\.original1$", r".\1_v", "torch's weight_norm since 2.0, which reads the old name"),
    (r"\.parametrizations\.([^.]+)\.original$", r".\1_orig", "torch's spectral_norm since 1.9"),
    (r"\.parametrizations\.([^.]+)\.0\._([uv])$", r".\1_\2", "torch's spectral_norm since 1.9"),
)
"""(pattern, the other spelling, reason): two names of one tensor, where both checkpoints have one of them."""

_ROTARY = "rotary frequencies, which a model computes from its configuration"
_MASK = "a causal mask, which a model makes anew"
_INDEX = "the numbers 0, 1, 2 and so on, which a model makes anew"

IGNORED: tuple[tuple[str, str, str], ...] = (
    (r"(^|\.)(rotary_(pos_)?emb|rotary|rope)\.(inv_freq|freqs|original_inv_freq)$", "", _ROTARY),
    (r"(^|\.)(rotary_(pos_)?emb|rotary)\.(cos|sin)_cached$", "", _ROTARY),
    (r"(^|\.)freqs_cis$", "", _ROTARY),
    (r"(^|\.)(position_ids|token_type_ids)$", "", _INDEX),
    (r"(^|\.)relative_position_index$", "", _INDEX),
    (r"(^|\.)(attn|attention|self_attn)\.(bias|causal_mask|mask)$", "square mask", _MASK),
    (r"(^|\.)(attn|attention|self_attn)\.masked_bias$", "", "the number that a causal mask puts in"),
    (r"(^|\.)(encoder|decoder)\.version$|(^|\.)_float_tensor$", "", "marks of fairseq, which hold no weights"),
)
"""(pattern, condition on the shape, reason): tensors that loaders drop or compute anew, so that a checkpoint may lack them.

"square mask": the shape is [1, 1, n, n]; a bias of an attention has one axis.
"""

AVERAGED = (
    r"(?i)(.*[_.])?(ema\d*|ema_.*|model_avg|avg_model|average_model(_.*)?|averaged|teacher|swa(_.*)?|shadow(_params)?)"
    r"([_.].*)?"
)
"""A part of a name, or a key, that speaks of a running mean of the weights."""

SWAPPED: tuple[tuple[str, str, str, str], ...] = (
    ("state_dict", "ema_state_dict", "message_hub", "mmengine's EMAHook"),
    ("state_dict", "current_model_state", "averaging_state", "Lightning's WeightAveraging"),
)
"""(key of the average, key of the plain weights, key beside them, program): the average stands where loaders look for the
weights, and the plain weights beside it."""

COUNTERS: frozenset[str] = frozenset(
    (
        *("step", "steps", "global_step", "iteration", "iterations", "iter", "iters", "iter_num", "n_iter"),
        *("epoch", "current_epoch", "batch_idx_train", "update", "updates", "num_updates", "n_averaged"),
        "num_batches_tracked",
        "count",
        "initted",
    )
)
"""What counts how long was trained. A merge has the largest of the inputs; a mean would be no count."""

FACTS: frozenset[str] = frozenset(("hash", "id", "sha256", "md5", "uuid"))
"""What is true of one file only, so that a merge must not have the first input's."""

CHECKSUM_FILES: tuple[str, ...] = ("checklist.chk", ".md5", ".sha256", ".sha512", "md5sums", "sha256sums")
"""Endings, in lower case, of files that hold checksums of the files beside them."""
