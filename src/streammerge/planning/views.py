"""Turns the models, slices and modules of a recipe into views of the checkpoints: tensors under their output names.

A merge of whole models is one part. Each slice of stacked layers is a part whose views have renumbered layers. Each module
is one part or several. Within a part, tensors of equal names are merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY
from streammerge.recipe.fields import Problems
from streammerge.recipe.model import Model, Recipe, Reference, Slice, SliceSource
from streammerge.recipe.settings import Settings
from streammerge.sources.base import Source
from streammerge.sources.table import same_names
from streammerge.stores.base import Location
from streammerge.tensors.layers import depths, is_before, layer_of, position, renumbered, stacks
from streammerge.tensors.names import bare
from streammerge.units import counted, inflected

Indexes = Mapping[Reference, CheckpointIndex]
_NONE: Settings = {}


@dataclass(slots=True, eq=False)
class View:
    """A checkpoint's tensors by their names in the output. ``own``: the model's own parameters."""

    index: CheckpointIndex
    entries: Mapping[str, Source]
    aliases: dict[str, str]
    own: Settings = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Part:
    """Views that are merged by equal names. The first view gives names, shapes and dtypes.

    ``based``: whether one of the views is a base, and ``base`` its number. ``models``: the numbers of the views that are
    models, in the order of the recipe; the base is one of them if the method does not use a base. ``levels``: the
    parameters of slice, module and recipe. ``moved``: what :attr:`layers` tells, None if the
    layers are all of the first view's.
    """

    views: list[View]
    method: MergeMethod
    based: bool
    models: tuple[int, ...]
    levels: tuple[Settings, ...]
    moved: dict[str, tuple[int, int]] | None
    base: int = 0

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Stack -> its first layer in this part, and its number of layers."""
        if self.moved is None:  # found when it is asked for, because most merges ask for no position
            self.moved = {stack: (0, count) for stack, count in depths(self.views[0].entries).items()}
        return self.moved

    def takes_base(self, method: MergeMethod) -> bool:
        """Whether the method gets the base separately from the models."""
        return self.based and method.takes_base

    def order(self, method: MergeMethod) -> tuple[int, ...]:
        """Returns the views for a method, in its order: the base before the models, or as the first model."""
        first = self.takes_base(method) or (self.based and method.base == "model" and self.base in self.models)
        return (self.base, *(number for number in self.models if number != self.base)) if first else self.models

    def position(self, name: str) -> float:
        """Returns the position of a tensor in a layer gradient, from 0 to 1. A tensor outside the layers is at 0."""
        layer = layer_of(name)
        if layer is None or layer.stack not in self.layers:
            return 0.0
        first, count = self.layers[layer.stack]
        return position(layer.number - first, count)


@dataclass(slots=True, eq=False)
class Restacked:
    """The layers of one stack of the output. ``layers``: the checkpoint of each layer, and its number in that checkpoint.
    ``before``: the number of layers of the first checkpoint."""

    stack: str
    before: int
    layers: list[tuple[Location, int]]


