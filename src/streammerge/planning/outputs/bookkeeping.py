"""What becomes of a trainer's own numbers when its checkpoints are merged.

Counters such as ``step``, ``epoch`` and ``num_updates``, at any level, are the largest of the inputs. A time stamp is that
of the longest training. Each entry of ``model_loss`` is the weighted mean, where every input has that number. A hash or an
id of the first input is left out. All else is the first input's. The lists are in :mod:`streammerge.tensors.conventions`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streammerge.errors import printable
from streammerge.pickles.training_state import is_training_state
from streammerge.pickles.tree import TensorRef, mapping_items, number, walk
from streammerge.planning.dispositions.ledger import ONE_FILE, Dispositions
from streammerge.tensors.conventions import COUNTERS, FACTS, PROGRESS

if TYPE_CHECKING:
    from streammerge.pickles.repickle import Edit

_SETTINGS = re.compile(r"(?i)(.*_)?(configs?|cfg|args|opts?|options|hparams|(hyper_?)?param(eter)?s)")
_DEEPEST = 4
_MOST_RECORDS = 64
_LOSSES = ("model_loss",)
_FACTS = ("sr", "f0", "version", "arch", "sample_rate")
SPEC_FACTS = ("modelspec.architecture", "modelspec.prediction_type")
"""What the metadata of a diffusion model say about what its numbers mean: a mean of two kinds of prediction is neither."""


def merge_bookkeeping(trees: list[Any], weights: list[float], edit: Edit) -> list[str]:
    """Puts the merged numbers into the edit of the first tree; returns ``key = value`` for each that changed.

    A checkpoint of weight zero has no part in the means.
    """
    first = trees[0]
    if not isinstance(first, dict) or len(trees) < 2:
        return []
    said = _merge_counters(trees, "", edit)
    for key in _LOSSES:
        said += _merge_loss(trees, weights, key, edit)
    return said


def _merge_counters(nodes: list[Any], prefix: str, edit: Edit) -> list[str]:
    """The counters of a node and of what is below it, without those in settings and in the states of optimizers."""
    first, said = nodes[0], []
    for key, value in first.items():
        below = [_get(node, key) for node in nodes]
        if key in COUNTERS and number(value) is not None:
            values = [known for each in below if (known := number(each)) is not None]
            if max(values) != number(value):
                edit.values[id(first), key] = max(values)
                said.append(f"{prefix}{key} = {max(values)}")
        elif isinstance(key, str) and re.fullmatch(PROGRESS, key) and all(map(_is_plain_record, below)):
            longest = max(range(len(below)), key=lambda place: _counters_in(below[place]))
            if _counters_in(below[longest]) > _counters_in(value):
                edit.values[id(first), key] = below[longest]
                said.append(f"{prefix}{key} = that of input {longest + 1}")
        elif isinstance(value, dict) and prefix.count(".") < _DEEPEST and _has_counters(key, value):
            said += _merge_counters(below, f"{prefix}{printable(key)}.", edit)
        elif _are_records(below) and prefix.count(".") < _DEEPEST and _has_counters(key, value):
            for place, records in enumerate(zip(*below, strict=True)):
                said += _merge_counters(list(records), f"{prefix}{printable(key)}.{place}.", edit)
    return said


def _is_plain_record(node: Any) -> bool:
    return isinstance(node, dict) and not any(isinstance(each, TensorRef) for _, each in walk(node))


def _counters_in(record: Any) -> list[float]:
    """Returns the counters of a record at any depth, in its order."""
    found: list[float] = []
    for key, value in mapping_items(record) or ():
        count = number(value) if key in COUNTERS else None
        found += _counters_in(value) if count is None else [count]
    return found


def _are_records(nodes: list[Any]) -> bool:
    """Whether all are short lists of dicts of one length, as fairseq's ``optimizer_history``."""
    lists = all(isinstance(node, list) and len(node) <= _MOST_RECORDS for node in nodes)
    return (
        lists and len({len(node) for node in nodes}) == 1 and all(isinstance(one, dict) for node in nodes for one in node)
    )


def _has_counters(key: Any, value: Any) -> bool:
    """Whether counters below a key count the training; those in settings and in the state of an optimizer do not."""
    return isinstance(key, str) and _SETTINGS.fullmatch(key) is None and not is_training_state(key, value)


def drop_facts(trees: list[Any], edit: Edit, dispositions: Dispositions) -> list[str]:
    """Leaves out what is true of the first file only, such as its hash; returns a note about its name.

    RVC and GPT-SoVITS show ``info`` as the name.
    """
    first = trees[0]
    if not isinstance(first, dict):
        return []
    plain = {key: value for key, value in first.items() if isinstance(value, str | int | bytes)}
    gone = [key for key in plain if isinstance(key, str) and key.lower() in FACTS]
    edit.dropped.update((id(first), key) for key in gone)
    dispositions.add("entry", gone, "dropped", ONE_FILE)
    names = [key for key in ("name", "model_name", "info") if plain.get(key)]
    return [f"'{key}' is still {printable(plain[key], 60)}, as the first input has it" for key in names]


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


def differing_facts(trees: list[Any], paths: Sequence[str], keys: Sequence[str] = _FACTS) -> list[str]:
    """Warnings about what a loader needs to know and the inputs do not agree on, such as RVC's sample rate."""
    said = []
    for key in keys:
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
