"""The merges of a sweep: lists of weights, grids of parameters, random draws, and averages of a run's last checkpoints."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from typing import Any

from streammerge.checkpoints.numbers import in_order, number_of
from streammerge.errors import RecipeError, listed, printable
from streammerge.recipe.model import Recipe
from streammerge.recipe.varying import varied

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER}):({_NUMBER})(?::({_NUMBER}))?\s*")
_WHOLE_RANGE = re.compile(r"\s*(\d+)(?::(\d+)(?::(\d+))?)?\s*")
_PLACES = 4
"""Decimal places of drawn numbers, so that a name says the whole number."""
_MOST_NAME = 100
_MOST_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Point:
    """One merge of a sweep. ``settings``: what is special about it, as texts. ``inputs``: those that it takes, None for
    all. ``arguments``: the arguments of :func:`streammerge.merge` that it has beside those of the sweep."""

    settings: dict[str, str]
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] | None = None

    def varied(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with the parameters and weights of this merge. Raises RecipeError."""
        return varied(recipe, self.arguments.get("weights"), self.arguments["parameters"])

    @property
    def name(self) -> str:
        """A file name that says the settings."""
        texts = (f"{name}_{value.replace(',', '_')}" for name, value in self.settings.items())
        whole = re.sub(r"[^\w.+=-]", "_", "-".join(texts)) or "merged"
        if len(whole) <= _MOST_NAME:
            return whole
        return f"{whole[:_MOST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class Space:
    """What a sweep varies.

    ``weights``: lists of one weight per input. ``axes``: parameter -> its values. ``spans``: parameter -> (least, most) of
    numbers that are drawn. ``fixed``: parameter -> its one value. ``draws``: how many points are drawn with ``seed``.
    ``epochs`` and ``averages``: numbers of the last checkpoint, and how many are averaged. ``names``: of all parameters, in
    their order.
    """

    weights: Sequence[Sequence[float]] = ()
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    draws: int = 0
    seed: int = 0
    epochs: Sequence[int] = ()
    averages: Sequence[int] = ()
    names: Sequence[str] = ()


def space_of(parameters: Mapping[str, Any], **more: Any) -> Space:
    """Returns what these parameters vary. A text ``0.2:0.8:0.1`` or a list is an axis, ``0.2:0.8`` is a span; all else is
    fixed. Raises RecipeError."""
    axes, spans, fixed = dict[str, Sequence[Any]](), dict[str, tuple[float, float]](), dict[str, Any]()
    for name, value in parameters.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        found = _RANGE.fullmatch(values[0]) if len(values) == 1 and isinstance(values[0], str) else None
        if found and found[3] is None:
            spans[name] = _span(name, found)
        elif found:
            axes[name] = _steps(name, found)
        elif isinstance(value, list | tuple):
            axes[name] = values
        else:
            fixed[name] = value
    return Space(axes=axes, spans=spans, fixed=fixed, names=tuple(parameters), **more)


def _span(name: str, found: re.Match[str]) -> tuple[float, float]:
    low, high = float(found[1]), float(found[2])
    if not low <= high:
        raise RecipeError(f"{printable(name)}={printable(found[0])} is no range; write the smaller number first")
    return low, high


def _steps(name: str, found: re.Match[str]) -> list[str]:
    """Returns the numbers of a range as texts, in decimal steps, the last one included."""
    start, stop, step = (Decimal(found[number]) for number in (1, 2, 3))
    if step <= 0 or start > stop:
        raise RecipeError(f"{printable(name)}={printable(found[0])} is no range; write FROM:TO:STEP, like 0.2:0.8:0.1")
    count = int((stop - start) / step) + 1
    if count > _MOST_POINTS:
        raise RecipeError(
            f"{printable(name)}={printable(found[0])} has {count:,} values, and a sweep at most {_MOST_POINTS:,}"
        )
    return [format((start + n * step).normalize(), "f") for n in range(count)]


def whole_numbers(option: str, text: str) -> list[int]:
    """Reads ``5``, ``1:5`` or ``10:50:10``, both ends included. Raises RecipeError for anything else."""
    found = _WHOLE_RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    step = int(found[3] or 1) if found else 1
    if not found or last < first or step < 1 or last - first > _MOST_POINTS * step:
        raise RecipeError(f"`{option}` takes a number or a range, like 1:5, not {printable(text)}")
    return list(range(first, last + 1, step))


