"""What other installed packages bring: entry points of the package metadata."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def entry_points(group: str) -> dict[str, Callable[[], Any]]:
    """Name -> loader of each entry point in the group. A loader imports the package that brings it; nothing else does.

    Of two packages that bring the same name, the first found counts, as in :mod:`importlib.metadata`.
    """
    from importlib import metadata  # here: reading a checkpoint needs no package metadata

    found: dict[str, Callable[[], Any]] = {}
    for point in metadata.entry_points(group=group):
        found.setdefault(point.name, point.load)
    return found
