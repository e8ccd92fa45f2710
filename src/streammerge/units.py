"""Sizes in bytes and shares, parsed and printed. KB, MB, GB are powers of 1000; KiB, MiB, GiB are powers of 1024; a
bare number is bytes."""

from __future__ import annotations

import re
from typing import Any

from streammerge.errors import RecipeError

PAGE_BYTES = 4096
"""Size of a page of memory, and alignment in bytes of direct writes to a disk."""
HUGE_PAGE_BYTES = 2 << 20
"""The most bytes that one access to a mapped file may map: file systems with huge pages cache files in them."""
_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_i, f"{_letter}b": 1000**_i, f"{_letter}i": 1024**_i, f"{_letter}ib": 1024**_i}


def plain_number(value: Any) -> Any:
    """A number of numpy or torch as Python's own, an array of them as a list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def parse_bytes(text: str | int) -> int:
    """Returns the bytes of ``"512MiB"``, ``"5GB"``, ``"1.5g"`` or a number. Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _UNITS:
        raise RecipeError(f"{text!r} is not a size; write it like 512MiB, 2GiB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_share(text: str | float) -> float:
    """Returns a share between 0 and 1 from ``"5%"`` or ``0.05``. Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,18})?)\s*(%?)\s*", str(text))
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise RecipeError(f"{text!r} is not a share; write it like 5% or 100%")
    return share


def _format(value: float, base: int, units: list[str]) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    unit = units[power]
    return f"{value:.0f} {unit}" if unit == units[0] or value >= 100 else f"{value:.1f} {unit}"


def decimal_bytes(count: float) -> str:
    """Formats the size of a file or disk: ``1.9 GB``."""
    return _format(count, 1000, ["bytes", "kB", "MB", "GB", "TB"])


def counted(number: int, what: str) -> str:
    """``1 tensor``, ``1,024 tensors``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def inflected(number: int, one: str, many: str) -> str:
    """Returns the verb or pronoun of so many things: ``is`` or ``are``."""
    return one if number == 1 else many


def binary_bytes(count: float) -> str:
    """Formats an amount of memory: ``221 MiB``."""
    return _format(count, 1024, ["bytes", "KiB", "MiB", "GiB", "TiB"])
