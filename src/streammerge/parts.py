"""What a recipe's models, slices and modules mean for these checkpoints: views of them, tensors under their output names.

A merge of whole models is one part. Each slice of stacked layers is a part, in which every source is seen with its layers
renumbered; each module is one, or several. Within a part, equal names are merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from streammerge.checkpoint import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.huggingface import tie_head
from streammerge.layers import depths, is_before, layer_of, position, stacks
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY
from streammerge.names import bare
from streammerge.recipe import Model, Recipe, Reference, Slice, Source
from streammerge.recipe.settings import Settings
from streammerge.tensors import TensorEntry

Indexes = Mapping[Reference, CheckpointIndex]
_NONE: Settings = {}


@dataclass(slots=True)
class View:
    """A checkpoint's tensors by the names that they have in the output; ``own`` are the model's own parameters."""

    index: CheckpointIndex
    entries: dict[str, TensorEntry]
    aliases: dict[str, str]
    own: Settings = field(default_factory=dict)


@dataclass(slots=True)
class Part:
    """Views that are merged by equal names, the base first where there is one.

    ``levels``: the parameters of slice, module and recipe. ``layers``: stack -> its first layer here, and how many.
    """

    views: list[View]
    method: MergeMethod
    based: bool
    levels: tuple[Settings, ...]
    layers: dict[str, tuple[int, int]]

    def position(self, name: str) -> float:
        """Where in a layer gradient a tensor is; what is outside the layers has the first value."""
        layer = layer_of(name)
        if layer is None or layer.stack not in self.layers:
            return 0.0
        first, count = self.layers[layer.stack]
        return position(layer.number - first, count)


@dataclass(slots=True)
class Restacked:
    """The layers of one stack of the output: for each, the layer it was in the first checkpoint's config."""

    stack: str
    before: int
    layers: list[int]


