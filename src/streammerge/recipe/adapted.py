"""A model with adapters on it, as text: ``base+adapter``, ``base + 0.5*one + other``.

A path that contains a plus sign stays a path. Whether a text is one follows from what exists: first the whole text is
tried, then the longest base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from streammerge.errors import FormatError, RecipeError, printable
from streammerge.recipe.stage_names import stage_of
from streammerge.stores.base import Location
from streammerge.stores.locations import parse
from streammerge.stores.locations import resolved as resolved_place
from streammerge.stores.remembering import recalled

_PLUS, _AT = "+", "@"
_SEPARATOR = " + "
"""Between the parts of a text that is written here, because hardly any path contains it."""
_SCALED = r"(?s)(?P<scale>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\*(?P<path>.+)"
_HELD = r"<in memory \d+>"
_MOST_PARTS = 16
Exists = Callable[[str], bool]


class Part(NamedTuple):
    """An adapter, and what its updates are multiplied by."""

    path: str
    scale: float = 1.0


class Adapted(NamedTuple):
    """A base, and the adapters on it in their order."""

    base: str
    adapters: tuple[Part, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.base, *(part.path for part in self.adapters))

    def __str__(self) -> str:
        scaled = (part.path if part.scale == 1.0 else f"{part.scale:g}*{part.path}" for part in self.adapters)
        return _SEPARATOR.join((self.base, *scaled))

    def moved(self, paths: Sequence[str]) -> Adapted:
        """Returns the same with other paths."""
        adapters = (part._replace(path=path) for part, path in zip(self.adapters, paths[1:], strict=True))
        return Adapted(paths[0], tuple(adapters))


def is_there(path: str) -> bool:
    """Whether a path, or a glob, leads to anything; or whether it means a checkpoint in the caller's memory, or a stage."""
    if re.fullmatch(_HELD, path) or stage_of(path):
        return True
    try:
        place = parse(path)
        return place.exists() or (place.has_magic and any(True for _ in place.glob()))
    except (RecipeError, FormatError, OSError, ValueError):
        return False


def split(text: str, exists: Exists = is_there) -> Adapted | None:
    """Returns the parts of a text that names a base with adapters; None for any other text."""
    if _PLUS not in text or exists(text):
        return None
    for base, rest in _cuts(text):
        if exists(base):
            adapters = _adapters(rest, exists)
            if adapters is not None:
                return Adapted(base, adapters)
    return None


def _cuts(text: str) -> Iterator[tuple[str, str]]:
    """Yields both sides of each plus sign, the last one first."""
    places = [place for place, letter in enumerate(text) if letter == _PLUS]
    for place in reversed(places[-_MOST_PARTS:]):
        left, right = text[:place].strip(), text[place + 1 :].strip()
        if left and right:
            yield left, right


def _adapters(text: str, exists: Exists) -> tuple[Part, ...] | None:
    """Returns the adapters that a text names; None if one of them does not exist."""
    part = _part(text)
    if exists(part.path):
        return (part,)
    for left, right in _cuts(text):
        part = _part(left)
        if exists(part.path):
            rest = _adapters(right, exists)
            if rest is not None:
                return (part, *rest)
    return None


def _part(text: str) -> Part:
    """Reads one adapter, with a number and an asterisk before it if it has a scale."""
    match = re.fullmatch(_SCALED, text)
    if match is None or not math.isfinite(float(match["scale"])):
        return Part(text)
    return Part(match["path"].strip(), float(match["scale"]))


def guessed(text: str) -> Adapted | None:
    """Returns the parts that a text would have if every plus sign stood between two; for messages."""
    pieces = [piece.strip() for piece in text.split(_SEPARATOR if _SEPARATOR in text else _PLUS)]
    return Adapted(pieces[0], tuple(map(_part, pieces[1:]))) if len(pieces) > 1 and all(pieces) else None


def absent(text: str, exists: Exists = is_there) -> str:
    """Says which part of a text with plus signs does not exist; "" for a text without."""
    parts = guessed(text)
    if parts is None:
        return ""
    base = next((left for left, _ in _cuts(text) if exists(left)), parts.base)
    if not exists(base):
        if said := without_revisions(base, exists):
            return said
        return f"{printable(text)} does not exist, neither as a path nor as the model {printable(base)} with an adapter"
    lost = next((part.path for part in parts.adapters if not exists(part.path)), parts.adapters[-1].path)
    if said := without_revisions(lost, exists):
        return said
    return f"{printable(text)}: the model {printable(base)} exists, but the adapter {printable(lost)} does not"


def check_there(text: str) -> None:
    """Raises RecipeError, which names what is wrong, for a text with plus signs, or a revision, that names nothing."""
    if (_PLUS in text or _AT in text) and not is_there(text) and (said := absent(text) or without_revisions(text)):
        raise RecipeError(said)


def without_revisions(text: str, exists: Exists = is_there) -> str:
    """Says what to do about a revision behind a path of this machine; "" for any other text. ``org/name@revision`` belongs
    to the hub."""
    path, _, revision = text.rpartition(_AT)
    if not path or not revision or "/" in revision or not exists(path):
        return ""
    return (
        f"{printable(text)} does not exist; {printable(path)} does, and what lies on a disk has no revisions, so leave "
        f"{printable(_AT + revision)} out, or give the folder of that revision"
    )


def parts_of(text: str) -> tuple[str, ...]:
    """Returns the paths of a base and its adapters; the text itself if it is a path."""
    found = split(text)
    return (text,) if found is None else found.paths


def resolved(text: str) -> tuple[tuple[Location, float], ...]:
    """Returns a key that is equal for two names of one model: the places without links, and the scales of adapters."""
    return recalled(("resolved", text), lambda: _resolved(text))  # each of many models is compared with the others


def _resolved(text: str) -> tuple[tuple[Location, float], ...]:
    found = split(text)
    if found is None:
        return ((resolved_place(text), 1.0),)
    return ((resolved_place(found.base), 1.0), *((resolved_place(part.path), part.scale) for part in found.adapters))


def with_revision(path: object, revision: object) -> object:
    """Returns the path of a repository at a revision, which mergekit writes as two keys."""
    return path if revision is None or not isinstance(path, str) else f"{path}@{revision}"


def adapted_text(base: str, given: object) -> str:
    """Returns the text for a base and the value of a recipe's ``lora``: a path, a mapping with ``path`` and maybe
    ``scale``, or a list of these. Raises ValueError for anything else."""
    several = given if isinstance(given, list | tuple) else [given]
    parts = []
    for each in several:
        path, scale = each, 1.0
        if isinstance(each, dict):
            inner = each.get("path", each.get("model"))
            path, scale = inner, each.get("scale", 1.0)
            path = with_revision(path, each.get("revision"))
            unknown = next((key for key in each if key not in ("path", "model", "scale", "revision")), None)
            if unknown is not None:
                raise RecipeError(f"unknown key {printable(unknown)} of lora; it knows path and scale")
        if not isinstance(path, str) or not path or isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ValueError(given)
        part = _part(path)
        parts.append(Part(part.path, part.scale * float(scale)))
    if not parts:
        return base
    return str(Adapted(base, tuple(parts)))
