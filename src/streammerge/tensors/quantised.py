"""Recognition of quantised weights by their companion tensors: packed integers, or numbers that need a scale.

Quantised weights cannot be merged directly: packed integers are not numbers, and scaled numbers need their scale. 8-bit
floats without a scale are ordinary numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_SCHEMES = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("HQQ", re.compile(r"\.W_q$")),
    ("AQLM", re.compile(r"\.codebooks$")),
    ("MXFP4", re.compile(r"_(blocks|scales)$")),
    ("scaled fp8 (weight_scale_inv)", re.compile(r"[._]weight_scale_inv$")),
    ("compressed-tensors", re.compile(r"\.(weight_packed|weight_zero_point|weight_global_scale)$")),
    ("scaled fp8 (ComfyUI)", re.compile(r"\.(scale_weight|scale_input)$")),
    ("scaled fp8 or int8 (weight_scale)", re.compile(r"[._]_?(\w*_)?scale(_\d)?$")),
)
_ANY = re.compile(r"absmax|quant_|SCB$|qweight$|qzeros$|g_idx$|W_q$|codebooks$|weight_|scale|_blocks$")


def companions(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, str]]:
    """Finds tensors that indicate a quantisation. Maps each to its scheme and to the name prefix of its weights.

    A name alone is no proof: packed or 8-bit values must be beside it. The most reliable scheme is tried first.
    """
    suspects, found = list(filter(_ANY.search, specs)), dict[str, tuple[str, str]]()
    for label, pattern in _SCHEMES:
        for name in suspects:
            match = pattern.search(name)
            if match:
                found.setdefault(name, (label, name[: match.start()]))
    if not found:
        return {}
    stems = {_stem(name) for name, spec in specs.items() if _is_narrow(spec)}
    return {name: (label, stem) for name, (label, stem) in found.items() if _about(name, stem, stems)}


def belongs(name: str, stem: str) -> bool:
    """Whether a tensor belongs to the weights that a companion with this stem describes."""
    return name == stem or name.startswith((f"{stem}.", f"{stem}_"))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _about(name: str, stem: str, narrow: set[str]) -> bool:
    return stem in narrow or _stem(stem) in narrow or _stem(name) in narrow


def _is_narrow(spec: TensorSpec) -> bool:
    """Whether the values may be packed or scaled: 8-bit floats, packed values, integers of up to 32 bits (not 0-d)."""
    kind, wide = spec.dtype.kind, spec.dtype in (DType.I64, DType.U64)
    return (
        kind == "packed"
        or (kind == "float" and spec.dtype.bits == 8)
        or (kind == "int" and not wide and len(spec.shape) > 0)
    )
