"""Experts of gpt-oss in MXFP4: ``X_blocks`` and ``X_scales`` for the parameter ``X``."""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.checkpoints.index import QuantisedWeight
from streammerge.quantised.stored import Found, StoredTensors
from streammerge.sources.mxfp4_experts import mxfp4_experts


def gpt_oss(stored: StoredTensors) -> Iterator[Found]:
    """Yields experts in blocks. Raises MismatchError for scales that do not fit."""
    for name in stored.by_end.get("_blocks", ()):
        blocks, scales = stored.entries[f"{name}_blocks"], stored.get(f"{name}_scales")
        if scales is not None:
            made = mxfp4_experts(name, blocks, scales)
            yield Found(
                name, QuantisedWeight(made, (f"{name}_blocks", f"{name}_scales"), "mxfp4, a scale for each 32 numbers")
            )
