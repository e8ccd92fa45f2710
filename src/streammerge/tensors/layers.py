"""Layers, by the names of tensors: what stands before the first ``.N.`` is the stack, N the layer.

No list of architectures is needed. Tensors outside the layers belong before them (embeddings) or behind them (final norm,
head); where layers are restacked, the former come from the first slice and the latter from the last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_INDEX = re.compile(r"\.(\d+)\.")
_BEFORE = re.compile(
    r"emb(?!ed_out)|wte\b|wpe\b|rotary|relative_pe|shared\b|patch|ln_pre|layernorm_pre|pre_layrnorm|\bconv\d|"
    r"modal_projector|mm_|merger"
)


class Layer(NamedTuple):
    """Where in a stack a tensor stands: ``stack.number.rest`` is its name."""

    stack: str
    number: int
    rest: str


@lru_cache(maxsize=1 << 18)
def layer_of(name: str) -> Layer | None:
    """The layer of a tensor; None for one outside the layers."""
    found = _INDEX.search(name)
    if found is None or len(found[1]) > 6:
        return None
    return Layer(name[: found.start()], int(found[1]), name[found.end() :])


def renumbered(name: str, number: int) -> str:
    """The name with another layer's number."""
    return _INDEX.sub(f".{number}.", name, count=1)


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers belongs before them."""
    return _BEFORE.search(name) is not None


def depths(names: Iterable[str]) -> dict[str, int]:
    """Stack -> number of its layers."""
    found: dict[str, int] = {}
    for layer in filter(None, map(layer_of, names)):
        found[layer.stack] = max(found.get(layer.stack, 0), layer.number + 1)
    return found


def stacks(names: Iterable[str]) -> Counter[str]:
    """Stack -> number of its tensors."""
    return Counter(layer.stack for layer in map(layer_of, names) if layer)


def position(index: int, layers: int) -> float:
    """Where in a gradient a layer is: 0 for the first, 1 for the last, and 1 where there is one only, as in mergekit."""
    return index / (layers - 1) if layers > 1 else 1.0
