"""Many names as few texts: names that differ in their numbers only become one text, without loss.

``layers.{0-47}.experts.{0-127}.w1`` stands for 6,144 names. A brace that is part of a name is doubled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from streammerge.errors import listed

_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)")
"""A number that is written in one way only: without zeros before it."""
_FIELD = r"\{\{|\}\}|\{([\d,-]+)\}"
Numbers = tuple[int, ...]


def form_of(name: str) -> tuple[str, ...]:
    """Returns the texts around the numbers of a name. Two names with equal forms differ in their numbers only."""
    return tuple(_NUMBER.split(name)[::2])


def bundled(names: Iterable[str]) -> list[str]:
    """Returns texts that stand for these names, each for those of one form. :func:`unbundled` is the inverse."""
    forms: dict[tuple[str, ...], set[Numbers]] = {}
    for name in names:
        parts = _NUMBER.split(name)
        forms.setdefault(tuple(parts[::2]), set()).add(tuple(map(int, parts[1::2])))
    return [_text(form, axes) for form, found in forms.items() for axes in _products(sorted(found))]


def unbundled(text: str) -> Iterator[str]:
    """Yields the names that a text of :func:`bundled` stands for."""
    parts: list[list[str]] = []
    at = 0
    for found in re.finditer(_FIELD, text):
        parts.append([text[at : found.start()]])
        parts.append([found[0][0]] if found[1] is None else [str(number) for number in _numbers(found[1])])
        at = found.end()
    parts.append([text[at:]])
    return map("".join, product(*parts))


def shown(texts: Sequence[str], most: int = 4) -> str:
    """Returns the first of these texts, for a message."""
    return listed(list(texts), most)


def _products(found: Sequence[Numbers]) -> Iterator[tuple[Numbers, ...]]:
    """Yields sets of numbers for each place. All their combinations together are the sorted tuples in ``found``."""
    if not found[0]:
        yield ()
        return
    rests: dict[int, list[Numbers]] = {}
    for first, *rest in found:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[Numbers, ...], list[int]] = {}
    for first, own in rests.items():
        alike.setdefault(tuple(own), []).append(first)
    for own_rests, firsts in alike.items():
        for axes in _products(own_rests):
            yield tuple(firsts), *axes


def _text(form: Sequence[str], axes: Sequence[Numbers]) -> str:
    fields = [f"{{{_ranges(axis)}}}" if len(axis) > 1 else str(axis[0]) for axis in axes]
    texts = [each.replace("{", "{{").replace("}", "}}") if "{" in each or "}" in each else each for each in form]
    return texts[0] + "".join(field + text for field, text in zip(fields, texts[1:], strict=True))


def _ranges(numbers: Numbers) -> str:
    """Returns sorted numbers as ``0-3,7``."""
    said, start = list[str](), numbers[0]
    for number, after in zip(numbers, (*numbers[1:], -1), strict=True):
        if after != number + 1:
            said.append(str(start) if start == number else f"{start}-{number}")
            start = after
    return ",".join(said)


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
