"""Finds the tensors of two checkpoints that correspond, where their names differ.

Equal names are one tensor. Names that differ only in wrappers and spellings are one tensor too
(:mod:`streammerge.tensors.names`). The remaining names of both sides are compared: ``model.visual.*`` matches
``visual.*`` if nearly all names below the two are equal with equal shapes, and if no other match is possible. A match may
add, remove or move a part of a name. It never replaces one part by another: an encoder is not a decoder, and a model is
not its own average.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

from streammerge.errors import printable
from streammerge.tensors.conventions import AVERAGED
from streammerge.tensors.names import bare, spelled

Shapes = Mapping[str, tuple[int, ...]]
_MOST_PREFIXES = 32  # an ending with more prefixes than this is ambiguous
_MOST_WAYS = 64
_LEAST_TENSORS = 4
_PART = re.compile(r"(?<=\.)(\d+)(?=\.)")  # a number at the start of a name is a prefix


class Renaming(NamedTuple):
    """A renaming: the prefix of the first's names, the prefix of the other's names, and how many tensors it matches.

    Numbers of layers are written as ``*``. Each prefix ends in a dot, or is empty.
    """

    ours: str
    theirs: str
    tensors: int


@dataclass(slots=True)
class Matching:
    """``names``: name in the first -> name in the other. ``doubtful``: possible matches that were not made."""

    names: Mapping[str, str]
    doubtful: list[Renaming] = field(default_factory=list)


def match(ours: Shapes, theirs: Shapes) -> Matching:
    """The tensors that two checkpoints have in common, one to one; shapes by names."""
    names = {name: name for name in ours if name in theirs}
    if len(names) < max(len(ours), len(theirs)):
        for key, alike in ((bare, False), (spelled, True)):
            left, right = _rest(names, ours, theirs)
            names |= _by(key, left, right, alike)
    left, right = _rest(names, ours, theirs)
    if not left or not right:
        return Matching(names)
    guess = _Guess(left, right, len(ours), len(theirs))
    sure = guess.names()
    return Matching(names | sure, guess.doubtful(sure))


def _rest(names: Mapping[str, str], ours: Shapes, theirs: Shapes) -> tuple[Shapes, Shapes]:
    taken = set(names.values())
    return {n: s for n, s in ours.items() if n not in names}, {n: s for n, s in theirs.items() if n not in taken}


def _by(key: Callable[[str], str], ours: Shapes, theirs: Shapes, alike: bool) -> dict[str, str]:
    """Returns our name -> their name for each key that exactly one name on each side has. ``alike``: if their shapes are
    equal."""
    left = {key(name): name for name in theirs}
    counts = Counter(map(key, theirs)) + Counter(map(key, ours))
    found = {name: left[own] for name in ours if counts[own := key(name)] == 2 and own in left}
    return {name: other for name, other in found.items() if not alike or ours[name] == theirs[other]}


# ----------------------------------------------------------------------------------------------------------- guesses


@dataclass(slots=True)
class _Form:
    """Tensors whose names differ in numbers only: the numbers -> (name, shape)."""

    tensors: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def pairs(self, other: _Form) -> Iterator[tuple[str, str, bool]]:
        """(our name, their name, whether the shapes are equal) of the tensors with the same numbers."""
        for numbers, (name, shape) in self.tensors.items():
            if numbers in other.tensors:
                theirs, their_shape = other.tensors[numbers]
                yield name, theirs, shape == their_shape


@dataclass(slots=True)
class _Way:
    """One renaming: the pairs of forms whose tensors have equal shapes, and those whose tensors differ.

    ``tensors`` and ``differing`` count both.
    """

    ours: str
    theirs: str
    moved: frozenset[str]
    equal: list[tuple[str, str]] = field(default_factory=list)
    other: list[tuple[str, str]] = field(default_factory=list)
    tensors: int = 0
    differing: int = 0


class _Guess:
    """Renamings between what two checkpoints do not share by name. Numbers of layers count as one form of a name."""

    def __init__(self, ours: Shapes, theirs: Shapes, all_ours: int, all_theirs: int) -> None:
        self.sizes = all_ours, all_theirs
        self.ours, self.theirs = _forms(ours), _forms(theirs)
        self.left = min(len(ours), len(theirs))
        self.ways: dict[tuple[str, str], _Way] = {}
        self.related: dict[tuple[str, str], frozenset[str] | None] = {}
        self._collect()

    def _collect(self) -> None:
        ends: dict[tuple[str, int], list[str]] = {}
        for theirs in self.theirs:
            for prefix, ending in _splits(theirs):
                if ending in self.ours:
                    self._add("", prefix, ending, theirs)
                known = ends.setdefault((ending, prefix.count("*")), [])
                if len(known) < _MOST_PREFIXES:
                    known.append(prefix)
        for ours in self.ours:
            for prefix, ending in _splits(ours):
                if ending in self.theirs:
                    self._add(prefix, "", ours, ending)
                for other in ends.get((ending, prefix.count("*")), ()):
                    if _last_part(other) != _last_part(prefix):
                        self._add(prefix, other, ours, other + ending)

    def _add(self, prefix: str, other: str, ours: str, theirs: str) -> None:
        key = prefix, other
        if key not in self.related:
            self.related[key] = _moved(*key)
        moved = self.related[key]
        if moved is None:
            return
        alike = [equal for _, _, equal in self.ours[ours].pairs(self.theirs[theirs])]
        if alike:
            way = self.ways.setdefault(key, _Way(*key, moved))
            equal = 2 * sum(alike) > len(alike)
            (way.equal if equal else way.other).append((ours, theirs))
            way.tensors += sum(alike)
            way.differing += len(alike) - sum(alike)

    def names(self) -> dict[str, str]:
        """Returns the pairs of all renamings that are certain."""
        likely = _without_parts([way for way in self.ways.values() if way.equal and not _speaks_of_average(way.moved)])
        pairs = _forced(pair for way in likely for pair in way.equal)
        ways = [(way, [p for p in way.equal if pairs.get(p[0]) == p[1]]) for way in likely]
        ways = sorted(((way, found) for way, found in ways if found), key=lambda each: -each[0].tensors)[:_MOST_WAYS]
        sure = [(way, found) for way, found in ways if self._is_sure(way, found, pairs)]
        moved = {part for way, found in sure if self._is_large(found) for part in way.moved}
        taken = [(way, found) for way, found in sure if self._is_large(found) or way.moved <= moved]
        forms = {one: two for _, found in taken for one, two in found}
        used = set(forms.values())
        for way, _ in taken:
            for one, two in way.other:  # tensors that differ in shape, which are reported as such
                if one not in forms and two not in used:
                    forms[one] = two
                    used.add(two)
        return {name: other for one, two in forms.items() for name, other, _ in self.ours[one].pairs(self.theirs[two])}

    def _count(self, pairs: Iterable[tuple[str, str]]) -> int:
        return sum(len(self.ours[one].tensors.keys() & self.theirs[two].tensors.keys()) for one, two in pairs)

    def _is_sure(self, way: _Way, found: list[tuple[str, str]], pairs: Mapping[str, str]) -> bool:
        """Whether the renaming matches nearly all tensors below the two prefixes, with equal shapes."""
        count = self._count(found)
        if way.differing * 5 > count:
            return False
        mine = dict(found)
        elsewhere = (pairs.keys() - mine.keys(), {two for one, two in pairs.items() if one not in mine})
        below = [
            sum(len(form.tensors) for name, form in side.items() if name.startswith(prefix) and name not in other)
            for side, prefix, other in zip((self.ours, self.theirs), (way.ours, way.theirs), elsewhere, strict=True)
        ]
        weak = count == 1 and "." not in min(found[0], key=len)
        whole = self.sizes == (1, 1)
        return count * 10 >= 9 * (min(below) - self._count(way.other)) and (whole or not weak)

    def _is_large(self, found: list[tuple[str, str]]) -> bool:
        """Whether the renaming covers more than a few tensors, which could match by chance."""
        count = self._count(found)
        return count >= _LEAST_TENSORS or count * 10 >= min(self.sizes)

    def doubtful(self, taken: Mapping[str, str]) -> list[Renaming]:
        """Returns the renamings of most names that were not accepted, the largest first."""
        found = [
            Renaming(way.ours, way.theirs, way.tensors)
            for way in self.ways.values()
            if way.tensors >= max(0.9 * self.left, 1)
            and not any(taken.get(one) == two for pair in way.equal[:1] for one, two, _ in self._tensors(pair))
        ]
        return sorted(found, key=lambda each: (-each.tensors, each))

    def _tensors(self, pair: tuple[str, str]) -> Iterator[tuple[str, str, bool]]:
        return self.ours[pair[0]].pairs(self.theirs[pair[1]])


def _without_parts(ways: list[_Way]) -> list[_Way]:
    """Returns the renamings without those that larger ones explain: each of its names, on both sides, is in a renaming of
    twice its tensors.

    For example, ``bert.*`` against ``*`` explains ``output.*`` against ``bert.attention.output.*``.
    """
    most: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for way in ways:
        for pair in way.equal:
            for name, known in zip(pair, most, strict=True):
                known[name] = max(known.get(name, 0), way.tensors)
    return [
        way
        for way in ways
        if any(known[name] < 2 * way.tensors for pair in way.equal for name, known in zip(pair, most, strict=True))
    ]


def _forms(shapes: Shapes) -> dict[str, _Form]:
    """Returns spelled name, with ``*`` for numbers -> its tensors. Tensors whose names have the same spelling are left
    out."""
    found: dict[str, _Form] = {}
    doubled: list[tuple[str, tuple[str, ...]]] = []
    for name, shape in shapes.items():
        parts = _PART.split(spelled(name))
        form, numbers = "*".join(parts[::2]), tuple(parts[1::2])
        tensors = found.setdefault(form, _Form()).tensors
        if numbers in tensors:
            doubled.append((form, numbers))
        tensors[numbers] = name, shape
    for form, numbers in doubled:
        found[form].tensors.pop(numbers, None)
    return found


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yields (prefix with its dot, ending) for every dot of a name."""
    dot = name.find(".")
    while dot >= 0:
        yield name[: dot + 1], name[dot + 1 :]
        dot = name.find(".", dot + 1)


