"""A sweep from its arguments to its end: makes the outputs, scores them, keeps the best, writes table and record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from streammerge.checkpoints.globs import expand
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats.records import RECEIPT_FILE
from streammerge.options.base import picked
from streammerge.options.sweeping import Blending, Sweeping
from streammerge.recipe.model import Recipe
from streammerge.recipe.names import is_recipe_name
from streammerge.recipe.reader import read_recipe
from streammerge.recipe.stage_names import stage_of
from streammerge.recipe.varying import varied_models
from streammerge.requests.adapters import adapters_alone, are_adapters
from streammerge.requests.inputs import path_of
from streammerge.running.readback import receipt_of
from streammerge.running.session import RunOptions
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.sweeps.making import Maker, every_plan, sizes_of
from streammerge.sweeps.points import Point, Space, points_of, space_of, whole_numbers
from streammerge.sweeps.results import Made, SweepResult, ranked, read_record, write_record
from streammerge.sweeps.scoring import kept_count, scorer
from streammerge.sweeps.soup import greedy_soup
from streammerge.units import counted, parse_bytes

_NOT_MERGED = ("inputs", "out", "weights", "parameters", "random", "epochs", "averages", "keep", "score", "lowest", "soup")

_ADAPTERS_ALONE = (
    "a sweep makes models, and adapters alone are merged to an adapter, one merge at a time; name each with its base, as "
    "in BASE+ADAPTER, or merge them one by one"
)


class Sweep:
    """A sweep as it was asked for. Raises RecipeError for arguments that do not fit together."""

    def __init__(self, given: Mapping[str, Any], options: RunOptions) -> None:
        self.asked, blending = picked(Sweeping, given), picked(Blending, given)
        inputs, recipe = given["inputs"], given.get("recipe")
        inputs = [inputs] if isinstance(inputs, str) or not isinstance(inputs, Sequence) else list(inputs)
        if recipe is None and len(inputs) == 1 and is_recipe_name(str(inputs[0])):
            recipe, inputs = inputs[0], []
        texts = [str(each) for each in inputs if not isinstance(each, Mapping)]
        self.inputs: list[Any] = expand(texts) if len(texts) == len(inputs) else inputs
        shared = {name: value for name, value in given.items() if name not in _NOT_MERGED} | {"recipe": recipe}
        if recipe is not None:
            shared["normalize"] = None  # it is one of the parameters that vary
        if given["out"] is None:
            raise RecipeError("a sweep needs a folder for its outputs; pass `out`")
        out = path_of("out", given["out"])
        self.points: list[Point] = []
        first = self.inputs[:1] if recipe is None else [self._first_of(recipe, blending)]
        self.template = out if "{}" in out else f"{out.rstrip('/')}/{{}}{_ending(first)}"
        self.folder = parse(self.template.partition("{}")[0].rpartition("/")[0] or ".")
        if recipe is None and blending.base is None and len(texts) == len(inputs) and are_adapters(self.inputs):
            raise RecipeError(_ADAPTERS_ALONE)
        self.maker = Maker(shared, self.inputs, self._place, options)
        self.keep = kept_count(self.asked.keep)
        if (self.keep is not None or self.asked.soup) and self.asked.score is None:
            raise RecipeError("`keep` and `soup` need scores; pass `score`, a command like 'evaluate.sh {}'")
        if self.asked.soup is None and recipe is None:
            self.points = points_of(self._space(blending.seed or 0), [str(each) for each in self.inputs])
        elif self.asked.soup is not None and len(self.inputs) < 2:
            raise RecipeError("a greedy soup needs two models or more")

    def _first_of(self, recipe: Any, blending: Blending) -> str:
        """Finds the points of a recipe. Returns the path of the checkpoint that gives the outputs their container. Raises
        RecipeError for what only inputs can have."""
        theirs = {"inputs": self.inputs or None, "method": blending.method, "base": blending.base}
        theirs |= {name: getattr(self.asked, name) for name in ("epochs", "averages", "soup")}
        given = [name for name, value in theirs.items() if value is not None]
        if given:
            raise RecipeError(
                f"{listed(given)} beside a recipe: it names its models and its method itself; a sweep varies its "
                "`parameters` and `weights`"
            )
        more = {} if blending.normalize is None else {"normalize": blending.normalize}
        if more.keys() & (self.asked.parameters or {}):
            raise RecipeError("`normalize` and the parameter normalize are the same; give one of them")

        def first(read: Recipe) -> Recipe:
            self.points = points_of(self._space(blending.seed or 0, more), varied_models(read))
            return self.points[0].varied(read)  # it may lack the very parameters that vary

        read = read_recipe(recipe, blending.own_methods, adapters=are_adapters, vary=first)
        if adapters_alone(read):
            raise RecipeError(_ADAPTERS_ALONE)
        return _path_of_first(read)

    def _space(self, seed: int, more: Mapping[str, Any] | None = None) -> Space:
        asked = self.asked
        parameters = {**(asked.parameters or {}), **(more or {})}
        weights = list(asked.weights or ())
        return space_of(
            parameters,
            weights=weights,
            draws=asked.random or 0,
            seed=seed,
            epochs=[] if asked.epochs is None else whole_numbers("epochs", asked.epochs),
            averages=[] if asked.averages is None else whole_numbers("averages", asked.averages),
        )

    def _place(self, point: Point) -> str:
        return self.template.replace("{}", point.name)

    def planned(self) -> str:
        """Returns in words what the sweep would make. Reads headers only."""
        plans = list(every_plan(self.maker, self.points))
        lines = [f"{counted(len(plans), 'merge')} in {printable(self.folder)}: {sizes_of(plans)}"]
        return "\n".join([*lines, *(f"  {printable(plan.out)}" for plan in plans)])

    def run(self) -> SweepResult:
        """Makes the outputs. Raises the errors of :func:`streammerge.merge`, and TaskError for a score that fails."""
        new = not self.folder.exists()
        try:
            return self._run()
        except BaseException:
            if new and self.folder.is_folder():
                with suppress(OSError):
                    self.folder.remove_files(())  # if nothing was made, it is empty
            raise

    def _run(self) -> SweepResult:
        began = time.perf_counter()
        self.folder.make_folder()
        earlier, score = read_record(self.folder), None if self.asked.score is None else scorer(self.asked.score)
        if self.asked.soup is not None and score is not None:
            texts = [str(each) for each in self.inputs]
            made = greedy_soup(self.maker, texts, score, self.asked.lowest, earlier, self._write, self._remove)
        else:
            made = self.maker.make(self.points, earlier, self._write)
            if score is not None:
                for each in made:
                    if each.score is None:
                        each.score = score(each.out)
                        self._write(made)
        if self.keep is not None:
            for each in ranked(made, self.asked.lowest)[self.keep :]:
                self._remove(each)
        self._write(made)
        tally = self.maker.tally
        there = [each for each in made if each.state != "removed" and not each.name.startswith("input ")]
        scored = ranked(there, self.asked.lowest)
        return SweepResult(
            self.folder,
            tuple(made),
            (*scored, *(each for each in there if each.score is None)),
            tally.reads,
            tally.read_bytes,
            tally.written_bytes,
            time.perf_counter() - began,
            tally.peak_bytes,
            tally.startup_bytes,
            parse_bytes(self.maker.given.get("memory", "512MiB")),
            tuple(tally.notes),
            tuple(tally.warnings),
            self.asked.lowest,
        )

    def _write(self, made: Sequence[Made]) -> None:
        write_record(self.folder, made)

    def _remove(self, made: Made) -> None:
        """Removes an output of this sweep, which is not among the best."""
        if made.state != "removed" and not made.name.startswith("input "):
            place = parse(made.out)
            place.remove_files({RECEIPT_FILE, *receipt_of(place).checksums})
            made.state = "removed"


def _path_of_first(recipe: Recipe) -> str:
    """Returns the path of the checkpoint whose container the outputs have, through stages."""
    path = recipe.checkpoints[0].path
    name = stage_of(path)
    return path if name is None else _path_of_first(replace(recipe.stages[name], stages=recipe.stages))


def _ending(inputs: Sequence[Any]) -> str:
    """Returns how outputs end whose kind is that of the first input: a slash for folders."""
    first = inputs[0] if inputs else ""
    if isinstance(first, Mapping):
        return ".safetensors"
    place: Location = parse(str(first).partition("+")[0])
    return "/" if place.is_folder() else place.suffix or ".safetensors"
