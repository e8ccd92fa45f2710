"""Outputs that are quantised as the first input is: codes and scales in place of each of its quantised weights.

A weight that is copied from a model with the same scheme keeps its bytes. Others are merged to float32 and quantised once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from streammerge.checkpoints.config import tree_of
from streammerge.checkpoints.config_keys import QUANTISATION
from streammerge.checkpoints.index import CheckpointIndex, QuantisedWeight
from streammerge.errors import RecipeError, printable
from streammerge.methods.registry import COPY
from streammerge.planning.aligned import Merged
from streammerge.planning.alignment import Alignment
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.elementwise import rounded
from streammerge.sources.merged import Merged as MergedSource
from streammerge.sources.merged import by_columns
from streammerge.sources.requantised import LARGEST, requantised
from streammerge.sources.scaled import Scaled
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec
from streammerge.units import counted

_AS_THE_FIRST = "it scales activations, and is the first input's"
_HELPS = "scales of the quantised weights"


def like_base(recipe: Recipe, indexes: Indexes, alignment: Alignment) -> Indexes:
    """Quantises the weights of an alignment as the first input's are. Returns the indexes with the first as it is stored.

    Raises RecipeError for what cannot be quantised so.
    """
    first = indexes[recipe.checkpoints[0]]
    _refuse(recipe, first, alignment)
    stored = first.stored or first
    tree = tree_of(first.path)
    stated: Any = next((tree[key] for key in QUANTISATION if isinstance(tree.get(key), dict)), {})
    powers = stated.get("scale_fmt") == "ue8m0"
    made: dict[str, Merged] = {}
    added: list[Merged] = []
    for m in alignment.merged:
        weight = first.quantised.get(m.base_names[0])
        if weight is None:
            made[m.base_names[0]] = m
            added += [m] if m.base_names[0] not in stored.entries else []
            continue
        for part in _parts(recipe, first, weight, m, powers):
            made[part.base_names[0]] = part
    of_weights = {name for weight in first.quantised.values() for name in weight.stored}
    beside = [name for name in stored.entries if name not in first.entries and name not in of_weights]
    for name in beside:
        entry = stored.entries[name]
        made[name] = Merged((name,), entry.spec, COPY, (entry,), why=_AS_THE_FIRST)
    alignment.merged = [*(made[name] for name in stored.entries if name in made), *added]
    helpers = [name for weight in first.quantised.values() for name in weight.stored[1:] if name in made]
    alignment.dispositions.add("tensor", helpers, "merged", _HELPS)
    alignment.notes.append(f"quantised again, as in {printable(first.path)}: {counted(len(helpers), 'weight')}")
    alignment.dispositions.add("tensor", beside, "copied", _AS_THE_FIRST)
    as_stored = replace(first, entries=stored.entries, parts=stored.parts, quantised={}, stored=None)
    return {each: as_stored if index is first else index for each, index in indexes.items()}


def _refuse(recipe: Recipe, first: CheckpointIndex, alignment: Alignment) -> None:
    """Raises RecipeError for a first input, or for a recipe, that gives no form to quantise like."""
    where = printable(first.path)
    if not first.quantised:
        raise RecipeError(
            f"{where} holds no quantised weights that are read, so nothing can be like it; leave `quantise` out"
        )
    if recipe.recast is not None or any(rule.dtype for rule in recipe.rules):
        raise RecipeError("`quantise` writes the dtypes of the first input; leave `dtype` out")
    if first.renamed or recipe.output.strip_prefix or alignment.restacked or alignment.tokenized is not None:
        raise RecipeError(
            "`quantise` keeps the names, layers and tokens of the first input; do without renaming, slices and "
            "`tokenizer_source`, or merge without it"
        )
    for name, weight in first.quantised.items():
        if not _is_written(weight):
            raise RecipeError(
                f"{where}: {printable(name)} is stored as {printable(weight.scheme)}, which is read and not written; leave "
                "`quantise` out, and quantise the result with the program that made the input"
            )


def _is_written(weight: QuantisedWeight) -> bool:
    """Whether numbers can be quantised as this weight is: fp8 or int8 with a scale for each block, row, group or tensor,
    and no zero point. ComfyUI has another rule for the scales of its int8."""
    source = weight.source
    return (
        isinstance(source, Scaled)
        and source.codes.spec.dtype in LARGEST
        and not (source.codes.spec.dtype is DType.I8 and "ComfyUI" in weight.scheme)
        and source.zeros is source.whole is source.groups is None
        and source.scales.spec.dtype in (DType.F32, DType.F16, DType.BF16, DType.U8, DType.F8_E8M0)
    )


def _parts(recipe: Recipe, first: CheckpointIndex, weight: QuantisedWeight, m: Merged, powers: bool) -> Iterable[Merged]:
    """Returns the codes and the scales of a merged weight."""
    like = weight.source
    if not isinstance(like, Scaled):
        raise TypeError(f"{m.spec.name} has no scales")
    if m.spec.shape != like.spec.shape or m.rest is not None:
        raise RecipeError(
            f"{printable(m.spec.name)} has the shape {list(m.spec.shape)} in the output and {list(like.spec.shape)} in "
            f"{printable(first.path)}, so it cannot be quantised like it; leave `quantise` out"
        )
    names = weight.stored[:2]
    pair: tuple[Source, Source]
    copied = m.sources[0] if m.method is COPY and m.inner is None else None
    if isinstance(copied, Scaled) and _alike(copied, like):
        pair = copied.codes, copied.scales
    else:
        powers = powers or like.scales.spec.dtype in (DType.U8, DType.F8_E8M0)
        pair = requantised(_whole(recipe, m), like.codes, like.scales, like.block, like.height, powers)
    why = m.why if m.method is COPY else ""
    specs = [TensorSpec(name, source.spec.dtype, source.spec.shape) for name, source in zip(names, pair, strict=True)]
    return [
        Merged((spec.name,), spec, COPY, (source.named(spec.name),), why=why)
        for spec, source in zip(specs, pair, strict=True)
    ]


def _alike(one: Scaled, two: Scaled) -> bool:
    """Whether two weights are stored in the same way, so that bytes can be copied."""
    same = one.codes.spec.dtype is two.codes.spec.dtype and one.codes.spec.shape == two.codes.spec.shape
    same = same and one.scales.spec.dtype is two.scales.spec.dtype and one.scales.spec.shape == two.scales.spec.shape
    return same and (one.block, one.height) == (two.block, two.height) and one.zeros is one.whole is one.groups is None


def _whole(recipe: Recipe, m: Merged) -> Source:
    """Returns the numbers of a merged weight in float32."""
    spec = TensorSpec(m.spec.name, DType.F32, m.spec.shape)
    if m.method is COPY:
        return rounded(m.sources[0], DType.F32)
    parts = (m.method, m.sources, m.parameters, m.compute, m.based, recipe.seed, m.spec.name)
    return by_columns(MergedSource(spec, *parts))
