"""Choosing among checkpoints: the last, a range, the best by a number that stands in them; and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from streammerge.checkpoints.globs import numeric_order
from streammerge.checkpoints.huggingface import read_side_json
from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import RecipeError, listed, printable
from streammerge.pickles.tree import number
from streammerge.stores.base import Location
from streammerge.stores.locations import parse

TRAINER_STATE = "trainer_state.json"
_MOST_STATE_BYTES = 256 << 20


def choose(
    paths: list[str],
    *,
    last: int | None = None,
    range: str | None = None,
    best: int | None = None,
    by: str | None = None,
    highest: bool | None = None,
) -> tuple[list[str], list[str]]:
    """The checkpoints that were asked for, in their order, and sentences that say why these.

    ``range``: ``FROM:TO``, both included, on the last number in a name; ``best``: so many by the number at the key
    ``by``, lowest first unless ``highest``; ``last``: so many by their numeric order. Raises RecipeError.
    """
    notes: list[str] = []
    if last is not None and best is not None:
        raise RecipeError("`last` and `best` both choose; give one of them")
    if (best is None) != (by is None):
        raise RecipeError(
            '`best` needs `by`, and `by` needs `best`: a number in the files, like `by="model_loss.eval_loss"`'
        )
    if highest and best is None:
        raise RecipeError("`highest` turns the order of `best`, which is not given")
    if range is not None:
        paths = _within(paths, range, notes)
    if best is not None and by is not None:
        paths = _best(paths, best, by, bool(highest), notes)
    if last is not None:
        _enough("last", last, paths)
        paths = sorted(paths, key=numeric_order)[-last:]
        notes.append(f"chosen as the last {last}: {listed(paths, 20)}")
    return paths, notes


def exponential_weights(decay: float, count: int) -> list[float]:
    """The weights of an exponential moving average over so many checkpoints, the oldest first; they sum to 1."""
    if not 0 <= decay < 1:
        raise RecipeError(f"`ema_decay` takes a number from 0 to below 1, not {decay:g}")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - place) for place in range(1, count)]


def _enough(option: str, wanted: int, paths: list[str]) -> None:
    if wanted < 1:
        raise RecipeError(f"`{option}` takes a positive number")
    if wanted > len(paths):
        raise RecipeError(f"`{option}={wanted}`, but there are only {len(paths)} checkpoints")


def _within(paths: list[str], within: str, notes: list[str]) -> list[str]:
    start, colon, stop = within.partition(":")
    if not colon or not all(re.fullmatch("[0-9]{0,18}", part.strip()) for part in (start, stop)) or within.strip() == ":":
        raise RecipeError(f"`range` takes FROM:TO, like 1000:5000, not {printable(within)}")
    low, high = int(start.strip() or 0), int(stop.strip()) if stop.strip() else math.inf
    numbers = {path: number_of(path) for path in paths}
    nameless = [path for path, number_in in numbers.items() if number_in is None]
    if nameless:
        raise RecipeError(f"`range` needs a number in each name, and {printable(nameless[0])} has none")
    chosen = [path for path, number_in in numbers.items() if number_in is not None and low <= number_in <= high]
    if not chosen:
        raise RecipeError(f"`range` {printable(within)}: none of the {len(paths)} checkpoints has such a number")
    notes.append(f"chosen by `range` {printable(within)}: {len(chosen)} of {len(paths)}, {listed(chosen, 20)}")
    return chosen


_COUNTED = re.compile(r"(?:step|checkpoint|ckpt|iter|iteration|epoch|batch)s?[\s_=-]*(\d{1,18})", re.IGNORECASE)


def number_of(path: str) -> int | None:
    """The number in a name: what stands behind a word like step, else the last; of model.safetensors its folder's."""
    place = parse(path)
    for name in (re.sub(r"(\.[A-Za-z]\w*)+$", "", place.name), place.parent.name):
        found = _COUNTED.findall(name) or re.findall("[0-9]{1,18}", name)
        if found:
            return int(found[-1])
    return None


def _best(paths: list[str], best: int, by: str, highest: bool, notes: list[str]) -> list[str]:
    _enough("best", best, paths)
    values = {path: _value(path, by) for path in paths}
    ranked = sorted(values, key=lambda path: (-values[path] if highest else values[path], numeric_order(path)))
    order = "highest" if highest else "lowest"
    shown = [f"{path} ({values[path]:.6g})" for path in ranked]
    notes.append(f"chosen by {printable(by)}, {order} first: {listed(shown[:best], 20)}")
    if ranked[best:]:
        notes.append(f"passed over: {listed(shown[best:], 20)}")
    return [path for path in paths if path in ranked[:best]]


def _value(path: str, key: str) -> float:
    """The number at a key: of the file's own data, or of the trainer's state beside it."""
    index = open_checkpoint(path)
    value = index.value(key)
    state = _trainer_state(index.path)
    if value is None:
        value = _of_trainer(state, key, None if index.path.is_folder() else number_of(path))
    if value is None:
        known = sorted({*_numbers(index.plain_data()), *_trainer_keys(state)})
        raise RecipeError(f"{printable(path)} has no number {printable(key)}; it has {listed(known, 12) or 'none'}")
    if not math.isfinite(value):
        raise RecipeError(f"{printable(key)} of {printable(path)} is {value}, by which nothing can be chosen")
    return float(value)


def _trainer_state(path: Location) -> dict[str, Any]:
    """What the Hugging Face trainer wrote beside a checkpoint."""
    return read_side_json((path if path.is_folder() else path.parent) / TRAINER_STATE, _MOST_STATE_BYTES) or {}


def _logged(state: dict[str, Any]) -> list[dict[str, Any]]:
    history = state.get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def _of_trainer(state: dict[str, Any], key: str, step: float | None) -> float | int | None:
    """The latest value of a metric up to the state's own step; for a file, whose state others share, that of its step."""
    if step is not None:
        entries = [entry for entry in _logged(state) if number(entry.get("step")) == step]
        return next((number(entry[key]) for entry in entries if number(entry.get(key)) is not None), None)
    last = number(state.get("global_step"))
    for entry in reversed(_logged(state)):
        at = number(entry.get("step"))
        if number(entry.get(key)) is not None and (last is None or at is None or at <= last):
            return number(entry[key])
    return number(state.get(key))


def _trainer_keys(state: dict[str, Any]) -> set[str]:
    return {key for entry in _logged(state) for key, value in entry.items() if number(value) is not None}


def _numbers(data: Any, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Keys of the numbers in plain data."""
    for key, value in data.items() if isinstance(data, dict) and depth < 4 else ():
        if number(value) is not None and not isinstance(value, bool):
            yield f"{prefix}{key}"
        yield from _numbers(value, f"{prefix}{key}.", depth + 1)
