"""Adapters among the inputs of a merge: each is put on the base, or all are merged to an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.globs import expand
from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import FormatError, RecipeError, StreammergeError, listed, printable
from streammerge.recipe.adapted import Adapted, Part, split
from streammerge.requests.inputs import Held
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.tensors.adapters import WORDS, holds_its_base, is_adapter
from streammerge.tensors.dtypes import DType, parse_dtype

if TYPE_CHECKING:
    from streammerge.adapters.modules import Adapter

WAYS = ("cat", "svd")
"""Methods that make an adapter of adapters."""
_CONFIG, _STEM = "adapter_config.json", "adapter_model."
_HEAD_BYTES = 1 << 16


def adapters_of(names: Sequence[str], held: Held) -> list[Adapter]:
    """Returns the adapters among these inputs. Raises MismatchError for an adapter that cannot be merged."""
    found = [name for name in names if _is_adapter(name, held)]
    if not found:
        return []
    from streammerge.adapters.modules import read_adapter

    return [read_adapter(name) for name in found]


def begins_with_adapter(names: Sequence[str], held: Held) -> bool:
    """Whether the first input, or the first match of a glob there, is an adapter."""
    try:
        first = list(names[:1]) if not names or names[0] in held else expand([names[0]])[:1]
    except (StreammergeError, OSError):
        return False  # the merge itself tells what is wrong
    return any(_is_adapter(name, held) for name in first)


def on_base(names: Sequence[str], base: str | None, held: Held) -> list[str]:
    """Returns the inputs, with each adapter on its base, if the first is an adapter and there is a base."""
    if base is None or not names or not _is_adapter(names[0], held):
        return list(names)
    return [str(Adapted(base, (Part(name),))) if _is_adapter(name, held) else name for name in names]


def _is_adapter(name: str, held: Held) -> bool:
    """Whether a path leads to an adapter. Reads little of a file that is none."""
    if name in held or split(name) is not None:
        return False
    try:
        place = parse(name)
        if place.is_folder():
            return (place / _CONFIG).is_file() and open_checkpoint(place).files[0].name.startswith(_STEM)
        names = open_checkpoint(place).entries if _speaks_of_factors(place) else ()
        return is_adapter(names) and not holds_its_base(names)
    except (StreammergeError, OSError, ValueError, IndexError):
        return False  # the merge itself tells what is wrong


def _speaks_of_factors(place: Location) -> bool:
    """Whether the begin of a file has words that stand in the names of factors."""
    try:
        head = place.read(0, min(place.size, _HEAD_BYTES))
    except FormatError:
        return False
    return any(word.encode() in head for word in WORDS)


def refuse_others(given: Mapping[str, Any]) -> None:
    """Raises RecipeError for options that an adapter cannot follow."""
    named = [f"`{name}`" for name, value in given.items() if value not in (None, False)]
    if named:
        raise RecipeError(
            f"{listed(named)} {'has' if len(named) == 1 else 'have'} no meaning for adapters alone; leave it out"
        )


def float_dtype(given: object) -> DType:
    """Returns a floating-point dtype. Raises RecipeError for anything else."""
    try:
        found = parse_dtype(given)
    except (RecipeError, ValueError, TypeError) as error:
        raise RecipeError(f"`dtype` takes a floating-point dtype, like float16, not {printable(given, 60)}") from error
    if found.kind != "float" or found.element_bytes < 2:
        raise RecipeError(f"`dtype` takes a floating-point dtype of 16 bits or more, not {found.torch_name}")
    return found
