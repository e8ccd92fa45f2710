"""The decisions of a plan: what becomes of each thing in an input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from streammerge.errors import listed

Thing = Literal["tensor", "entry", "file"]
"""A tensor; an entry of a pickle that is no tensor of the merge; a file of a folder."""
Fate = Literal["merged", "copied", "edited", "dropped"]
_FATES = ("merged", "copied", "edited", "dropped")
ONE_FILE = "true of the first input only"
_MOST_NAMES = 20


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Things with one fate for one reason. ``count``: all of them; ``names``: the first of them."""

    thing: Thing
    fate: Fate
    why: str
    names: tuple[str, ...]
    count: int


@dataclass(slots=True, eq=False)
class Dispositions:
    """What becomes of the things in the inputs, in groups of one fate and one reason."""

    _names: dict[tuple[Thing, Fate, str], list[str]] = field(default_factory=dict)

    def add(self, thing: Thing, names: str | Iterable[str], fate: Fate, why: str = "") -> None:
        """Records the fate of these things.

        ``why``: a clause without a full stop. It may name an option in backquotes. It holds no path of this machine, since
        it stands in the receipt.
        """
        known = self._names.setdefault((thing, fate, why), [])
        known += [names] if isinstance(names, str) else names
        if not known:
            del self._names[thing, fate, why]

    def update(self, other: Dispositions, prefix: str = "") -> None:
        """Adds the decisions of a part. ``prefix``: what its names begin with among those of the whole."""
        for (thing, fate, why), names in other._names.items():
            self.add(thing, [prefix + name for name in names] if prefix else names, fate, why)

    def __iter__(self) -> Iterator[Decision]:
        """Yields the decisions by fate, and within a fate in the order in which they were made."""
        for wanted in _FATES:
            for (thing, fate, why), names in self._names.items():
                if fate == wanted:
                    yield Decision(thing, fate, why, tuple(names[:_MOST_NAMES]), len(names))

    def dropped(self, thing: Thing) -> Iterator[tuple[str, str]]:
        """Yields (name, why) of all things of a kind that are dropped."""
        for (kind, fate, why), names in self._names.items():
            if kind == thing and fate == "dropped":
                yield from ((name, why) for name in names)

    def facts(self) -> list[tuple[str, str]]:
        """Returns (fate, text) of each decision, for people, but not of merged tensors: a plan counts those by method."""
        return [(each.fate, _described(each)) for each in self if (each.thing, each.fate) != ("tensor", "merged")]

    def notes(self) -> list[str]:
        """Returns a sentence for each decision by which something is missing in the output."""
        return [f"left out of the output: {_described(each)}" for each in self if each.fate == "dropped"]

    def record(self) -> list[dict[str, Any]]:
        """Returns the decisions as data for JSON. Long lists of names are cut; ``count`` counts all."""
        return [
            {"fate": each.fate, "thing": each.thing, "count": each.count, "names": list(each.names), "why": each.why}
            for each in self
        ]


def _described(decision: Decision) -> str:
    names = list(decision.names) + [""] * (decision.count - len(decision.names))
    return f"{listed(names)} ({decision.why})" if decision.why else listed(names)
