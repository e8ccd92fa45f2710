"""What a checkpoint's name says: its step, its epoch, another number, and the values of metrics.

One rule serves ``last``, ``range`` and ``best``: a step goes before an epoch, an epoch before any other number, and that
before a date with its time. The value of a metric (``val_loss=0.123``) is never taken for the number of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streammerge.stores.locations import parse

_VALUE = r"[\s_=.-]*(\d{1,18})([kKmM](?![A-Za-z0-9]))?(?!\d|\.\d)"
_KINDS = {
    "step": re.compile(rf"(?:step|checkpoint|ckpt|iter|iteration|(?<![A-Za-z0-9])s)s?{_VALUE}", re.IGNORECASE),
    "epoch": re.compile(rf"(?:epoch|(?<![A-Za-z0-9])ep?)s?{_VALUE}", re.IGNORECASE),
    "batch": re.compile(rf"batch(?:es)?{_VALUE}", re.IGNORECASE),
}
_DECIMAL = re.compile(r"(?<![\d.])\d+\.\d+(?:e[+-]?\d+)?|\d+e-\d+", re.IGNORECASE)
_DAY = r"([-_.])(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])|(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=[T_-]?\d{6}(?!\d))"
_HOUR = r"[T _-]?([01]\d|2[0-3])[-_:.h]?([0-5]\d)(?:[-_:.m]?([0-5]\d))?"
_TIME = re.compile(rf"(?<!\d)((?:19|20)\d\d)(?:{_DAY})(?:{_HOUR})?(?!\d)")
"""A date, with its time or without: ``2024-01-31_12-00-00``. Eight digits without a time are a number like others."""
_WHOLE = re.compile(r"(\d{1,18})([kKmM](?![A-Za-z0-9]))?")
_FACTORS = {"": 1, "k": 1000, "m": 1_000_000}
_NUMBER = r"(-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?|-?inf|nan)"


def numeric_order(text: str) -> list[tuple[int, int, str]]:
    """A sort key by which checkpoint-200 comes before checkpoint-1000."""
    return [(1, int(p), "") if re.fullmatch("[0-9]+", p) else (0, 0, p) for p in re.split("([0-9]+)", text)]


@dataclass(frozen=True, slots=True)
class Numbers:
    """The last number of each kind in one name; ``other`` is the last whole number that is no part of a decimal one.

    ``time``: a date with its time as one number, such as 20240131120000.
    """

    step: int | None = None
    epoch: int | None = None
    batch: int | None = None
    other: int | None = None
    time: int | None = None

    def get(self, kind: str) -> int | None:
        found = getattr(self, kind)
        return found if found is None else int(found)


def numbers_in(name: str) -> Numbers:
    """The numbers in one part of a path, its ending left out."""
    name = re.sub(r"(\.[A-Za-z]\w*)+$", "", name)
    time = None
    if stamp := _TIME.search(name):
        year, _, *parts = stamp.groups()
        month, day = (parts[0], parts[1]) if parts[0] else (parts[2], parts[3])
        time = int("".join(each or "00" for each in (year, month, day, *parts[4:])))
        name = f"{name[: stamp.start()]} {name[stamp.end() :]}"
    found = {kind: _last(pattern.findall(name)) for kind, pattern in _KINDS.items()}
    return Numbers(**found, time=time, other=_last(_WHOLE.findall(_DECIMAL.sub(" ", name)) or _WHOLE.findall(name)))


def _last(found: Sequence[tuple[str, str]]) -> int | None:
    return int(found[-1][0]) * _FACTORS[found[-1][1].lower()] if found else None


def number_of(path: str) -> int | None:
    """The number of one checkpoint by itself: of its name, or of its folder's where its own name has none."""
    return next((n for _, n in _ranked(path)), None)