def points_of(space: Space, inputs: Sequence[str]) -> list[Point]:
    """Returns the points of a sweep over these inputs. Raises RecipeError for a space that holds none, or too many."""
    if space.epochs or space.averages:
        made = list(_averages(space, inputs))
    elif space.draws:
        made = list(_drawn(space, len(inputs)))
    else:
        if space.spans:
            raise RecipeError(
                f"{listed(list(space.spans))} has a range without a step; write FROM:TO:STEP, or pass `random`"
            )
        made = list(_grid(space))
    if not made or (len(made) == 1 and not made[0].settings):
        raise RecipeError(
            "a sweep varies something; give `weights` several times, a range of a parameter like t=0.2:0.8:0.1, or `random`"
        )
    if len(made) > _MOST_POINTS:
        raise RecipeError(f"the grid has {len(made):,} points, and a sweep at most {_MOST_POINTS:,}")
    names = [each.name for each in made]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise RecipeError(f"two merges of the sweep are the same: {printable(twice)}; give each once")
    return made


def _grid(space: Space) -> Iterator[Point]:
    lists: Sequence[Sequence[float] | None] = space.weights or [None]
    for weights, *values in product(lists, *space.axes.values()):
        chosen = dict(zip(space.axes, values, strict=True))
        yield _point(space, weights, chosen)


def _point(space: Space, weights: Sequence[float] | None, chosen: Mapping[str, Any]) -> Point:
    settings = {} if weights is None else {"weight": ",".join(f"{w:.10g}" for w in weights)}
    settings |= {name: _text(value) for name, value in chosen.items()}
    arguments: dict[str, Any] = {} if weights is None else {"weights": list(weights)}
    values = {**space.fixed, **chosen}  # in the order in which they were given, which shows in a recipe
    return Point(settings, {**arguments, "parameters": {name: values[name] for name in space.names}})


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _drawn(space: Space, inputs: int) -> Iterator[Point]:
    """Yields points with numbers drawn from each span, values drawn from each axis, and weights if nothing else varies."""
    draw, seen = random.Random(space.seed), set[str]()
    plain = not (space.spans or space.axes or space.weights)
    for _ in range(100 * space.draws):
        chosen: dict[str, Any] = {}
        for name, (low, high) in space.spans.items():
            chosen[name] = round(draw.uniform(low, high), _PLACES)
        for name, values in space.axes.items():
            chosen[name] = draw.choice(values)
        weights = draw.choice(space.weights) if space.weights else _on_simplex(draw, inputs) if plain else None
        made = _point(space, weights, chosen)
        if made.name not in seen:
            seen.add(made.name)
            yield made
        if len(seen) == space.draws:
            return


def _on_simplex(draw: random.Random, count: int) -> list[float]:
    """Returns weights that sum to 1, all such weights being equally likely."""
    parts = [draw.expovariate(1.0) for _ in range(count)]
    found = [round(part / sum(parts), _PLACES) for part in parts[:-1]]
    return [*found, round(1 - sum(found), _PLACES)]


def _averages(space: Space, inputs: Sequence[str]) -> Iterator[Point]:
    """Yields the means of the last checkpoints up to each epoch, as icefall's ``--epoch`` and ``--avg`` name them."""
    if space.draws or space.weights or space.axes or space.spans:
        raise RecipeError("`epochs` and `averages` make plain means; leave weights, ranges and `random` out")
    ordered = in_order(list(inputs))
    numbers = [number_of(each) for each in ordered]
    unnumbered = [path for path, number in zip(ordered, numbers, strict=True) if number is None]
    if unnumbered:
        raise RecipeError(f"{listed(unnumbered)} has no number in its name, which `epochs` counts")
    ends = list(space.epochs) or [numbers[-1] or 0]
    for end in ends:
        if end not in numbers:
            raise RecipeError(f"no input has the number {end} in its name; `epochs` takes those of the inputs")
        there = numbers.index(end) + 1
        for count in space.averages or [1]:
            if count > there:
                continue  # icefall's table has an empty cell there
            settings = {"epoch": str(end), "avg": str(count)}
            yield Point(settings, {"parameters": dict(space.fixed)}, tuple(ordered[there - count : there]))
