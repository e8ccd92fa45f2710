"""Which tensor of another checkpoint goes with which tensor of the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from streammerge.planning.ruled import OverNames
from streammerge.planning.views import View
from streammerge.sources.base import Source
from streammerge.sources.table import same_names

if TYPE_CHECKING:
    from streammerge.tensors.matching import Renaming

_LEAST_TENSORS = 4


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


def first_names(names: Mapping[str, str], others: Iterable[str]) -> dict[str, str]:
    """Returns names of another view -> what the first would call them, by the prefixes of the names that match.

    ``names``: a tensor in the first -> its name there. A prefix counts if four tensors have it.
    """
    counts = Counter(_prefixes(ours, theirs) for ours, theirs in names.items() if ours != theirs)
    usual = [prefixes for prefixes, count in counts.most_common() if count >= _LEAST_TENSORS]
    ways = sorted(usual, key=lambda prefixes: -len(prefixes[1]))  # the longest prefix says most about a name
    made = dict[str, str]()
    for name in others:
        ours, theirs = next((way for way in ways if name.startswith(way[1])), ("", ""))
        made[name] = ours + name[len(theirs) :]
    return made


def _prefixes(ours: str, theirs: str) -> tuple[str, str]:
    """Returns what stands before the common end of two names. Each begin ends in a dot, or is empty."""
    own, other = ours.split("."), theirs.split(".")
    while own and other and own[-1] == other[-1]:
        own.pop()
        other.pop()
    return "".join(f"{part}." for part in own), "".join(f"{part}." for part in other)


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
