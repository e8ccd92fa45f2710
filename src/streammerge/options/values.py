"""The kinds of values that options take. Each reads a value, also numpy's and torch's, and refuses any other."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

from streammerge.errors import RecipeError
from streammerge.options.base import OptionKind
from streammerge.units import parse_bytes, parse_share, plain_number

_LEAST_BUDGET = 1 << 20


def number(value: Any) -> float:
    """Reads a finite number. Raises TypeError or ValueError for anything else."""
    read = float(plain_number(value))
    if isinstance(value, str | bool) or not math.isfinite(read):
        raise ValueError(value)
    return read


def numbers(value: Any) -> list[float]:
    """Reads numbers, one behind the other. Raises TypeError or ValueError for anything else."""
    value = plain_number(value)
    if isinstance(value, str | bytes | Mapping):
        raise TypeError
    return [float(plain_number(each)) for each in value]


def lists_of_numbers(value: Any) -> list[list[float]]:
    """Reads lists of numbers. Raises TypeError or ValueError for anything else."""
    return [numbers(each) for each in plain_number(value)]


def number_or_percent(text: str) -> float:
    """Reads ``"0.6"`` or ``"60%"``. Raises ValueError for anything else."""
    text = text.strip()
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def whole(value: Any) -> int:
    """Reads a whole number, also numpy's and torch's. Raises TypeError for anything else."""
    value = plain_number(value)
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _at_least(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = whole(value)
        if number < least:
            raise ValueError(value)
        return number

    return parse


def truth(value: Any) -> bool:
    """Reads True or False, also numpy's. Raises TypeError for anything else."""
    value = plain_number(value)
    if not isinstance(value, bool):
        raise TypeError
    return value


def text(value: Any) -> str:
    """Reads a text. Raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError
    return value


def path(value: Any) -> str:
    """Reads a path or location as text. Expands ``~`` and keeps a final slash. Raises TypeError for anything else, and
    ValueError for a text that cannot be a name; an empty one, as of an unset variable, is not the current folder."""
    if not isinstance(value, str):
        from streammerge.stores.base import Location  # here, so that --help imports no store

        value = str(value) if isinstance(value, Location) else os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    if not value or "\0" in value:
        raise ValueError(value)
    os.fsencode(value)  # a text that is no name for the system is a ValueError too
    if value.startswith("~"):
        from streammerge.stores.locations import parse

        return parse(value).key + "/" * value.endswith("/")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(text, [value] if isinstance(value, str) else value))


def _renames(value: Any) -> dict[str, str] | tuple[str, ...] | None:
    """Texts ``FROM=TO``, or new names by pattern; None for none."""
    if isinstance(value, Mapping):
        return {text(pattern): text(name) for pattern, name in value.items()} or None
    return _texts(value) or None


def parameters(value: Any) -> dict[str, Any]:
    """Reads the parameters of a method by name. Raises TypeError for anything but a mapping from texts."""
    if not isinstance(value, Mapping):
        raise TypeError
    return {text(name): each for name, each in value.items()}


def _size(value: Any) -> str | int:
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    parse_bytes(value)  # its own error says how a size is written
    return value


def _budget(value: Any) -> str | int:
    size = _size(value)
    if parse_bytes(size) < _LEAST_BUDGET and str(size).strip().isdigit():
        raise RecipeError(f"`memory` takes a size with its unit: {size} means {size} bytes; write {size}MiB or {size}GiB")
    return size


def share(value: Any) -> str | float:
    """Returns a share as it was given: a number, or a text like 5%. Raises TypeError, or RecipeError for no share."""
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    parse_share(value)
    return value


def energy(value: Any) -> float:
    """Reads a share above 0 and up to 1, as a number or in per cent. Raises TypeError or ValueError for anything else."""
    read = number_or_percent(value) if isinstance(value, str) else number(value)
    if not 0 < read <= 1:
        raise ValueError(value)
    return read


def positive(value: Any) -> float:
    """Reads a finite number above 0, also from a text. Raises TypeError or ValueError for anything else."""
    read = float(value) if isinstance(value, str) else number(value)
    if not 0 < read < math.inf:
        raise ValueError(value)
    return read


def one_of(choices: tuple[str, ...]) -> OptionKind:
    """Makes the kind of a text that is one of these choices."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return OptionKind(" or ".join(choices), parse)


TRUTH = OptionKind("True or False", truth, flag=True)
TEXT = OptionKind("a text", text)
PATH = OptionKind("a path", path)
COUNT = OptionKind("a positive whole number", _at_least(1), least=1)
WHOLE = OptionKind("a whole number", whole)
SIZE = OptionKind("a size like 512MiB", _size)
BUDGET = OptionKind("a size like 512MiB", _budget)
RENAMES = OptionKind("patterns and new names, like {'old.*': 'new.*'}", _renames, many=True)
PATTERNS = OptionKind("patterns like 'dvae.*'", _texts, many=True)
