"""Which tensor of another checkpoint goes with which tensor of the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from streammerge.planning.ruled import OverNames
from streammerge.planning.views import View
from streammerge.sources.base import Source
from streammerge.sources.table import same_names

if TYPE_CHECKING:
    from streammerge.tensors.matching import Renaming


class MatchedViews:
    """The views of one part, with their tensors matched by name.

    ``matches``: for each of ``others``, the name of a tensor in ``base`` -> its name there. ``doubtful``: for each of
    ``others``, the renamings that are a guess.
    """

    def __init__(self, base: View, others: list[View]) -> None:
        self.base, self.others = base, others
        self.matches: list[Mapping[str, str]] = []
        self.doubtful: list[list[Renaming]] = []
        for other in others:
            names, doubtful = matched(base, other)
            self.matches.append(names)
            self.doubtful.append(doubtful)

    def pairs(self) -> Iterator[tuple[View, Mapping[str, str]]]:
        """Returns each other view with its matches."""
        return zip(self.others, self.matches, strict=True)

    def sources(self, name: str) -> list[Source | None]:
        """Returns the tensor in each view, None where it is missing."""
        found: list[Source | None] = [self.base.entries[name]]
        for other, names in self.pairs():
            theirs = names.get(name, names.get(self.base.aliases.get(name, name)))
            found.append(None if theirs is None else other.entries[theirs])
        return found

    def shared_ties(self) -> tuple[dict[str, str], list[str]]:
        """Returns the ties of the base that every view has, name -> the name it is tied to, and the names of the others."""
        ties, parted = {}, []
        for name, first in self.base.aliases.items():
            for other, names in self.pairs():
                if (
                    name in names
                    and first in names
                    and other.entries[names[name]].place != other.entries[names[first]].place
                ):
                    parted.append(name)
                    break
            else:
                ties[name] = first
        return ties, parted


def matched(base: View, other: View) -> tuple[Mapping[str, str], list[Renaming]]:
    """Returns the matching of two views, base name -> the other's name, and the renamings that are a guess."""
    if same_names(base.entries, other.entries):
        return SameNames(base.entries), []
    from streammerge.tensors.matching import match

    found = match(shapes(base.entries), shapes(other.entries))
    return found.names, found.doubtful


def shapes(entries: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape."""
    return {name: entry.spec.shape for name, entry in entries.items()}


class SameNames(OverNames[str]):
    """Names -> the same names."""

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> str:
        if name in self._names:
            return name
        raise KeyError(name)