def _moved(ours: str, theirs: str) -> frozenset[str] | None:
    """Returns the parts that are added, removed or moved between two prefixes; None if one part replaces another."""
    one, two = ours.split(".")[:-1], theirs.split(".")[:-1]
    if one and two and not set(one) & set(two):
        return None
    if Counter(one) == Counter(two):
        return frozenset(one)
    moved: set[str] = set()
    for kind, start, stop, first, last in SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        if kind == "replace":
            return None
        if kind != "equal":
            moved.update(one[start:stop], two[first:last])
    return frozenset(moved) if moved != {"*"} or not (one and two) else None


def _speaks_of_average(parts: Iterable[str]) -> bool:
    return any(re.fullmatch(AVERAGED, part) for part in parts)


def _forced(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns the pairs of a one-to-one matching that are forced.

    A pair is forced if both sides have no other candidate. It is also forced if one side has no other candidate, and all
    rivals for its partner have one.
    """
    ours: dict[str, set[str]] = {}
    theirs: dict[str, set[str]] = {}
    for one, two in pairs:
        ours.setdefault(one, set()).add(two)
        theirs.setdefault(two, set()).add(one)
    made: dict[str, str] = {}
    changed = True
    while changed:
        changed = False
        for side, back, turned in ((ours, theirs, False), (theirs, ours, True)):
            for name in [name for name, wanted in side.items() if len(wanted) == 1]:
                if len(side.get(name, ())) != 1:
                    continue
                (partner,) = side[name]
                if all(len(side[rival]) > 1 for rival in back[partner] if rival != name):
                    made[partner if turned else name] = name if turned else partner
                    _take(name, partner, side, back)
                    changed = True
    return made


def _take(name: str, partner: str, side: dict[str, set[str]], back: dict[str, set[str]]) -> None:
    for rival in back.pop(partner):
        side[rival].discard(partner)
    side.pop(name)


def replacements(ours: Iterable[str], theirs: Iterable[str]) -> list[Renaming]:
    """Returns pairs of prefixes of which one replaces the other, if that would make nine of ten names equal."""
    one, two = (
        {ending: prefix for name in names for prefix, ending in _splits(name)} for names in (list(ours), list(theirs))
    )
    counts = Counter(
        (one[ending], two[ending])
        for ending in one.keys() & two.keys()
        if _last_part(one[ending]) != _last_part(two[ending])
    )
    least = 0.9 * max(len(set(ours)), len(set(theirs)))
    return [Renaming(*prefixes, count) for prefixes, count in counts.most_common(1) if count >= least]


def _last_part(prefix: str) -> str:
    return prefix[prefix.rfind(".", 0, -1) + 1 :]


# --------------------------------------------------------------------------------------------------------- sentences


def describe(names: Mapping[str, str]) -> list[str]:
    """Sentences such as ``412 tensors match once 'module.' is removed from its names``; none where all names are equal."""
    ways: Counter[tuple[str, str, bool]] = Counter()
    for one, two in names.items():
        if one != two:
            ways[_difference(one, two)] += 1
    return [_sentence(count, *way) for way, count in ways.most_common(8)]


def _sentence(count: int, ours: str, theirs: str, leading: bool) -> str:
    some = f"{count} tensors match" if count > 1 else "1 tensor matches"
    if ours and theirs:
        return f"{some} once '{theirs}' in its names is read as '{ours}'"
    if theirs:
        return f"{some} once '{theirs}' is removed from its names"
    return f"{some} once '{ours}' is put {'before' if leading else 'into'} its names"


@lru_cache(maxsize=1 << 12)
def _difference(ours: str, theirs: str) -> tuple[str, str, bool]:
    """Returns the parts in which two names differ, with ``*`` for numbers, and whether the names begin with them."""
    one, two = ours.split("."), theirs.split(".")
    last = one[-1] == two[-1]
    while one and two and one[-1] == two[-1]:
        one.pop()
        two.pop()
    start = 0
    while start < min(len(one), len(two)) and one[start] == two[start]:
        start += 1
    shown = []
    for each in (one, two):
        parts = ["*" if part.isdigit() else part for part in each[start:]]
        shown.append(printable(".".join([*parts, ""] if last and parts else parts)))
    return shown[0], shown[1], start == 0
