"""Recognition of quantised weights by their companion tensors: packed integers, or numbers that need a scale.

Quantised weights cannot be merged directly: packed integers are not numbers, and scaled numbers need their scale. 8-bit
floats without a scale are ordinary numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_SCALED = "scaled fp8 or int8 (weight_scale)"
_MLX = "MLX"
_SCHEMES = (
    ("bitsandbytes", r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB)$"),
    ("GPTQ or AWQ", r"\.(qweight|qzeros|g_idx)$"),
    ("EXL2", r"\.q_(weight|invperm|groups|group_map)$"),
    ("EXL3", r"\.trellis$"),
    ("HQQ", r"\.W_q$"),
    ("AQLM", r"\.codebooks$"),
    ("VPTQ", r"\.(res_)?centroids(\.weight)?$"),
    ("QuIP#", r"\.Qidxs(_\d)?$"),
    ("torchao", r"\._?weight_qdata$"),
    ("EETQ", r"\.weight_scales$"),
    ("MXFP4", r"_(blocks|scales)$"),
    (_MLX, r"\.scales$"),
    ("scaled fp8 (weight_scale_inv)", r"[._]weight_scale_inv$"),
    ("compressed-tensors", r"\.(weight_packed|weight_zero_point|weight_global_scale|bitmask|scale_packed)$"),
    ("scaled fp8 (ComfyUI)", r"\.(scale_weight|scale_input|comfy_quant)$"),
    ("scaled fp8 or int8 (scaling_factor)", r"\.(weights|activation)_scaling_factor$"),
    (_SCALED, r"[._]_?(\w*_)?scale(_\d)?$"),
    ("integers in place of weights", r"(^|\.)weight$"),
)
_ANY = re.compile(
    r"absmax|quant|SCB$|q_\w+$|qweight$|qzeros$|g_idx$|trellis$|W_q$|codebooks$|centroids|Qidxs|qdata$|weight_|scale|scaling_"
    r"|_blocks$|bitmask$"
)
_SCALE = r"^(?P<parent>.*\.)?_?((?P<weights>\w+?)_)?scale(_\d)?$"
ADVICE: dict[str, str] = {
    _MLX: "save it again without quantisation, in Python: `mlx_lm.convert(MODEL, OUT, dequantize=True)`",
    "bitsandbytes": "load it with transformers and bitsandbytes, and save what `model.dequantize()` returns",
    "GPTQ or AWQ": "dequantise it with the library GPTQModel",
    "HQQ": "dequantise it with the library hqq, where `HQQLinear.dequantize()` returns the weights",
    "EXL2": "give the weights that it was made from; the library exllamav2 holds the code that dequantises it",
    "EXL3": "give the weights that it was made from; the library exllamav3 holds the code that dequantises it",
    "AQLM": "dequantise it with the library aqlm",
    "VPTQ": "dequantise it with the library vptq",
    "torchao": "load it with torchao, and save what `dequantize()` of its tensors returns",
    "EETQ": "dequantise it with the library eetq",
}
"""What to do about some schemes: which library makes plain weights of them. A conversion of these is refused too."""


def companions(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[str, str]]:
    """Finds tensors that indicate a quantisation. Maps each to its scheme and to the name prefix of its weights.

    A name alone is no proof: packed or 8-bit values must be beside it. The most reliable scheme is tried first.
    """
    suspects, found = list(filter(_ANY.search, specs)), dict[str, tuple[str, str]]()
    if any(dtype.kind == "int" for dtype in {spec.dtype for spec in specs.values()}):
        suspects += [name for name, spec in specs.items() if name.endswith("weight") and _is_table_of_integers(spec)]
    for label, text in _SCHEMES if suspects else ():
        pattern = re.compile(text)
        for name in suspects:
            match = pattern.search(name)
            if match and name not in found and _is_of(label, name, specs):
                found[name] = (label, name[: match.start()])
    if not found:
        return {}
    stems = {_stem(name) for name, spec in specs.items() if _is_narrow(spec)}
    return {name: (label, stem) for name, (label, stem) in found.items() if _about(name, stem, stems)}


def belongs(name: str, stem: str) -> bool:
    """Whether a tensor belongs to the weights that a companion with this stem describes."""
    return name == stem or name.startswith((f"{stem}.", f"{stem}_"))


def _is_of(label: str, name: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor with a name of the scheme can belong to it, judged by the tensors beside it."""
    if label == _MLX:
        weight = specs.get(f"{_stem(name)}.weight")
        return weight is not None and weight.dtype is DType.U32
    return label != _SCALED or _scales(name, specs)


def _scales(name: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor that is called a scale scales 8-bit weights beside it.

    ``weight_scale`` scales ``weight``. A plain ``scale`` scales what is beside it, unless it has 8 bits too: then it is
    the weight of a norm in a model of 8-bit numbers.
    """
    match = re.match(_SCALE, name)
    if match is None:
        return False
    parent, weights = match["parent"] or "", match["weights"]
    if weights not in (None, "weight", "weights", "input", "output", "activation"):
        return f"{parent}{weights}" in specs and _is_short(specs[f"{parent}{weights}"])
    if weights is None and _is_short(specs[name]):
        return False
    beside = (parent[:-1], *(f"{parent}{each}" for each in ("weight", "_data", "qdata", "W_q")))
    return any(each in specs and _is_short(specs[each]) for each in beside)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _about(name: str, stem: str, narrow: set[str]) -> bool:
    return stem in narrow or _stem(stem) in narrow or _stem(name) in narrow


def _is_table_of_integers(spec: TensorSpec) -> bool:
    return spec.dtype.kind == "int" and len(spec.shape) > 1


def _is_short(spec: TensorSpec) -> bool:
    """Whether the values have 8 bits or fewer, or are packed."""
    return spec.dtype.kind == "packed" or (spec.dtype.kind in ("float", "int") and spec.dtype.bits == 8)


def _is_narrow(spec: TensorSpec) -> bool:
    """Whether the values may be packed or scaled: 8-bit floats, packed values, integers of up to 32 bits (not 0-d)."""
    kind, wide = spec.dtype.kind, spec.dtype in (DType.I64, DType.U64)
    return (
        kind == "packed"
        or (kind == "float" and spec.dtype.bits == 8)
        or (kind == "int" and not wide and len(spec.shape) > 0)
    )
