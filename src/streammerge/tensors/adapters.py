"""Recognition of adapters by the names of their tensors: factors, whose products are updates of a model's weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from streammerge.tensors.conventions import FACTORS

WORDS = ("lora", "dora_scale", "hada_", "lokr_", "oft_", "vera_", "lycoris_")
_ALPHA = ".alpha"
_AT_ONCE = 4096


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), kind) for pattern, kind in FACTORS]


def factors(names: Iterable[str]) -> dict[str, str]:
    """Returns the factors among these names with the kind of adapter, and the alphas that scale factors."""
    names = list(names)
    for start in range(0, len(names), _AT_ONCE):
        text = "\n".join(names[start : start + _AT_ONCE])
        if any(word in text for word in WORDS):  # faster than a pattern, and most checkpoints have none
            break
    else:
        return {}
    found, stems = dict[str, str](), dict[str, str]()
    for name in filter(re.compile("|".join(WORDS)).search, names):
        for pattern, kind in _patterns():
            if match := pattern.search(name):
                found[name] = stems[name[: match.start()]] = kind
                break
    for name in names:
        stem = name.removesuffix(_ALPHA)
        if stem in stems and stem != name:
            found[name] = stems[stem]
    return found


def is_adapter(names: Iterable[str]) -> bool:
    """Whether most of a checkpoint's tensors are factors."""
    names = list(names)
    return bool(names) and 2 * len(factors(names)) > len(names)


def holds_its_base(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a model that PEFT has put an adapter into, and not those of an adapter alone."""
    return any(name.endswith(".base_layer.weight") for name in names)