@dataclass(slots=True)
class Parts:
    """All parts; ``restacked`` where layers were moved."""

    parts: list[Part] = field(default_factory=list)
    restacked: list[Restacked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_parts(recipe: Recipe, indexes: Indexes) -> Parts:
    """The parts of a recipe. Raises RecipeError for layers or modules that the checkpoints do not have."""
    made = Parts()
    first = indexes[recipe.checkpoints[0]]
    if recipe.models:
        made.parts.append(_whole(recipe, indexes, recipe.models, (recipe.parameters,), made, lambda name: True))
    elif recipe.slices:
        _stack(recipe, indexes, recipe.slices, (recipe.parameters,), made, lambda name: True, first)
    else:
        belongs = _modules(recipe, first)
        for name, module in recipe.modules.items():
            levels, mine = (module.parameters, recipe.parameters), _belonging(belongs, name)
            if module.models:
                made.parts.append(_whole(recipe, indexes, module.models, levels, made, mine))
            else:
                _stack(recipe, indexes, module.slices, levels, made, mine, first)
        _rest(recipe, first, _belonging(belongs, None), made)
    return made


Belongs = Callable[[str], bool]


def _view(index: CheckpointIndex, takes: Belongs, own: Settings, everything: bool) -> View:
    if everything:
        return View(index, index.entries, index.aliases, own)
    entries = {name: entry for name, entry in index.entries.items() if takes(name)}
    aliases = {name: first for name, first in index.aliases.items() if name in entries and first in entries}
    return View(index, entries, aliases, own)


def _whole(
    recipe: Recipe, indexes: Indexes, models: tuple[Model, ...], levels: tuple[Settings, ...], made: Parts, takes: Belongs
) -> Part:
    """All layers of each model."""
    everything = bool(recipe.models)
    views = [_view(indexes[_known(recipe, indexes, m)], takes, m.parameters, everything) for m in models]
    place = next((n for n, m in enumerate(models) if recipe.base and recipe.of(m).same(recipe.base)), None)
    if recipe.base is not None:
        own = views.pop(place) if place is not None else _view(indexes[recipe.base], takes, _NONE, everything)
        views.insert(0, own)
    tie_head(views, made.notes)
    layers = {stack: (0, count) for stack, count in depths(views[0].entries).items()}
    return Part(views, recipe.merge_method, recipe.based, levels, layers)


def _known(recipe: Recipe, indexes: Indexes, entry: Model | Source) -> Reference:
    wanted = recipe.of(entry)
    return next(known for known in indexes if known.same(wanted))


# ----------------------------------------------------------------------------------------------------------- slices


def _stack(
    recipe: Recipe,
    indexes: Indexes,
    slices: tuple[Slice, ...],
    levels: tuple[Settings, ...],
    made: Parts,
    takes: Belongs,
    first: CheckpointIndex,
) -> None:
    """A part for each slice, its layers behind those of the slices before it."""
    offset, moved = 0, Restacked("", 0, [])
    for number, each in enumerate(slices):
        base = each.base_model or recipe.base_model
        views: list[View] = []
        place = None
        for source in each.sources:
            index = indexes[_known(recipe, indexes, source)]
            stack = _main_stack([n for n in index.entries if takes(n)], index)
            _check_range(recipe, source, index, stack)
            ends = (number == 0, number == len(slices) - 1)
            views.append(_renumbered(index, source, stack, offset, ends, takes))
            if place is None and base is not None and recipe.of(source).same(recipe.copied(base)):
                place = len(views) - 1
        views.insert(0, views.pop(place or 0))
        count = each.sources[0].layer_range[1] - each.sources[0].layer_range[0]
        moved.layers += range(*each.sources[0].layer_range)
        tie_head(views, made.notes, wanted=first.entries if number == len(slices) - 1 else ())
        layers = depths(views[0].entries)
        placed = {stack: (offset if stack == _stack_of(views[0]) else 0, n) for stack, n in layers.items()}
        placed[_stack_of(views[0])] = (offset, count)
        based = base is not None and recipe.merge_method.base in ("required", "optional")
        made.parts.append(Part(views, recipe.merge_method, based, (each.parameters, *levels), placed))
        offset += count
    own = [name for name in first.entries if takes(name)]
    moved.stack = _main_stack(own, first)
    moved.before = depths(own)[moved.stack]
    made.restacked.append(moved)


def _stack_of(view: View) -> str:
    return stacks(view.entries).most_common(1)[0][0]


def _main_stack(names: list[str], index: CheckpointIndex) -> str:
    """The stack whose layers a slice means; RecipeError where there is none, or it could be another one."""
    counted = stacks(names).most_common()
    if not counted:
        raise RecipeError(f"{printable(index.path)} has no layers (names like model.layers.0.mlp) that slices could take")
    if len(counted) > 1 and counted[1][1] * 10 > counted[0][1]:
        shown = ", ".join(f"{printable(stack)} ({count} tensors)" for stack, count in counted[:4])
        raise RecipeError(f"{printable(index.path)} has several stacks of layers: {shown}; say which with modules")
    return counted[0][0]


def _check_range(recipe: Recipe, source: Source, index: CheckpointIndex, stack: str) -> None:
    have = depths(index.entries)[stack]
    if source.layer_range[1] > have:
        raise RecipeError(
            f"{recipe.at((*source.path, 'layer_range'))}layer_range {list(source.layer_range)} reaches beyond the {have} "
            f"layers of {printable(source.model)}"
        )


def _renumbered(
    index: CheckpointIndex, source: Source, stack: str, offset: int, ends: tuple[bool, bool], takes: Belongs
) -> View:
    """The layers of the source, counted from ``offset``; ``ends``: with what stands before, and behind, all layers."""
    start, stop = source.layer_range
    names: dict[str, str] = {}
    for name in index.entries:
        layer = layer_of(name)
        if not takes(name):
            continue
        if layer is None or layer.stack != stack:
            if ends[0] if is_before(name) else ends[1]:
                names[name] = name
        elif start <= layer.number < stop:
            names[name] = layer.name_at(layer.number - start + offset)
    entries = {new: index.entries[old] for old, new in names.items()}
    aliases = {names[old]: names[first] for old, first in index.aliases.items() if old in names and first in names}
    return View(index, entries, aliases, source.parameters)


# ---------------------------------------------------------------------------------------------------------- modules

_MERGEKIT_MODULES = {
    "default": ("",),
    "text_decoder": ("language_model", ""),
    "vision_tower": ("visual", "vision_model"),
    "vision_model": ("visual", "vision_tower"),
    "multi_modal_projector": ("visual.merger", "visual.deepstack_merger_list", "projector"),
}
"""The names of modules in mergekit's definitions, and what their tensors' names begin with where not with that name."""


def _modules(recipe: Recipe, first: CheckpointIndex) -> list[tuple[str, str]]:
    """(prefix, module), the longest prefixes first."""
    found: list[tuple[str, str]] = []
    names = list(first.entries)
    for name, module in recipe.modules.items():
        prefixes = _prefixes(name, names) or next(
            filter(None, (_prefixes(other, names) for other in _MERGEKIT_MODULES.get(name, ()))), []
        )
        if name == "multi_modal_projector" and not any(name in p for p in prefixes):
            prefixes = [p for other in _MERGEKIT_MODULES[name] for p in _prefixes(other, names)]
        if not prefixes:
            tops = sorted({n.partition(".")[0] for n in names})
            where = recipe.at(module.path)
            raise RecipeError(
                f"{where}no tensor of {printable(first.path)} belongs to a module {printable(name)}; names begin with "
                f"{listed(tops)}"
            )
        found += [(prefix, name) for prefix in prefixes]
    return sorted(found, key=lambda pair: -len(pair[0]))


def _prefixes(name: str, names: list[str]) -> list[str]:
    """What names begin with that belong to a module of this name: the name itself, or a path that ends in it."""
    if not name:
        return [""]
    wanted = name.removesuffix(".")
    if any(n.startswith(f"{wanted}.") or n == wanted for n in names):
        return [wanted]
    ended = re.compile(rf"^((?:[^.]+\.)*?{re.escape(wanted)})\.")
    found = {match[1] for match in map(ended.match, names) if match}
    if len(found) > 1:
        raise RecipeError(f"a module {printable(name)} could be any of {listed(sorted(found))}; give the whole prefix")
    return sorted(found)


def _belonging(prefixes: list[tuple[str, str]], module: str | None) -> Belongs:
    """Whether a tensor belongs to the module, to none for None."""

    def belongs(name: str) -> bool:
        for candidate in (name, bare(name)):
            for prefix, owner in prefixes:
                if not prefix or candidate == prefix or candidate.startswith(f"{prefix}."):
                    return owner == module
        return module is None

    return belongs


def _rest(recipe: Recipe, first: CheckpointIndex, takes: Belongs, made: Parts) -> None:
    """Tensors of no module are kept as the first checkpoint has them."""
    view = _view(first, takes, _NONE, everything=False)
    if view.entries:
        made.notes.append(f"{len(view.entries)} tensors belong to no module and are copied: {listed(list(view.entries))}")
        made.parts.append(Part([view], COPY, False, (), {}))
