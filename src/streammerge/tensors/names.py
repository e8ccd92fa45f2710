"""One name for each tensor, whatever wrapped the model and however its parts are spelled.

Trainers wrap models, and the wrapper's name stands in each tensor's: ``module.`` (DataParallel), ``_orig_mod.``
(torch.compile) and so on. Some parts of a model have an old and a new spelling. Both are listed in
:mod:`streammerge.tensors.conventions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from streammerge.tensors.conventions import AVERAGED, COUNTERS, IGNORED, LEADING_WRAPPERS, SPELLINGS, WRAPPERS

_LEADING = (*WRAPPERS, *LEADING_WRAPPERS)
_LED = re.compile("|".join(map(re.escape, _LEADING)))  # most names have no such part
_SPELLED = re.compile(r"\.(gamma|beta)$|\.parametrizations\.")


def bare(name: str) -> str:
    """The name without the wrapper parts that say nothing about what the tensor is."""
    if _LED.search(name) is None:
        return name
    for part in WRAPPERS:
        while "." + part in name:
            name = name.replace("." + part, ".")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _LEADING:
            if name.startswith(prefix) and len(name) > len(prefix):
                name, stripped = name[len(prefix) :], True
    return name


@cache
def _spellings() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), other) for pattern, other, _ in SPELLINGS]


def spelled(name: str) -> str:
    """The bare name in one spelling."""
    name = bare(name)
    for pattern, other in _spellings() if _SPELLED.search(name) else ():
        name = pattern.sub(other, name)
    return name


@cache
def _ignored() -> list[tuple[re.Pattern[str], str, str]]:
    return [(re.compile(pattern), condition, reason) for pattern, condition, reason in IGNORED]


def why_ignored(name: str, shape: tuple[int, ...]) -> str:
    """Describes a tensor that loaders drop or compute again. Returns "" for any other tensor."""
    name = bare(name)
    for pattern, condition, reason in _ignored():
        if pattern.search(name) and (not condition or _is_mask(shape)):
            return reason
    return ""


def _is_mask(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def is_counter(name: str) -> bool:
    """Whether a tensor counts the steps of the training."""
    return name.rpartition(".")[2] in COUNTERS


def is_state(name: str) -> bool:
    """Whether a tensor is a state in a module's own form (``get_extra_state`` of torch), mostly the bytes of a pickle."""
    return name.rpartition(".")[2] == _STATE


_STATE = "_extra_state"
_FIRST_LAYER_ONLY = ".relative_attention_bias.weight"


def why_optional(name: str, shape: tuple[int, ...]) -> str:
    """Describes a tensor that a checkpoint of the same model may lack. Returns "" for any other tensor."""
    if shape in ((), (1,)) and is_counter(name):
        return "counters of the training"
    if 0 in shape:
        return "marks without numbers, whose names alone tell a loader something"
    if name.endswith(_FIRST_LAYER_ONLY):
        return "biases that only the first layer of a stack has"
    return why_ignored(name, shape)


def copies_among(names: Iterable[str]) -> dict[str, list[str]]:
    """Finds running averages. Returns the first part of their names -> these names, if the tensors that are averaged
    exist too.

    Stable Diffusion has ``model_ema.diffusion_modelouta`` beside ``model.diffusion_model.out.a``; other programs have
    ``ema_model.`` beside ``online_model.``, or ``teacher.`` beside ``student.``.
    """
    averages, plain = dict[str, list[str]](), set[str]()
    for name in names:
        top, dot, rest = name.partition(".")
        if dot and re.fullmatch(AVERAGED, top):
            averages.setdefault(top, []).append(name)
        else:
            plain.update((name.replace(".", ""), rest.replace(".", "")))
    return {top: own for top, own in averages.items() if 2 * sum(_ending(name) in plain for name in own) >= len(own)}


def _ending(name: str) -> str:
    return bare(name.partition(".")[2]).replace(".", "")
