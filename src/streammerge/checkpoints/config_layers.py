"""Makes a configuration follow layers that were moved, left out or repeated.

A value follows the layers by what it is, whatever its key:

* a number of layers is the new number; * a list or a text with an entry for each layer has the entries of the layers that
are there; * a list of the numbers of layers has the new numbers; * a number that says which layers are special (every
fourth, the first three) stays, if it is true of the new layers. It changes if another number is true of them. Otherwise
no value describes the new layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, takewhile
from math import lcm
from typing import Any

from streammerge.checkpoints.config import Tree, mappings, value_at
from streammerge.checkpoints.config_keys import (
    EXTRA_LAYERS,
    FLAGS,
    IMPLIED,
    LAYER_PARTS,
    LAYER_WORDS,
    NO_PART,
    NOT_MOVED,
    NOT_PER_LAYER,
    NOT_SETTLED,
    PARTS,
    PER_LAYER,
    PLACINGS,
    Placing,
)
from streammerge.checkpoints.config_text import KeyPath
from streammerge.errors import printable

_DEPTH = re.compile(r"(.*_)?(layers?|blocks?|depth)")
_NUMBERS = re.compile(r"\d+(,\s*\d+)+")
_ROLES = frozenset(("encoder", "decoder"))
_NOWHERE = frozenset(("layer", "layers", "block", "blocks", "depth", "resblocks", "h", "transformer"))


@dataclass(frozen=True, slots=True)
class Moved:
    """A stack of layers. ``before``: how many layers the first checkpoint has. ``layers``: for each layer of the output the
    configuration of its checkpoint, which may be empty, and its number there."""

    stack: str
    before: int
    layers: Sequence[tuple[Tree, int]]


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A key by which a loader would take a layer for another kind. ``implied``: the key is left out, and its program takes
    this value. ``period``: layers may move by multiples of it; 0 where they may not."""

    path: KeyPath
    value: Any
    implied: bool
    place: int
    number: int
    period: int = 0


