"""The experts of a mixture of experts, as mergekit-moe's configurations have them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from streammerge.errors import RecipeError
from streammerge.recipe.fields import TEXT, ListOf, Path, Plain, key
from streammerge.recipe.scalars import MODEL

GATES = ("random", "uniform_random", "cheap_embed")
HIDDEN = ("hidden", "hidden_avg", "hidden_last")
ARCHITECTURES = ("mixtral", "qwen2", "qwen3", "deepseek")
_CALLED = {"qwen": "qwen2", "qwen moe": "qwen2", "qwen3 moe": "qwen3", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}


def _number(value: Any) -> float:
    read = float(value)
    if isinstance(value, bool) or not math.isfinite(read):
        raise ValueError(value)
    return read


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(value)
    return value


def _gate(value: Any) -> str:
    if value not in (*GATES, *HIDDEN):
        raise ValueError(value)
    return str(value)


def _architecture(value: Any) -> str:
    text = str(value).lower()
    text = _CALLED.get(text, text)
    found = next((name for name in ARCHITECTURES if name.startswith(text)), None) if text else None
    if found is None:
        raise RecipeError(f"architecture takes one of {', '.join(ARCHITECTURES)}, not {value}")
    return found


_NUMBER = Plain("a number", _number, {"type": "number"})
COUNT = Plain("a positive whole number", _count, {"type": "integer", "minimum": 1})
GATE = Plain(f"one of {', '.join((*GATES, *HIDDEN))}", _gate, {"enum": [*GATES, *HIDDEN]})
ARCHITECTURE = Plain(f"one of {', '.join(ARCHITECTURES)}", _architecture, {"type": "string"})


@dataclass(frozen=True)
class Expert:
    """One expert: the model whose MLPs it has."""

    IGNORED: ClassVar[dict[str, str]] = {}

    source_model: str = key(MODEL, "Path of a folder.")
    positive_prompts: tuple[str, ...] = key(
        ListOf(TEXT, least=0), "Texts for which a gate of cheap_embed chooses the expert.", default=()
    )
    negative_prompts: tuple[str, ...] = key(ListOf(TEXT, least=0), "Texts for which it does not.", default=())
    noise_scale: float | None = key(_NUMBER, "Deviation of random numbers that are added to its MLPs.", default=None)
    residual_scale: float | None = key(_NUMBER, "What its down projection is multiplied by.", default=None)
    path: Path = field(default=(), compare=False, repr=False)
