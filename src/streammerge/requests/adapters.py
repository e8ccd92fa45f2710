"""Adapters among the inputs of a merge: each is put on the base, or all are merged to an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.globs import expand
from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import FormatError, RecipeError, StreammergeError, listed, printable
from streammerge.options.resources import Resources
from streammerge.recipe.adapted import Adapted, Part, split
from streammerge.recipe.hub_names import hub_place
from streammerge.recipe.model import Recipe
from streammerge.requests.inputs import Held
from streammerge.running.choosing import default_workers
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.tensors.adapters import WORDS, holds_its_base, is_adapter
from streammerge.tensors.dtypes import DType, parse_dtype
from streammerge.units import parse_bytes

if TYPE_CHECKING:
    from streammerge.factoring.making import Making
    from streammerge.factoring.planned import AdapterPlan

_CONFIG, _STEM = "adapter_config.json", "adapter_model."
_HEAD_BYTES = 1 << 16
_WITHOUT_MEANING = (
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "rules",
    "compute_dtype",
    "state_dict",
    "ema",
    "rename",
    "on_missing",
    "on_shape",
    "integers",
    "unsafe_truncate_embeddings",
    "allow_nonfinite",
    "quantise",
)
_OF_OUTPUTS = ("max_shard_size", "keep_optimizer", "strip_prefix", "only")
"""Keys of a recipe, and of its output, that say nothing about adapters."""


def are_adapters(names: Sequence[str], held: Held | None = None) -> bool:
    """Whether all of these models are adapters."""
    return bool(names) and all(_is_adapter(name, held or {}) for name in names)


def adapters_alone(recipe: Recipe) -> bool:
    """Whether a recipe merges adapters to an adapter: all its models are adapters, and it has no base."""
    others = recipe.slices or recipe.modules or recipe.experts or recipe.stages or recipe.base_model is not None
    return not others and are_adapters([each.model for each in recipe.models])


def combined(recipe: Recipe, out: Location | None = None, single: bool | None = None) -> Making:
    """Returns what an adapter is made of by a recipe whose models are adapters. Reads headers only.

    ``single``: whether it is one file. By default the name of the output says so, and without a name the first adapter.

    Raises RecipeError for keys that an adapter cannot follow, MismatchError for adapters that cannot be merged.
    """
    from streammerge.adapters.modules import read_adapter
    from streammerge.factoring.combination import combination
    from streammerge.factoring.making import is_file_name

    refuse_keys(recipe)
    others = replace(recipe.extract, energy=None)
    refuse_others({name: getattr(others, name) for name in ("target", "exclude", "save_modules", "alpha")})
    adapters = [read_adapter(each.model) for each in recipe.models]
    if single is None:
        single = adapters[0].config is None if out is None else is_file_name(out)
    if single and out is not None and adapters[0].config is not None:
        single = False  # the refusal of the output says what its form is
    return combination(adapters, recipe, single)


def adapter_plan(making: Making, out: Location | None, resources: Resources) -> AdapterPlan:
    """Returns the plan of an adapter, with warnings about what stands in the output's way."""
    from streammerge.factoring.planned import AdapterPlan

    if making.record is None:
        raise ValueError("an adapter without a record has no recipe to show")
    workers = resources.workers or default_workers()
    made = AdapterPlan.of(making, making.record.recipe, out, parse_bytes(resources.memory), workers)
    if out is not None:
        try:
            out.check_writable(overwrite=False)
        except RecipeError as error:
            made.warnings.append(str(error))
    return made


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
        place = parse(hub_place(name))
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


def refuse_keys(recipe: Recipe, what: str = "adapters alone", followed: Sequence[str] = ()) -> None:
    """Raises RecipeError for keys of a recipe that the adapter which it makes cannot follow. ``followed``: those that it
    can."""
    plain = Recipe(recipe.merge_method)
    told = [name for name in _WITHOUT_MEANING if getattr(recipe, name) != getattr(plain, name)]
    told += [name for name in _OF_OUTPUTS if getattr(recipe.output, name) != getattr(plain.output, name)]
    told += ["state_dict"] * any(each.state_dict for each in recipe.models)
    told += ["rename"] * any(each.rename for each in recipe.models)
    refuse_others(dict.fromkeys((name for name in told if name not in followed), True), what)


def refuse_others(given: Mapping[str, Any], what: str = "adapters alone") -> None:
    """Raises RecipeError for options that an adapter cannot follow. ``what``: how it is made, for the message."""
    named = [f"`{name}`" for name, value in given.items() if value not in (None, False, ())]
    if named:
        raise RecipeError(
            f"{listed(named)} {'has' if len(named) == 1 else 'have'} no meaning for {what}; leave "
            f"{'it' if len(named) == 1 else 'them'} out"
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