@dataclass(slots=True)
class Followed:
    """``edits``: path -> new value. ``notes``: what the configuration cannot say. ``unmoved``: why no layer can be moved.
    ``kinds``: what the configuration says about each layer before and after; empty where it does not know the stack."""

    edits: dict[KeyPath, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unplaced: list[Unplaced] = field(default_factory=list)
    unmoved: str = ""
    kinds: tuple[list[Any], list[Any]] = ([], [])

    def refusal(self, name: str) -> str:
        """Returns the reason why the layers cannot be in this order, "" if they can. ``name``: of the configuration."""
        if self.unmoved:
            return self.unmoved
        if not self.unplaced:
            return ""
        keys = [f"{printable('.'.join(each.path))} ({_value(each)})" for each in self.unplaced]
        first = self.unplaced[0]
        periods = [each.period for each in self.unplaced]
        way = f"move layers by multiples of {lcm(*periods)} only" if all(periods) else "take other layers"
        return (
            f"{' and '.join(keys)} of {name} {'tells' if len(keys) == 1 else 'tell'} by a layer's number what the layer "
            f"is, and layer {first.place} of the output, which was layer {first.number}, would be taken for another kind; "
            f"{way}"
        )


def _value(each: Unplaced) -> str:
    return f"left out, so {printable(each.value, 40)}" if each.implied else printable(each.value, 40)


def follow(tree: Tree, moved: Moved, name: str) -> Followed:
    """Returns what changes in a configuration for a stack. ``name``: what messages call the configuration."""
    found = Followed()
    spots = _depth_spots(tree, moved)
    holders = list(dict.fromkeys(path for path, _ in spots)) or _listing_holders(tree, moved)
    if not holders:
        found.notes.append(
            f"{name} does not say how many layers {printable(moved.stack)} has; set it there by hand if it should"
        )
        return found
    before: list[list[Any]] = [[] for _ in range(moved.before)]
    after: list[list[Any]] = [[] for _ in moved.layers]
    for path in holders:
        keys = [key for where, key in spots if where == path]
        _Holder(tree, path, keys, moved, name, found, (before, after)).follow()
    found.kinds = (before, after)
    return found


# ----------------------------------------------------------------------------------------- which mapping a stack is in


def _words(names: Iterable[str]) -> frozenset[str]:
    """Returns the words of names that tell parts of a model apart."""
    found = (word for name in names for word in re.split(r"[._\d]+", name.lower()) if word)
    return frozenset(PARTS.get(word, word) for word in found if word not in NO_PART)


def _parts(stack: str) -> frozenset[str]:
    """Returns the words that describe a stack: of encoder and decoder the outer one; text, if no word means images or
    sound."""
    words = _words([stack])
    role = next((part for part in re.split(r"[._]", stack) if part in _ROLES), "")
    words -= _ROLES - {role}
    return words if words & {"vision", "audio"} else words | {"text"}


def candidates(tree: Tree, stack: str) -> list[tuple[KeyPath, Tree]]:
    """Returns the mappings that may describe a stack or a tensor: their path names no part of the model that it is
    outside of."""
    parts = _parts(stack)
    found = [(path, each) for path, each in mappings(tree) if _words(path) - {"text"} <= parts]
    wanted = {word for path, _ in mappings(tree) for word in _words(path)} & parts - {"text"} - _ROLES - _NOWHERE
    return [(path, each) for path, each in found if wanted <= _words(path)] if wanted else found


def _depth_spots(tree: Tree, moved: Moved) -> list[tuple[KeyPath, str]]:
    """Returns the keys that state the number of layers of the stack."""
    parts, scored = _parts(moved.stack), list[tuple[int, KeyPath, str, Any]]()
    for path, each in candidates(tree, moved.stack):
        for key, value in each.items():
            if _DEPTH.fullmatch(key) and _is_number(value):
                own = _words([key]) - _NOWHERE
                if own <= parts | _ROLES and (own <= parts or not parts & _ROLES):
                    scored.append((len((own | _words(path)) & parts - {"text"}), path, key, value))
    if not scored:
        return []
    best = max(score for score, *_ in scored)
    if "encoder" in parts and "decoder" not in parts:  # a general key may state the encoder's depth too
        best -= any(not _words([key]) - _NOWHERE for score, _, key, _ in scored if score == best - 1)
    return [
        (path, key)
        for score, path, key, value in scored
        if score >= best and value + _extra(value_at(tree, path), value, moved.before) == moved.before
    ]


def _extra(holder: Mapping[str, Any], depth: int, before: int) -> int:
    """Returns how many layers of the stack come after those that the depth counts."""
    counts = (holder.get(key) for key in EXTRA_LAYERS)
    return next((count for count in counts if _is_number(count) and count and depth + count == before), 0)


def _listing_holders(tree: Tree, moved: Moved) -> list[KeyPath]:
    """Returns the mappings that state the depth only by the length of a list."""
    return [
        path
        for path, each in candidates(tree, moved.stack)
        if any(_speaks(key) and isinstance(v, list | str) and len(v) == moved.before > 1 for key, v in each.items())
    ]


# ------------------------------------------------------------------------------------------------------ its values


class _Holder:
    """The values of one mapping that describes the stack."""

    def __init__(
        self,
        tree: Tree,
        path: KeyPath,
        depth_keys: list[str],
        moved: Moved,
        name: str,
        found: Followed,
        kinds: tuple[list[list[Any]], list[list[Any]]],
    ) -> None:
        self.tree, self.path, self.depth_keys, self.moved, self.name = tree, path, depth_keys, moved, name
        self.found, self.kinds = found, kinds
        self.holder: Mapping[str, Any] = value_at(tree, path)
        stated = self.holder[depth_keys[0]] if depth_keys else moved.before
        self.before: int = stated
        self.extra = moved.before - stated
        self.layers = [each for each in moved.layers if not self.extra or each[1] < self._stated(each[0])]
        self.followed: set[str] = set()

    def follow(self) -> None:
        self._follow_depth()
        self._follow_lists(self.holder, self.path)
        for key, value in self.holder.items():  # lists of layers in a mapping of their own
            inner = isinstance(value, dict) and not (_words([key]) & {"vision", "audio", "text", *_ROLES})
            if inner and not any(_DEPTH.fullmatch(each) and _is_number(value[each]) for each in value):
                self._follow_lists(value, (*self.path, key), numbers_only=True)
        self._check_placings()
        self._note_others()

    def _stated(self, theirs: Tree) -> int:
        """Returns how many layers a checkpoint has by its own configuration."""
        own = self._of(theirs)
        return next((own[key] for key in self.depth_keys if _is_number(own.get(key))), self.before)

    def _of(self, theirs: Tree) -> Mapping[str, Any]:
        """Returns the same mapping of another configuration."""
        own = value_at(theirs, self.path)
        return own if isinstance(own, dict) else {}

    def _set(self, path: KeyPath, value: Any) -> None:
        if value != value_at(self.tree, path):
            self.found.edits[path] = value

    def _follow_depth(self) -> None:
        for key in self.depth_keys:
            self._set((*self.path, key), len(self.layers))
        if not self.extra:
            return
        behind = self.moved.layers[len(self.layers) :]
        key = next(key for key in EXTRA_LAYERS if self.holder.get(key))
        wrong = [n for n, (theirs, number) in enumerate(behind) if number < self._stated(theirs)]
        if wrong:
            place = len(self.layers) + wrong[0]
            path = (*self.path, key)
            self.found.unplaced.append(Unplaced(path, self.holder[key], False, place, behind[wrong[0]][1]))
        self._set((*self.path, key), len(behind))

    # -- lists --------------------------------------------------------------------------------------------------

    def _follow_lists(self, holder: Mapping[str, Any], path: KeyPath, numbers_only: bool = False) -> None:
        numbered = {key: numbers for key, value in holder.items() if (numbers := _numbers(value)) and _speaks(key)}
        from_one = any(self.moved.before in each for each in numbered.values()) and not any(
            0 in each for each in numbered.values()
        )
        for key, value in holder.items():
            theirs = self._values(path, key)
            if key in FLAGS or not self._is_numbers(key, value, numbered, theirs, from_one):
                if not numbers_only:
                    self._follow_entries(key, value, path)
                continue
            base = numbered.get(key, [])
            mine = [_numbers(theirs(tree)) or [] if tree else base for tree, _ in self.moved.layers]
            new = [n + from_one for n, (_, old) in enumerate(self.moved.layers) if old + from_one in mine[n]]
            for number, kind in enumerate(self.kinds[0]):
                kind.append(number + from_one in base)
            for number, kind in enumerate(self.kinds[1]):
                kind.append(number + from_one in new)
            self.followed.add(key)
            self._set((*path, key), new if not isinstance(value, str) else ",".join(map(str, new)))

    def _values(self, path: KeyPath, key: str) -> Callable[[Tree], Any]:
        return lambda tree: value_at(tree, (*path, key))

    def _is_numbers(
        self, key: str, value: Any, numbered: Mapping[str, list[int]], theirs: Callable[[Tree], Any], from_one: bool
    ) -> bool:
        """Whether a value lists numbers of layers, here or, where it is empty, in the checkpoint of another layer."""
        if key in numbered:
            return numbered[key][-1] < self.moved.before + from_one
        return value == [] and _speaks(key) and any(_numbers(theirs(tree)) for tree, _ in self.moved.layers)

    def _follow_entries(self, key: str, value: Any, path: KeyPath) -> None:
        """Follows a list, a text or a mapping with an entry for each layer."""
        if isinstance(value, dict) and list(value) == [str(n) for n in range(self.moved.before)] and len(value) > 1:
            theirs = [(value_at(tree, (*path, key)), number) for tree, number in self.moved.layers]
            entries = [
                own.get(str(n), value.get(str(n))) if isinstance(own, dict) else value.get(str(n)) for own, n in theirs
            ]
            self._set((*path, key), {str(n): entry for n, entry in enumerate(entries)})
            return
        runs = _runs(value)
        if runs and len(runs) == self.before:
            new = [_entry(_runs(value_at(theirs, (*path, key))), number, runs) for theirs, number in self.layers]
            if new != runs:
                self._set((*path, key), [[new, 1]])
            return
        if not self._has_entries(key, value):
            return
        layers = self.layers if len(value) == self.before else self.moved.layers
        new = [_entry(value_at(theirs, (*path, key)), number, value) for theirs, number in layers]
        self.followed.add(key)
        for kind, entry in zip(self.kinds[0], value, strict=False):
            kind.append(repr(entry))
        for kind, entry in zip(self.kinds[1], new, strict=False):
            kind.append(repr(entry))
        self._set((*path, key), "".join(map(str, new)) if isinstance(value, str) else new)

    def _has_entries(self, key: str, value: Any) -> bool:
        if not isinstance(value, list | str) or len(value) not in (self.before, self.moved.before) or len(value) < 2:
            return isinstance(value, list) and len(value) == 1 == self.before and _speaks(key)
        words = set(key.lower().split("_"))
        if isinstance(value, str):
            return bool(words & {"pattern", "layers", "layer", "blocks", "block"})
        return key in PER_LAYER or not words & NOT_PER_LAYER

    # -- numbers that say which layers are special -----------------------------------------------------------------

    @cached_property
    def _implied(self) -> dict[str, Any]:
        return dict(IMPLIED.get(str(self.holder.get("model_type")), {}))

    def _check_placings(self) -> None:
        stale: dict[str, list[str]] = {}
        parts = _parts(self.moved.stack)
        for key, placing in PLACINGS.items():
            value = self.holder.get(key, self._implied.get(key))
            if parts & _ROLES and _words([key]) & _ROLES - parts:
                continue  # a number of the other half
            if key in self.followed or value is None or (placing.needs and not self.holder.get(placing.needs, True)):
                continue
            old = [self._special(key, placing, theirs, number) for theirs, number in self.layers]
            if None in old or not old:
                continue
            own = [_special(placing, value, n, self.before, self.holder) for n in range(self.before)]
            new = [_special(placing, value, n, len(old), self.holder) for n in range(len(old))]
            if new != old and placing.form in ("leading", "trailing", "up to"):
                fitting = self._fitting(placing.form, value, old)
                if fitting is not None:
                    self._set((*self.path, key), fitting)
                    new = old
            listed = next((each for each in placing.unless if each in self.followed), None)
            if new == old or listed:
                for kinds, each in ((self.kinds[0], own), (self.kinds[1], old)):
                    for kind, special in zip(kinds, each, strict=False):
                        kind.append(special)
            if new != old and listed:
                stale.setdefault(listed, []).append(key)
            elif new != old:
                place = next(n for n, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
                regular = placing.form in ("every", "from zero", "offset")
                period = len(value) if isinstance(value, str | list) else value if regular else 0
                where, number = (*self.path, key), self.layers[place][1]
                self.found.unplaced.append(Unplaced(where, value, key not in self.holder, place, number, period))
        for listed, keys in stale.items():
            self.found.notes.append(
                f"{' and '.join(map(self._said, keys))} no longer tells the same as {listed}, which follows the layers; a "
                f"loader that does not know {listed} would place the layers wrongly"
            )

    def _special(self, key: str, placing: Placing, theirs: Tree, number: int) -> Any:
        """Returns whether a layer is special in its own checkpoint."""
        own = self._of(theirs) or self.holder
        value = own.get(key, self.holder.get(key, self._implied.get(key)))
        listed = own if placing.second in own else self.holder
        return _special(placing, value, number, self._stated(theirs), listed)

    def _fitting(self, form: str, value: int, special: Sequence[Any]) -> int | None:
        """Returns another value that is true of the new layers, None if there is none."""
        ordered = special[::-1] if form == "trailing" else special
        count = len(list(takewhile(bool, ordered)))
        if any(ordered[count:]) or (form == "up to" and (value < 0 or not count)):
            return None
        return count - (form == "up to")

    # -- other keys -----------------------------------------------------------------------------------------------

    def _note_others(self) -> None:
        changed = len(self.layers) != self.before
        for key, value in self.holder.items():
            if key in NOT_SETTLED and value and self._renumbered:
                self.found.notes.append(f"{self._said(key)}: {NOT_SETTLED[key]}, which {self.name} cannot follow")
            if key in NOT_MOVED and value and self._renumbered:
                self.found.unmoved = f"{self._said(key)} ({value}): {NOT_MOVED[key]}, so no layer can be moved"
            known = key in self.depth_keys or key in PLACINGS or key in EXTRA_LAYERS or _words([key]) & _ROLES
            if changed and not known and _is_number(value) and value == self.before and _speaks(key):
                self.found.notes.append(
                    f"{self._said(key)} is {value}, as the number of layers was; it stays, since its meaning is not known"
                )

    @property
    def _renumbered(self) -> bool:
        return [number for _, number in self.moved.layers] != list(range(self.moved.before))

    def _said(self, key: str) -> str:
        return f"{_path((*self.path, key))} of {self.name}"


def _special(placing: Placing, value: Any, number: int, depth: int, holder: Mapping[str, Any]) -> Any:
    """Returns whether a layer is special, or its entry in a repeated list; None if the value does not tell."""
    if isinstance(value, str | list) and placing.form == "every" and value:
        return repr(value[number % len(value)])
    second = holder.get(placing.second) if placing.second else 0
    if not _is_number(value) or not _is_number(second):
        return None
    match placing.form:
        case "leading":
            return number < value
        case "up to":
            return value < 0 or number <= value
        case "trailing":
            return number >= depth - value
    if value < 1:
        return False
    return (number + 1) % value == 0 if placing.form == "every" else number % value == second


def _entry(theirs: Any, number: int, base: Sequence[Any]) -> Any:
    """Returns the entry of a layer: its own checkpoint's, else the first one's."""
    if isinstance(theirs, list | str) and number < len(theirs) and isinstance(theirs, type(base)):
        return theirs[number]
    if _is_number(theirs):  # one number for all layers
        return theirs
    return base[number] if number < len(base) else base[-1]


def _runs(value: Any) -> list[Any]:
    """Returns the entries of ``[[entries, repetitions], ...]``, GPT-Neo's way to say them; [] of anything else."""
    if not isinstance(value, list) or not all(isinstance(run, list) and len(run) == 2 for run in value):
        return []
    if not all(isinstance(each, list) and _is_number(count) and 0 < count < 10_000 for each, count in value):
        return []
    return [entry for each, count in value for entry in each * count]


def _numbers(value: Any) -> list[int] | None:
    """Returns ascending numbers, of a list or of a text with commas; None for anything else."""
    if isinstance(value, str) and _NUMBERS.fullmatch(value):
        value = [int(each) for each in value.split(",")]
    if not isinstance(value, list) or not value or not all(map(_is_number, value)):
        return None
    ascending = all(one < two for one, two in pairwise(value))
    return value if ascending and value[0] >= 0 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _speaks(key: str) -> bool:
    """Whether a key speaks of layers."""
    key = key.lower()
    return any(part in key for part in LAYER_PARTS) or not LAYER_WORDS.isdisjoint(key.split("_"))


def _path(path: KeyPath) -> str:
    return printable(".".join(path))
