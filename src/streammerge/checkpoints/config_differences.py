"""Finds what changes the arithmetic between models whose tensors have the same names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from streammerge.checkpoints.config import CONFIG, Tree, mappings, tree_of
from streammerge.checkpoints.config_keys import ALIKE, ARITHMETIC, LEFT_OUT, NOT_ARITHMETIC, PARTS
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import printable

_ARITHMETIC = re.compile(ARITHMETIC)
_NOT_ARITHMETIC = re.compile(NOT_ARITHMETIC)
_TEXT = re.compile(r"(\w+)_config")
_LABELS, _UNNAMED = "id2label", re.compile(r"LABEL_\d+")
_MOST_KEYS = 6


def differing_configs(indexes: Iterable[CheckpointIndex]) -> list[str]:
    """Returns a sentence about each checkpoint whose model computes differently from the first one by its configuration."""
    found = [(index, tree) for index in indexes if (tree := tree_of(index.path))]
    said = []
    for index, tree in found[1:]:
        first, first_tree = found[0]
        differing = differences(first_tree, tree)
        if differing:
            shown = [f"{printable(key)} is {_shown(one)} and {_shown(two)}" for key, one, two in differing[:_MOST_KEYS]]
            more = len(differing) - _MOST_KEYS
            said.append(
                f"{printable(first.path)} and {printable(index.path)} compute differently by their {CONFIG}: "
                f"{'; '.join(shown)}{f'; and {more} more keys' if more > 0 else ''}. Weights of models that compute "
                "differently may not fit each other"
            )
    return said


def differences(one: Tree, two: Tree) -> list[tuple[str, Any, Any]]:
    """Returns (key, value in the one, value in the other) of what changes the arithmetic, where both state it."""
    ours, theirs = _facts(one), _facts(two)
    return [
        (key, ours[key], theirs[key])
        for key in ours
        if key in theirs
        and not (_same_labels if key.endswith(_LABELS) else _same)(ours[key], theirs[key])
        and (key != "architectures" or "model_type" not in ours)
    ]


def _facts(tree: Tree) -> dict[str, Any]:
    """Returns key path -> value. A part of text stands at the top, where older releases have it."""
    found: dict[str, Any] = {key: tree[key] for key in ("model_type", "architectures") if key in tree}
    found |= LEFT_OUT.get(str(tree.get("model_type")), {})
    for path, each in mappings(tree):
        if any(key.startswith("rope") for key in path):
            continue  # read as a whole
        outer = [key for key in path if not _is_text(key)]
        unused = "window" if each.get("use_sliding_window") is False else None
        rotary = _rotary(each)
        for key, value in {**each, **rotary}.items():
            speaks = _ARITHMETIC.search(key) and not _NOT_ARITHMETIC.search(key) and not (unused and unused in key)
            if key in rotary or (speaks and not isinstance(value, dict)) or (key == _LABELS and isinstance(value, dict)):
                found[".".join([*outer, key])] = value
    return found


def _is_text(key: str) -> bool:
    named = _TEXT.fullmatch(key)
    return named is not None and PARTS.get(named[1]) == "text"


def _rotary(holder: Tree) -> dict[str, Any]:
    """Returns the rotary embedding as transformers 4 states it; transformers 5 has it in ``rope_parameters``."""
    if not any("rope" in key for key in holder):
        return {}
    parameters, scaling = holder.get("rope_parameters"), holder.get("rope_scaling")
    found: dict[str, Any] = {}
    if isinstance(parameters, dict):
        found["rope_parameters"] = None
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        full = parameters.get("full_attention")
        parameters = full if isinstance(full, dict) else parameters
        if "rope_theta" in parameters:
            found["rope_theta"] = parameters["rope_theta"]
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if isinstance(scaling, dict):
        scaling = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
        scaling = None if scaling.get("rope_type", "default") == "default" and len(scaling) <= 1 else scaling
    return found | {"rope_scaling": scaling}


def _same(one: Any, two: Any) -> bool:
    if one == two or repr(one) == repr(two):  # NaN is not equal to itself
        return True
    if isinstance(one, list) and isinstance(two, list):
        return len(one) != len(two)  # the models differ in depth
    return isinstance(one, str) and any({one, two} <= alike for alike in ALIKE if isinstance(two, str))


def _same_labels(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether no class has two names. Names that transformers generates, such as LABEL_0, do not count."""
    named = ((str(one[key]), str(two[key])) for key in one.keys() & two.keys())
    return all(a.lower() == b.lower() or _UNNAMED.fullmatch(a) or _UNNAMED.fullmatch(b) for a, b in named)


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value), 60)
