"""What in a checkpoint is the state or a record of the training, by its key and its content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from streammerge.pickles.tree import FieldName

# Patterns are text: compiling them takes longer than reading a safetensors file, which needs none.
_NOT_WEIGHTS = (
    r"(?i)(.*_)?(optim(izer)?s?|opt|(lr_)?sched(uler)?s?|(grad_)?scalers?|amp)(_\w+)?"
    r"|(.*_)?(rng|random)(_?states?)?(_\w+)?|extra_state|criterion|(.*_)?loss(es)?|callbacks|loops|(.*_)?metrics?|logging|message_hub"
    r"|sampler|hyper_parameters|hparams|history|args|cfg|config|(.*_)?stats"
)
_RECORDS = (
    r"(?i)(.*_)?(rng|random)(_?states?)?(_\w+)?|callbacks|loops|(.*_)?metrics?|logging|message_hub|sampler|history"
    r"|args|cfg|config"
)
_STALE = (
    r"(?i)(.*_)?optim(izer)?s?(?!_history)(_\w+)?|(lr_|opt_param_|param_)?sched(uler)?s?(_(states?|state_dict|g|d|disc|gen))?"
    r"|(grad|amp)_scaler(_state(_dict)?)?"
)
_MASTERS = (
    r"fp32_groups(_flat)?|fp32_from_(fp16|float16)(_params|_groups)?|single_partition_of_fp32_groups|fp32_flat_groups"
)
"""The keys of an optimizer's copies of 16-bit weights in float32: DeepSpeed's, Megatron's, apex'."""
_DEEPEST = 4
_DATA_STATISTICS = r"(?i)(.*_)?stats"
_LOSS_SCALER_KEYS = {"scale", "growth_factor", "loss_scale", "loss_scaler0"}
_STATES = ({"growth_factor", "growth_interval"}, {"loss_scaler0"}, {"last_epoch", "_step_count"})
"""The keys by which the state of torch's GradScaler, of apex and of torch's schedulers is known."""


def is_training_state(key: Any, value: Any) -> bool:
    """Whether a key holds optimizer, scheduler or scaler state, which is stale after weights are merged.

    Some words are ambiguous, so their content decides. ``opt`` may be an optimizer's state or the options of a command
    line. ``scaler`` may belong to mixed precision, or to the data, which the model needs. fairseq cannot load a file
    without its ``optimizer_history``. What has the content of such a state is one under any key, and at any place of a
    tuple.
    """
    if is_optimizer_state(value) or (isinstance(value, dict) and any(known <= value.keys() for known in _STATES)):
        return True
    if not isinstance(key, str):
        return False
    if key.lower() in ("scaler", "scaler_state", "scaler_state_dict", "amp"):
        return isinstance(value, dict) and (not value or not _LOSS_SCALER_KEYS.isdisjoint(value))
    return re.fullmatch(_STALE, key) is not None


def states_elsewhere(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
    """Yields (path, holder, key, value) of the states that are known by their content, in plain dicts below a node, such as
    ``trainer.optimizer``. Records of a run are not entered: Lightning's ``loops`` count the steps of an optimizer."""
    for key, value in node.items() if isinstance(node, dict) and len(path) < _DEEPEST else ():
        if not isinstance(value, dict) or is_record(key):
            continue
        if is_training_state(None, value):
            yield (*path, key), node, key, value
        else:
            yield from states_elsewhere(value, (*path, key))


def masters_in(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of an optimizer's copies of 16-bit weights in float32, in plain dicts below a node. A trainer that
    loads them overwrites the weights."""
    for key, value in node.items() if isinstance(node, dict) and len(path) < _DEEPEST else ():
        if isinstance(key, str) and value and re.fullmatch(_MASTERS, key):
            yield (*path, key)
        else:
            yield from masters_in(value, (*path, key))


def bars(key: Any) -> bool:
    """Whether no weights lie below a key: state of the training, settings, measurements."""
    return isinstance(key, str) and not isinstance(key, FieldName) and re.fullmatch(_NOT_WEIGHTS, key) is not None


def is_record(key: Any) -> bool:
    """Whether a key holds records of one run: measurements, random states, settings. They are not merged."""
    return isinstance(key, str) and not isinstance(key, FieldName) and re.fullmatch(_RECORDS, key) is not None


def is_measurement(key: Any) -> bool:
    """Whether single numbers below a key are measurements of one run, such as losses. Statistics of the data are not."""
    return bars(key) and re.fullmatch(_DATA_STATISTICS, key) is None


def is_optimizer_state(node: Any) -> bool:
    return isinstance(node, dict) and "param_groups" in node
