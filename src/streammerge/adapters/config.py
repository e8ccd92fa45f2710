"""PEFT's configuration of an adapter: the rank and the scale of each module, and what cannot be merged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streammerge.adapters.dialects import LOST_INITS, NEEDED, PLAIN_INITS, REFUSED, TOLD, TRAINING
from streammerge.errors import FormatError, MismatchError, printable
from streammerge.stores.base import Location

CONFIG = "adapter_config.json"
TYPES = ("LORA", "LOHA", "LOKR", "IA3", "TRAINABLE_TOKENS")
_MOST_BYTES = 16 << 20
_CHANGING = ("pissa", "olora")
_CONVERT = (
    "save it in PEFT with `save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)`, which makes it an "
    "ordinary LoRA"
)


@dataclass(frozen=True, slots=True)
class Config:
    """What a configuration says about the numbers. ``where``: its file, for messages. ``init``: an initialisation that
    changed the base when it was loaded, "" for all others.

    ``r`` and ``alpha``: for modules that no pattern names. ``targets``: the parameters that the adapter targets, in order.
    ``saved``: the modules that it brings whole. ``tokens``: the ends of modules' names -> the numbers of their trained
    rows; "" is the input embedding. ``everywhere``: the ends of the names of all modules that an IA3 adapter changes, if
    its configuration lists them. ``ties``: whether a head that was tied to embeddings stayed so, if one of them is whole.
    ``task``: what the model was trained for, as PEFT calls it.
    """

    where: str
    kind: str = "LORA"
    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    dora: bool = False
    lora_bias: bool = False
    init: str = ""
    targets: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    feedforward: str | tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    everywhere: tuple[str, ...] = ()
    ties: bool = False
    task: str = ""

    def rank(self, module: str) -> int:
        """Returns the rank of a module's factors."""
        return int(_picked(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Returns the number that a module's product is multiplied by."""
        rank, alpha = self.rank(module), float(_picked(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def is_feedforward(self, module: str) -> bool:
        """Whether IA3 multiplies the inputs of this module instead of its outputs."""
        if isinstance(self.feedforward, str):
            return re.fullmatch(self.feedforward, module) is not None
        return any(module == each or module.endswith(f".{each}") for each in self.feedforward)


def _picked(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name, in the order of the file."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            if pattern == module:
                return value
    return default


def read_config(folder: Location) -> Config | None:
    """Returns the configuration in a folder; None where there is none. Raises FormatError and MismatchError."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    where = printable(path)
    if path.size > _MOST_BYTES:
        raise FormatError(f"{where} cannot be read (it is larger than {_MOST_BYTES >> 20} MiB)")
    try:
        tree = json.loads(path.read(0, path.size).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read ({printable(error)})") from error
    if not isinstance(tree, dict):
        raise FormatError(f"{where} cannot be read (it is no mapping)")
    return config_of(tree, where)


def config_of(tree: Mapping[str, Any], where: str) -> Config:
    """Returns the configuration that a mapping states. Raises FormatError for values of other kinds, and MismatchError for
    an adapter that cannot be merged into weights."""
    kind = str(tree.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in TYPES:
        raise MismatchError(
            f"{where}: an adapter of the kind {printable(kind)} cannot be merged; known are {', '.join(TYPES)}"
        )
    for key, why in REFUSED.items():
        if tree.get(key):
            raise MismatchError(f"{where}: {key} is set, and {why}; merge it with the program that made it")
    for key, value in tree.items():
        if key not in NEEDED | TOLD | TRAINING and key not in REFUSED and value not in (None, False, "", 0, [], {}):
            raise MismatchError(
                f"{where}: {printable(key)} is set, and what it does to the numbers is not known; merge it with the "
                "program that made it"
            )
    take = _Values(tree, where)
    targets = tree.get("target_parameters") or ()
    if not isinstance(targets, list | tuple) or not all(isinstance(each, str) for each in targets):
        raise FormatError(f"{where}: target_parameters takes a list of names")
    feedforward = tree.get("feedforward_modules") or ()
    return Config(
        where,
        kind,
        int(take.number("r", 8, least=1)),
        take.number("lora_alpha" if kind == "LORA" else "alpha", 8),
        take.truth("use_rslora"),
        {name: int(value) for name, value in take.numbers("rank_pattern", least=1).items()},
        take.numbers("alpha_pattern"),
        take.truth("fan_in_fan_out"),
        take.truth("use_dora"),
        take.truth("lora_bias"),
        _init(tree, where) if kind == "LORA" else "",
        tuple(targets),
        _tokens(tree, where),
        feedforward if isinstance(feedforward, str) else tuple(map(str, feedforward)),
        tuple(map(str, _list(tree, "modules_to_save"))),
        tuple(f".{end}" for end in _list(tree, "target_modules")) if _is_whole(tree, kind) else (),
        take.truth("ensure_weight_tying"),
        str(tree.get("task_type") or "").rpartition(".")[2],
    )


def _list(tree: Mapping[str, Any], key: str) -> list[Any]:
    found = tree.get(key)
    return found if isinstance(found, list) else []


def _is_whole(tree: Mapping[str, Any], kind: str) -> bool:
    """Whether an adapter changes every module that has a name of its list. Updates that are zero may be left out of others
    than IA3."""
    return kind == "IA3" and not tree.get("exclude_modules") and tree.get("layers_to_transform") is None


def _init(tree: Mapping[str, Any], where: str) -> str:
    """Returns an initialisation that changed the base and can be done again; "" if the base is as it was."""
    init = tree.get("init_lora_weights", True)
    if isinstance(init, bool) or init is None or str(init).lower() in PLAIN_INITS:
        return ""
    named = str(init).lower()
    if named in _CHANGING:
        return named
    why = next((why for start, why in LOST_INITS.items() if named.startswith(start)), "it is not known")
    raise MismatchError(f"{where}: the adapter was initialised by {printable(init)}, and {why}; {_CONVERT}")


def _tokens(tree: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    given = tree.get("trainable_token_indices")
    if given is None and tree.get("token_indices") is not None:  # an adapter of trainable tokens only
        given = tree["token_indices"]
    found = given if isinstance(given, dict) else {"": given} if given else {}
    try:
        return {str(name): tuple(int(each) for each in rows) for name, rows in found.items()}
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: trainable_token_indices takes the numbers of rows") from error


class _Values:
    """Values of a configuration, checked."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self.tree, self.where = tree, where

    def number(self, key: str, default: float, least: float = -math.inf) -> float:
        return self._checked(key, self.tree[key], least) if key in self.tree else default

    def numbers(self, key: str, least: float = -math.inf) -> dict[str, float]:
        value = self.tree.get(key) or {}
        if not isinstance(value, dict):
            raise FormatError(f"{self.where}: {key} takes patterns of names with numbers")
        return {str(name): self._checked(key, each, least) for name, each in value.items()}

    def truth(self, key: str) -> bool:
        value = self.tree.get(key)
        if value not in (None, True, False):
            raise FormatError(f"{self.where}: {key} takes true or false, not {printable(value, 60)}")
        return bool(value)

    def _checked(self, key: str, value: Any, least: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise FormatError(f"{self.where}: {key} takes a number, not {printable(value, 60)}")
        return float(value)