@dataclass(slots=True, eq=False)
class Parts:
    """All parts. ``restacked``: the stacks whose layers were moved."""

    parts: list[Part] = field(default_factory=list)
    restacked: list[Restacked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_parts(recipe: Recipe, indexes: Indexes) -> Parts:
    """Returns the parts of a recipe. Raises RecipeError for layers or modules that the checkpoints do not have."""
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
    """Makes one part of whole models."""
    everything = bool(recipe.models)
    views = [_view(indexes[_known(recipe, indexes, m)], takes, m.parameters, everything) for m in models]
    place = next((n for n, m in enumerate(models) if recipe.base and recipe.of(m).same(recipe.base)), None)
    listed_too = place is not None
    if recipe.base is not None and place is None:
        views.append(_view(indexes[recipe.base], takes, _NONE, everything))
        place = len(views) - 1
    views, numbers, base = _giver_first(recipe, views, place)
    if recipe.base_apart(listed_too):
        numbers = [number for number in numbers if number != base]
    if not all(same_names(view.index.entries, views[0].index.entries) for view in views):
        from streammerge.checkpoints.heads import tie_head

        tie_head(views, made.notes)
    return Part(views, recipe.merge_method, place is not None, tuple(numbers), levels, None, base)


def _giver_first(recipe: Recipe, views: list[View], place: int | None) -> tuple[list[View], list[int], int]:
    """Returns the views with the one first that gives the container, the new number of each view, and that of the base.

    ``place``: the number of the base among the views, or None.
    """
    order = [number for number in range(len(views)) if number != place]
    if place is not None:
        order.insert(0 if recipe.output.container == "base" or place == 0 else 1, place)
    numbers = [order.index(number) for number in range(len(views))]
    return [views[number] for number in order], numbers, 0 if place is None else numbers[place]


def _known(recipe: Recipe, indexes: Indexes, entry: Model | SliceSource) -> Reference:
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
    """Makes a part for each slice. Its layers follow the layers of the previous slices."""
    from streammerge.checkpoints.heads import tie_head
    from streammerge.recipe.checks import raise_all

    offset, moved, problems = 0, Restacked("", 0, []), Problems()
    stacked = _Stacks(takes, first)
    for each in slices:
        for source in each.sources:
            index = indexes[_known(recipe, indexes, source)]
            _check_range(source, stacked.depth(index), problems)
    raise_all(problems, recipe.positions)
    for number, each in enumerate(slices):
        base = each.base_model or recipe.base_model
        views: list[View] = []
        place = None
        for source in each.sources:
            index = indexes[_known(recipe, indexes, source)]
            ends = (number == 0, number == len(slices) - 1)
            views.append(stacked.view(index, source, offset, ends))
            if place is None and base is not None and recipe.of(source).same(recipe.copied(base)):
                place = len(views) - 1
        start, stop = each.sources[0].layer_range
        moved.layers += [(views[0].index.path, layer) for layer in range(start, stop)]
        views, numbers, base_number = _giver_first(recipe, views, place)
        if place is not None and recipe.merge_method.takes_base:
            numbers = [n for n in numbers if n != base_number]
        tie_head(views, made.notes, wanted=first.entries if number == len(slices) - 1 else ())
        stack = stacked.of(first)
        layers = {name: (0, count) for name, count in depths(views[0].entries).items()}
        layers[stack] = (offset, stop - start)
        levels_here = (each.parameters, *levels)
        numbered = (tuple(numbers), levels_here, layers, base_number)
        made.parts.append(Part(views, recipe.merge_method, place is not None, *numbered))
        offset += stop - start
    moved.stack, moved.before = stacked.of(first), stacked.depth(first)
    made.restacked.append(moved)


class _Stacks:
    """The layers of checkpoints. Each checkpoint is looked through once, because several slices use the same one.

    All views have the names of ``first``, also those of checkpoints with another prefix before the layers.
    """

    def __init__(self, takes: Belongs, first: CheckpointIndex) -> None:
        self.takes, self.first = takes, first
        self.known: dict[int, tuple[str, dict[int, list[str]], list[str]]] = {}

    def _of(self, index: CheckpointIndex) -> tuple[str, dict[int, list[str]], list[str]]:
        """Returns the stack that slices refer to, its tensor names by layer, and the names outside it."""
        if id(index) not in self.known:
            names = [name for name in index.entries if self.takes(name)]
            stack, layers, outside = _main_stack(names, index), dict[int, list[str]](), list[str]()
            for name in names:
                layer = layer_of(name)
                if layer is not None and layer.stack == stack:
                    layers.setdefault(layer.number, []).append(name)
                else:
                    outside.append(name)
            self.known[id(index)] = stack, layers, outside
        return self.known[id(index)]

    def of(self, index: CheckpointIndex) -> str:
        return self._of(index)[0]

    def depth(self, index: CheckpointIndex) -> int:
        return max(self._of(index)[1]) + 1

    def view(self, index: CheckpointIndex, source: SliceSource, offset: int, ends: tuple[bool, bool]) -> View:
        """Returns the layers of the source, renumbered from ``offset``.

        ``ends``: whether to add the tensors before all layers, and those behind all layers.
        """
        _, layers, outside = self._of(index)
        names = {name: name for name in outside if (ends[0] if is_before(name) else ends[1])} if any(ends) else {}
        start, stop = source.layer_range
        for number in range(start, stop):
            for name in layers.get(number, ()):
                names[name] = renumbered(name, number - start + offset)
        if self.of(index) != self.of(self.first):
            names = {old: self._as_first(new, index) for old, new in names.items()}
        entries = {new: index.entries[old] for old, new in names.items()}
        aliases = {names[old]: names[first] for old, first in index.aliases.items() if old in names and first in names}
        return View(index, entries, aliases, source.parameters)

    def _as_first(self, name: str, index: CheckpointIndex) -> str:
        """Returns the name of a tensor with the prefix that the first checkpoint has before its layers."""
        theirs, ours = self.of(index), self.of(self.first)
        if name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
        before, now = theirs.split("."), ours.split(".")
        while before and now and before[-1] == now[-1]:
            before, now = before[:-1], now[:-1]
        prefix = "".join(f"{part}." for part in before)
        return "".join(f"{part}." for part in now) + name[len(prefix) :] if name.startswith(prefix) else name


def _main_stack(names: list[str], index: CheckpointIndex) -> str:
    """Returns the stack that slices refer to. Raises RecipeError if there is none, or if several are possible."""
    counted = stacks(names).most_common()
    if not counted:
        raise RecipeError(f"{printable(index.path)} has no layers (names like model.layers.0.mlp) that slices could take")
    if len(counted) > 1 and counted[1][1] * 10 > counted[0][1]:
        shown = ", ".join(f"{printable(stack)} ({count} tensors)" for stack, count in counted[:4])
        raise RecipeError(f"{printable(index.path)} has several stacks of layers: {shown}; say which with modules")
    return counted[0][0]


def _check_range(source: SliceSource, have: int, problems: Problems) -> None:
    if source.layer_range[1] > have:
        problems.add(
            (*source.path, "layer_range"),
            f"layer_range {list(source.layer_range)} reaches beyond the {have} layers of {printable(source.model)}",
        )


# ---------------------------------------------------------------------------------------------------------- modules

_MERGEKIT_MODULES = {
    "default": ("",),
    "text_decoder": ("language_model", ""),
    "vision_tower": ("visual", "vision_model"),
    "vision_model": ("visual", "vision_tower"),
    "multi_modal_projector": ("visual.merger", "visual.deepstack_merger_list", "projector"),
}
"""Module names in mergekit's definitions -> other prefixes that their tensor names may have."""


def _modules(recipe: Recipe, first: CheckpointIndex) -> list[tuple[str, str]]:
    """Returns pairs (prefix, module), the longest prefix first."""
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
    """Returns the prefixes of a module's tensor names: the module's name, or paths that end in it."""
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
    """Returns a test whether a tensor belongs to ``module``. None stands for the tensors of no module."""

    def belongs(name: str) -> bool:
        for candidate in (name, bare(name)):
            for prefix, owner in prefixes:
                if not prefix or candidate == prefix or candidate.startswith(f"{prefix}."):
                    return owner == module
        return module is None

    return belongs


def _rest(recipe: Recipe, first: CheckpointIndex, takes: Belongs, made: Parts) -> None:
    """Makes a part that copies the tensors of no module from the first checkpoint."""
    view = _view(first, takes, _NONE, everything=False)
    if view.entries:
        count = len(view.entries)
        said = f"{counted(count, 'tensor')} {inflected(count, 'belongs', 'belong')} to no module"
        made.notes.append(f"{said}, so {inflected(count, 'it is', 'they are')} copied: {listed(list(view.entries))}")
        made.parts.append(Part([view], COPY, False, (0,), (), {}))
