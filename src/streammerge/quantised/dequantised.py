"""A checkpoint with its quantised weights as numbers: the index that merges see."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streammerge.checkpoints.config import tree_of
from streammerge.checkpoints.config_keys import QUANTISATION
from streammerge.checkpoints.index import CheckpointIndex, QuantisedWeight
from streammerge.errors import MismatchError, printable
from streammerge.quantised.comfyui import comfyui
from streammerge.quantised.gpt_oss import gpt_oss
from streammerge.quantised.packed_numbers import packed_numbers
from streammerge.quantised.scaled_numbers import scaled_numbers
from streammerge.quantised.stored import Scheme, stored_tensors
from streammerge.sources.base import Source
from streammerge.sources.ggml import Ggml
from streammerge.units import counted

_SCHEMES: tuple[tuple[str, Scheme], ...] = (
    ("ComfyUI", comfyui),
    ("MXFP4", gpt_oss),
    ("compressed-tensors or modelopt", packed_numbers),
    ("scaled fp8 or int8", scaled_numbers),
)
"""The schemes in the order in which they are asked. A tensor belongs to the first that takes it."""
GGUF = "GGUF"
"""What a container of such a file calls its format."""
_OF_ACTIVATIONS = re.compile(
    r"[._](input_scale|input_scale_ub|activation_scale|qscale_act|scale_input|output_scale|[qkv]_scale|kv_cache_scale|input_global_scale|"
    r"input_zero_point|output_zero_point|[kv]_zero_point)$|\.comfy_quant$|(^|\.)scaled_fp8$"
)
"""Helpers that scale activations. They have no meaning without the quantised weights."""


def dequantised(index: CheckpointIndex) -> CheckpointIndex:
    """Returns the index with quantised weights as float32 numbers, and without the tensors that only help to read them.

    Weights of schemes that are not read stay as they are stored. Raises MismatchError for helpers that do not fit.
    """
    if index.parts:
        return _of_parts(index)
    weights = weights_of(index)
    if not weights:
        return index
    helpers = set(_helpers(index, weights))
    codes = {weight.stored[0]: name for name, weight in weights.items()}
    entries: dict[str, Source] = {}
    for name, entry in index.entries.items():
        if name in codes:
            entries[codes[name]] = weights[codes[name]].source
        elif name not in helpers:
            entries[name] = entry
    kinds = Counter(weight.scheme for weight in weights.values())
    said = ", ".join(f"{count} as {scheme}" for scheme, count in kinds.most_common())
    note = (
        f"{printable(index.path)}: {counted(len(weights), 'quantised weight')} {'are' if len(weights) > 1 else 'is'} "
        f"dequantised while being read: {said}"
    )
    tied = _tied(entries) if index.aliases else {}
    return replace(index, entries=entries, aliases=tied, notes=[*index.notes, note], quantised=weights, stored=index)


def _tied(entries: Mapping[str, Source]) -> dict[str, str]:
    """Returns tied name -> the first name of the same numbers. Equal codes with other scales are other numbers."""
    firsts: dict[tuple[object, ...], str] = {}
    found = {name: firsts.setdefault(entry.place, name) for name, entry in entries.items() if entry.nbytes}
    return {name: first for name, first in found.items() if first != name}


def _of_parts(index: CheckpointIndex) -> CheckpointIndex:
    """Returns the index of a folder with several models, each with its quantised weights as numbers."""
    parts = {name: dequantised(part) for name, part in index.parts.items()}
    entries: dict[str, Source] = {}
    weights: dict[str, QuantisedWeight] = {}
    notes = [*index.notes]
    for name, part in parts.items():
        prefix = f"{name}/" if name else ""
        entries |= {prefix + own: entry.named(prefix + own) for own, entry in part.entries.items()}
        for own, weight in part.quantised.items():
            stored = tuple(prefix + each for each in weight.stored)
            weights[prefix + own] = weight._replace(source=entries[prefix + own], stored=stored)
        notes += part.notes
    if not weights:
        return index
    notes = list(dict.fromkeys(notes))
    return replace(index, entries=entries, parts=parts, notes=notes, quantised=weights, stored=index)


def described(index: CheckpointIndex) -> CheckpointIndex:
    """Returns the index with its quantised weights named, and its tensors as they are stored. A warning tells what is wrong
    with them."""
    try:
        return replace(index, quantised=weights_of(index))
    except MismatchError as error:
        return replace(index, warnings=[*index.warnings, str(error)])


def weights_of(index: CheckpointIndex) -> dict[str, QuantisedWeight]:
    """Returns the quantised weights of a checkpoint, by their names as plain weights. Raises MismatchError."""
    if index.container.format == GGUF:
        return {name: _of_ggml(name, entry) for name, entry in index.entries.items() if entry.dequantises}
    tree = tree_of(index.path)
    stated: Any = next((tree[key] for key in QUANTISATION if isinstance(tree.get(key), dict)), {})
    stored = stored_tensors(index.entries, index.specs(), stated, index.metadata)
    found: dict[str, QuantisedWeight] = {}
    for label, scheme in _SCHEMES:
        try:
            made = list(scheme(stored))
        except MismatchError as error:
            raise MismatchError(f"{printable(index.path)} is quantised: {label}, but {error}") from error
        if made:
            found |= made
            stored = stored.without({name for _, weight in made for name in weight.stored})
    return found


def _of_ggml(name: str, entry: Source) -> QuantisedWeight:
    """Returns a weight of a GGUF file, whose numbers are given by its format already."""
    kinds = {each.kind for each in _parts(entry) if isinstance(each, Ggml)}
    return QuantisedWeight(entry, (name,), f"{', '.join(sorted(kinds))} of GGUF")


def _parts(source: Source) -> Iterator[Source]:
    yield source
    for part in source.parts:
        yield from _parts(part)


def _helpers(index: CheckpointIndex, weights: Mapping[str, QuantisedWeight]) -> list[str]:
    """Returns the names of tensors that are no weights: helpers of weights, and scales of activations."""
    found = [name for weight in weights.values() for name in weight.stored[1:]]
    return [*found, *filter(scales_activations, index.specs())]


def scales_activations(name: str) -> bool:
    """Whether a tensor of this name, beside quantised weights, has a meaning for quantised activations only."""
    return _OF_ACTIVATIONS.search(name) is not None
