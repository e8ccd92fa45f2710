"""Layers of a model, read from tensor names: the text before the first ``.N.`` names the stack, N is the layer.

No list of architectures is needed. Tensors outside the layers belong either before them (embeddings) or behind them
(final norm, head). When layers are restacked, the tensors before them come from the first slice, and those behind them
from the last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_INDEX = re.compile(r"\.(\d+)\.")
_MOST_DIGITS = 6
_BEFORE = (
    r"emb(?!ed_out)|wte\b|wpe\b|rotary|relative_pe|shared\b|patch|ln_pre|layernorm_pre|pre_layrnorm|\bconv\d|"
    r"modal_projector|mm_|merger"
)


class Layer(NamedTuple):
    """The place of a tensor in a stack; its name is ``stack.number.rest``."""

    stack: str
    number: int
    rest: str


@lru_cache(maxsize=1 << 12)
def layer_of(name: str) -> Layer | None:
    """Returns the layer of a tensor, or None for a tensor outside the layers."""
    found = _INDEX.search(name)
    if found is None or len(found[1]) > _MOST_DIGITS:
        return None
    return Layer(name[: found.start()], int(found[1]), name[found.end() :])


def renumbered(name: str, number: int) -> str:
    """Returns the name with the layer number replaced."""
    return _INDEX.sub(f".{number}.", name, count=1)


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers belongs before them."""
    return re.search(_BEFORE, name) is not None


def depths(names: Iterable[str]) -> dict[str, int]:
    """Returns the number of layers of each stack."""
    return divided(names)[0]


def divided(names: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Returns the number of layers of each stack, and the names outside the layers."""
    found: dict[str, int] = {}
    outside: list[str] = []
    layer = "\0"
    for name in names:
        if name.startswith(layer):  # most names are of the same layer as the one before
            continue
        match = _INDEX.search(name)
        if match is None or len(match[1]) > _MOST_DIGITS:
            outside.append(name)
            continue
        layer, number = name[: match.end()], int(match[1])
        stack = name[: match.start()]
        if number >= found.get(stack, 0):
            found[stack] = number + 1
    return found, outside


def stacks(names: Iterable[str]) -> Counter[str]:
    """Returns the number of tensors of each stack."""
    return Counter(layer.stack for layer in map(layer_of, names) if layer)


def position(index: int, layers: int) -> float:
    """Returns the position of a layer in a gradient: 0 for the first, 1 for the last, 1 for a single one, as in
    mergekit."""
    return index / (layers - 1) if layers > 1 else 1.0
