"""What becomes of a trainer's own numbers when its checkpoints are merged.

``step`` and ``epoch`` (and their cousins) are the largest of the inputs; each entry of ``model_loss`` the weighted mean
where every input has that number; all else is the first input's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streammerge.errors import printable
from streammerge.pickles.repickle import Edit
from streammerge.pickles.tree import number

_COUNTERS = ("step", "epoch", "global_step", "iteration", "iter_num", "current_epoch", "batch_idx_train", "updates")
_LOSSES = ("model_loss",)
_FACTS = ("sr", "f0", "version", "arch", "sample_rate")


def merge_bookkeeping(trees: list[Any], weights: list[float], edit: Edit) -> list[str]:
    """Puts the merged numbers into the edit of the first tree; returns ``key = value`` for each that changed.

    A checkpoint of weight zero has no part in the means.
    """
    first = trees[0]
    if not isinstance(first, dict) or len(trees) < 2:
        return []
    said = []
    for key in _COUNTERS:
        values = [value for tree in trees if (value := number(_get(tree, key))) is not None]
        if values and number(_get(first, key)) is not None and max(values) != number(first[key]):
            edit.values[id(first), key] = max(values)
            said.append(f"{key} = {max(values)}")
    for key in _LOSSES:
        said += _merge_loss(trees, weights, key, edit)
    return said


def _merge_loss(trees: list[Any], weights: list[float], key: str, edit: Edit) -> list[str]:
    counted = [(tree, w) for tree, w in zip(trees, weights, strict=True) if w]
    losses, weights = [_get(tree, key) for tree, _ in counted], [w for _, w in counted]
    if losses and _get(trees[0], key) is not None and all(number(loss) is not None for loss in losses):
        mean = _mean(losses, weights)
        edit.values[id(trees[0]), key] = mean
        return [f"{key} = {mean:.6g}"]
    said = []
    first = _get(trees[0], key)
    if isinstance(first, dict) and all(isinstance(loss, dict) for loss in losses):
        for name in first:
            if losses and all(number(_get(loss, name)) is not None for loss in losses):
                mean = _mean([loss[name] for loss in losses], weights)
                edit.values[id(first), name] = mean
                said.append(f"{key}.{name} = {mean:.6g}")
    return said


def differing_facts(trees: list[Any], paths: Sequence[str]) -> list[str]:
    """Warnings about what a loader needs to know and the inputs do not agree on, such as RVC's sample rate."""
    said = []
    for key in _FACTS:
        values = {path: _get(tree, key) for tree, path in zip(trees, paths, strict=True) if _get(tree, key) is not None}
        if all(isinstance(v, str | int | float) for v in values.values()) and len(set(values.values())) > 1:
            shown = ", ".join(f"{printable(value)} in {printable(path)}" for path, value in values.items())
            said.append(f"'{key}' differs: {shown}; the first is kept")
    return said


def _get(node: Any, key: Any) -> Any:
    return node.get(key) if isinstance(node, dict) else None


def _mean(values: list[Any], weights: list[float]) -> float:
    total = sum(weights) or 1.0
    return float(sum(w * (number(v) or 0.0) for v, w in zip(values, weights, strict=True)) / total)
