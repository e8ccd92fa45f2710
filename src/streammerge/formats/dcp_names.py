"""What the names of a distributed checkpoint's entries tell: which are an optimizer's, and which state dict was saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from streammerge.errors import FormatError, printable
from streammerge.formats.dcp_metadata import Entry
from streammerge.pickles.tree import TensorRef
from streammerge.tensors.dtypes import DType

_OPTIMIZER = re.compile(r"(?i)((.*_)?optim(izer)?s?|chained)(_\d+|_states?|_state_dict)?")
_FLAT_OPTIMIZER = re.compile(
    r"state\..+\.(exp_avg|exp_avg_sq|max_exp_avg_sq|step|momentum_buffer|square_avg|sum)|param_groups\..+"
)
_TRAINING = re.compile(r"train_state|dataloader|lr_schedulers?")
"""What torchtitan saves beside the weights: counters, which older versions store as tensors."""
_MASTER = re.compile(r"(?:.*?\.)?(?:fp32_param|master_param|param)\.(.+)")
_MASTER_OF_STATE = re.compile(r"(?:.*\.)?state\.(?:fp32_param|master_param|param)\.(.+)")


def is_optimizer_item(name: str, path: tuple[Any, ...]) -> bool:
    """Whether an entry belongs to the state of an optimizer, by its name and the keys that lead to it."""
    keys = [*path[:-1]] if len(path) > 1 else name.split(".", 2)[:-1]
    return any(isinstance(key, str) and _OPTIMIZER.fullmatch(key) for key in keys[:3]) or (
        _FLAT_OPTIMIZER.fullmatch(name) is not None
    )


def is_beside_weights(name: str, path: tuple[Any, ...]) -> bool:
    """Whether an entry belongs to the state of an optimizer or of the training."""
    first = path[0] if len(path) > 1 else name.partition(".")[0]
    return is_optimizer_item(name, path) or _TRAINING.fullmatch(str(first)) is not None


def weight_of_master(name: str, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns the weight of which an optimizer's entry is the copy in float32, by its name in Megatron
    (``optimizer.state.param.WEIGHT``). None for any other entry. ``shapes``: those of the weights."""
    found = _MASTER.fullmatch(name) if entry.dtype is DType.F32 else None
    while found is not None:  # "param" may be a part of a weight's name too
        if shapes.get(found[1]) == entry.shape:
            return found[1]
        found = _MASTER.fullmatch(found[1])
    return None


def is_cut_master(name: str, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an optimizer's entry is the copy in float32 of a weight that has another shape, since each rank's part of it
    is flat. ``shapes``: those of the weights."""
    found = _MASTER_OF_STATE.fullmatch(name) if entry.dtype is DType.F32 else None
    return found is not None and shapes.get(found[1], entry.shape) != entry.shape


def nested(refs: Mapping[str, TensorRef], paths: Mapping[str, tuple[Any, ...]]) -> dict[Any, Any]:
    """Returns the tensors as the state dict that was saved. Without paths, a prefix that all share is taken off."""
    tops = {name.partition(".")[0] for name in refs}
    prefixed = not paths and len(tops) == 1 and tops <= {"model", "state_dict"} and all("." in name for name in refs)
    tree: dict[Any, Any] = {}
    for name, ref in refs.items():
        path = paths.get(name) or (tuple(name.split(".", 1)) if prefixed else (name,))
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or path[-1] in node:
            node, path = tree, (name,)
        if path[-1] in node:
            raise FormatError(f"the name {printable(name)} stands for two entries of a distributed checkpoint")
        node[path[-1]] = ref
    return tree