def _ranked(path: str) -> list[tuple[str, int]]:
    """Yields (kind and part of the path, number), the most reliable first."""
    place = parse(path)
    parts = {"name": numbers_in(place.name), "folder": numbers_in(place.parent.name)}
    found = [(f"{kind} of {part}", parts[part].get(kind)) for kind, part in _ORDER]
    return [(label, number) for label, number in found if number is not None]


_WORDS = ("step", "epoch", "batch")
_ORDER = [
    *((kind, "name") for kind in _WORDS),
    *((kind, "folder") for kind in _WORDS),
    ("other", "name"),
    ("other", "folder"),
    ("time", "name"),
    ("time", "folder"),
]


def numbers_of(paths: Sequence[str]) -> Mapping[str, int | None]:
    """Returns the number of each checkpoint: of one kind for all, if all have that kind.

    Of several such kinds, the first in which the checkpoints differ counts. If the step starts again in each epoch, the
    epoch is the number.
    """
    ranked = {path: dict(_ranked(path)) for path in paths}
    shared = [label for label in _labels(ranked) if all(label in found for found in ranked.values())]
    telling = [label for label in shared if len({found[label] for found in ranked.values()}) > 1]
    chosen = (telling or shared)[:1]
    step, epoch = "step of name", "epoch of name"
    if chosen == [step] and epoch in telling and _restarts([(f[epoch], f[step]) for f in ranked.values()]):
        chosen = [epoch]
    if not chosen:
        return {path: number_of(path) for path in paths}
    return {path: found[chosen[0]] for path, found in ranked.items()}


def _labels(ranked: Mapping[str, Mapping[str, int]]) -> list[str]:
    known = {label for found in ranked.values() for label in found}
    return [label for label in (f"{kind} of {part}" for kind, part in _ORDER) if label in known]


def _restarts(pairs: list[tuple[int, int]]) -> bool:
    """Whether a later epoch has a smaller step than an earlier one."""
    steps = [step for _, step in sorted(pairs)]
    return any(later < earlier for earlier, later in pairwise(steps))


def in_order(paths: Sequence[str]) -> list[str]:
    """The checkpoints from the first to the last: by their number, then by epoch, step and the rest of the name."""
    numbers = numbers_of(paths)
    if None in numbers.values():
        return sorted(paths, key=numeric_order)

    def place(path: str) -> tuple[object, ...]:
        own = numbers_in(parse(path).name)
        return (numbers[path], own.epoch or 0, own.step or 0, own.batch or 0, numeric_order(path))

    return sorted(paths, key=place)


def without_number(paths: Sequence[str]) -> list[str]:
    """Returns the checkpoints whose names have no number, where others in the same folder have one."""
    places = {path: parse(path) for path in paths}
    bare = {path for path, place in places.items() if numbers_in(place.name) == Numbers()}
    numbered = {place.parent for path, place in places.items() if path not in bare}
    return [path for path in paths if path in bare and places[path].parent in numbered]


def have_no_order(paths: Sequence[str]) -> tuple[str, str] | None:
    """Returns a name with a step and one with an epoch, if no name has both: their numbers tell no order. Else None."""
    steps, epochs = list[str](), list[str]()
    for path in paths:
        found = numbers_in(parse(path).name)
        if found.step is not None and found.epoch is not None:
            return None
        if found.step is not None:
            steps.append(path)
        if found.epoch is not None:
            epochs.append(path)
    return (steps[0], epochs[0]) if steps and epochs else None


def metric_in(path: str, key: str) -> float | None:
    """The value of a metric that a name states, as in ``val_loss=0.123``; ``loss`` is not ``val_loss``."""
    place = parse(path)
    pattern = re.compile(rf"(?:(?<![A-Za-z0-9_])|(?<=\d_)){re.escape(key)}[=:_ -]?{_NUMBER}(?![A-Za-z0-9])", re.IGNORECASE)
    for name in (place.name, place.parent.name):
        if found := pattern.findall(name):
            return float(found[-1])
    return None
