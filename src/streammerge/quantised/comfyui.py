"""Layers that ComfyUI has quantised: each has a format, in a tensor beside it or in the metadata of the file.

The older form (``scale_weight``) tells no format: it is 8-bit floats with one scale.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.checkpoints.index import QuantisedWeight
from streammerge.quantised.stored import Found, StoredTensors
from streammerge.sources.base import Source
from streammerge.sources.deflated import read_small
from streammerge.sources.scaled import Scaled, scaled
from streammerge.sources.swizzled import unswizzled
from streammerge.sources.unpacked import unpacked
from streammerge.strict_json import load_json
from streammerge.tensors.dtypes import DType

METADATA = "_quantization_metadata"
"""The key of a file's metadata that names the quantised layers."""
_MOST_BYTES = 1 << 16
_ONE_SCALE = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")


def comfyui(stored: StoredTensors) -> Iterator[Found]:
    """Yields the layers that a format is told of. Raises MismatchError for a format that is not read."""
    told = _in_metadata(stored)
    for layer in stored.by_end.get(".comfy_quant", ()):
        told[layer] = _in_tensor(stored, layer)
    for layer, said in told.items():
        codes, scales = stored.get(f"{layer}.weight"), stored.get(f"{layer}.weight_scale")
        if codes is not None:
            if scales is None:
                raise stored.wrong(f"{layer}.weight", "has no weight_scale")
            yield _found(stored, layer, said, codes, scales)


def _in_metadata(stored: StoredTensors) -> dict[str, Mapping[str, Any]]:
    """Returns the layers that the metadata names, by the names that they have in the file."""
    if METADATA not in stored.metadata:
        return {}
    try:
        content = load_json(stored.metadata[METADATA])
    except ValueError:
        content = None
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict):
        raise stored.wrong(METADATA, "cannot be read as JSON with layers")
    found: dict[str, Mapping[str, Any]] = {}
    ends = {name.rpartition(".weight")[0] for name in stored.specs if name.endswith(".weight")}
    for layer, said in layers.items():
        if not isinstance(said, dict):
            raise stored.wrong(layer, "has no format in the metadata")
        whole = [layer] if layer in ends else [each for each in ends if each.endswith(f".{layer}")]
        if len(whole) > 1:
            raise stored.wrong(layer, f"is one of {len(whole)} layers that the metadata may mean")
        found |= dict.fromkeys(whole, said)
    return found


def _in_tensor(stored: StoredTensors, layer: str) -> Mapping[str, Any]:
    """Returns what the tensor beside a layer says."""
    entry = stored.entries[f"{layer}.comfy_quant"]
    said = None
    if entry.spec.dtype is DType.U8 and entry.nbytes <= _MOST_BYTES:
        with contextlib.suppress(ValueError):
            said = load_json(read_small(entry).decode())
    if not isinstance(said, dict):
        raise stored.wrong(f"{layer}.weight", "has a comfy_quant that is no JSON")
    return said


def _found(stored: StoredTensors, layer: str, said: Mapping[str, Any], codes: Source, scales: Source) -> Found:
    name, form = f"{layer}.weight", said.get("format")
    if said.get("convrot") or stored.get(f"{layer}.pre_quant_scale") is not None:
        raise stored.wrong(
            name, "is rotated (convrot) or follows scaled activations, which is not read; dequantise it with comfy-kitchen"
        )
    parts = [name, f"{name}_scale"]
    made: Scaled
    if form in _ONE_SCALE:
        made = scaled(name, codes, scales, (1, 1 << 62))
    elif form == "mxfp8" and len(codes.spec.shape) == 2:
        grid = codes.spec.shape[0], -(-codes.spec.shape[1] // 32)
        made = scaled(name, codes, unswizzled(scales, grid), (1, 32))
    elif form == "nvfp4" and len(codes.spec.shape) == 2 and stored.get(f"{name}_scale_2") is not None:
        shape = codes.spec.shape[0], 2 * codes.spec.shape[1]
        numbers = unpacked(name, codes, shape, 4, floats=True, high_first=True)
        grid = shape[0], -(-shape[1] // 16)
        made = scaled(name, numbers, unswizzled(scales, grid), (1, 16), whole=stored.entries[f"{name}_scale_2"])
        parts.append(f"{name}_scale_2")
    else:
        raise stored.wrong(name, f"has the format {json.dumps(form)} of ComfyUI, which is not read; dequantise it there")
    return Found(name, QuantisedWeight(made, tuple(parts), f"{form} of ComfyUI"))
