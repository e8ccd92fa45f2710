"""Which repository of the Hugging Face hub a location belongs to, told by its name alone."""

from __future__ import annotations

import re
from typing import NamedTuple

from streammerge.stores.keys import Key

_CACHED = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)")


class Repository(NamedTuple):
    """A repository at one of its commits. ``name``: ``organisation/name``. ``commit``: 40 hexadecimal digits."""

    name: str
    commit: str


def repository_of(location: Key) -> Repository | None:
    """Returns the repository whose snapshot in the hub's cache holds the location; None for all other places."""
    found = _CACHED.search(location.key)
    return None if found is None else Repository(f"{found[1]}/{found[2]}", found[3])
