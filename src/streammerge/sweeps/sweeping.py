"""A sweep from its arguments to its end: makes the outputs, scores them, keeps the best, writes table and record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.checkpoints.globs import expand
from streammerge.errors import RecipeError, printable
from streammerge.formats.records import RECEIPT_FILE
from streammerge.options.base import picked
from streammerge.options.sweeping import Blending, Sweeping
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


class Sweep:
    """A sweep as it was asked for. Raises RecipeError for arguments that do not fit together."""

    def __init__(self, given: Mapping[str, Any], options: RunOptions) -> None:
        self.asked, blending = picked(Sweeping, given), picked(Blending, given)
        inputs = given["inputs"]
        inputs = [inputs] if isinstance(inputs, str) or not isinstance(inputs, Sequence) else list(inputs)
        texts = [str(each) for each in inputs if not isinstance(each, Mapping)]
        self.inputs: list[Any] = expand(texts) if len(texts) == len(inputs) else inputs
        shared = {name: value for name, value in given.items() if name not in _NOT_MERGED}
        out = path_of("out", given["out"])
        self.template = out if "{}" in out else f"{out.rstrip('/')}/{{}}{_ending(self.inputs)}"
        self.folder = parse(self.template.rpartition("/")[0] or ".")
        self.maker = Maker(shared, self.inputs, self._place, options)
        self.keep = kept_count(self.asked.keep)
        if (self.keep is not None or self.asked.soup) and self.asked.score is None:
            raise RecipeError("`keep` and `soup` need scores; pass `score`, a command like 'evaluate.sh {}'")
        self.points: list[Point] = []
        if self.asked.soup is None:
            self.points = points_of(self._space(blending.seed or 0), [str(each) for each in self.inputs])
        elif len(self.inputs) < 2:
            raise RecipeError("a greedy soup needs two models or more")

    def _space(self, seed: int) -> Space:
        asked = self.asked
        parameters = dict(asked.parameters or {})
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


def _ending(inputs: Sequence[Any]) -> str:
    """Returns how outputs end whose kind is that of the first input: a slash for folders."""
    first = inputs[0] if inputs else ""
    if isinstance(first, Mapping):
        return ".safetensors"
    place: Location = parse(str(first).partition("+")[0])
    return "/" if place.is_folder() else place.suffix or ".safetensors"
