"""Quantised weights, recognised by the tensors that stand beside them: packed integers, or numbers that need a scale.

None of them can be merged as it stands: integers in packs are no numbers, and scaled ones mean nothing without their scale.
8-bit floats without a scale are ordinary numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_SCHEMES = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("scaled fp8 (weight_scale_inv)", re.compile(r"[._]weight_scale_inv$")),
    ("compressed-tensors", re.compile(r"\.(weight_packed|weight_zero_point|weight_shape|weight_global_scale)$")),
    ("scaled fp8 (ComfyUI)", re.compile(r"\.(scale_weight|scale_input)$|(^|\.)scaled_fp8$")),
    ("scaled (weight_scale)", re.compile(r"[._]weight_scale$|\.input_scale$|\.weight_scale_2$")),
    ("MXFP4", re.compile(r"_(blocks|scales)$")),
)


_ANY = re.compile("absmax|quant_|SCB$|qweight$|qzeros$|g_idx$|weight_|scale|scaled_fp8|_blocks$")


def scheme(names: Collection[str]) -> tuple[str, str] | None:
    """How these tensors are quantised, and one that tells; None for ordinary ones."""
    for name in filter(_ANY.search, names):
        for label, companions in _SCHEMES:
            if companions.search(name) and not (label == "MXFP4" and not _paired(name, names)):
                return label, name
    return None


def _paired(name: str, names: Collection[str]) -> bool:
    """Whether both halves of an MXFP4 weight are there; either word alone may mean something else."""
    stem, _, word = name.rpartition("_")
    return f"{stem}_{'scales' if word == 'blocks' else 'blocks'}" in set(names)
