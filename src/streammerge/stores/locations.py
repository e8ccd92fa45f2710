"""Turns the text that a user typed into a :class:`Location`. No other module does."""

from __future__ import annotations

import os
import posixpath
import re

from streammerge.errors import RecipeError
from streammerge.stores.base import Location, Store
from streammerge.stores.local import LOCAL

PathLike = str | os.PathLike[str] | Location
"""The types by which a user names a checkpoint: text (``scheme://name`` or a path), a path object, or a location."""
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")

_QUERIED = r"(?i)https?://[^\s?]+\?(?:(?!\+(?:[\d.]+\*)?[a-z0-9+.-]+://)\S)*"


def parse(place: PathLike, within: Location | None = None) -> Location:
    """Returns the location that a text or a path names. A relative path counts from ``within``; a path object is always a
    path.

    ``~`` and ``~user`` at the beginning are the home folder. Raises RecipeError for a scheme of no known store.
    """
    if isinstance(place, Location):
        return place
    if not isinstance(place, str):
        try:
            return LOCAL.parse(os.fsdecode(os.fspath(place)))
        except TypeError:
            raise RecipeError(
                f"{place!r} is not a path, but a {type(place).__name__}; give text or a path object"
            ) from None
    store = _store_of(place)
    path = store.parse(place)
    if within is None or path.is_absolute or within == HERE:
        return path
    if store is not LOCAL:
        inside = within.store == store or within.store is LOCAL
        return store.parse(store.spelled(posixpath.join(within.key, path.key))) if inside else path
    slash = "" if within.ends_in_slash else "/"
    return within.store.parse(f"{within}{slash}{store.without_scheme(place)}")


def _store_of(text: str) -> Store:
    """Returns the store that a text names. Most texts are paths, which need no other store."""
    found = _SCHEME.match(text)
    if found is None:
        return LOCAL
    from streammerge.stores.registry import store_of

    return store_of(found[1].lower())


def location(place: PathLike) -> Location:
    """Returns the location of a path or of a text like ``scheme://name``, as every function of streammerge reads it.

    Raises RecipeError for a scheme of no known store.
    """
    return parse(place)


def resolved(place: PathLike) -> Location:
    """The location without links and relative parts: equal for two names of one place."""
    return parse(place).resolve()


def without_queries(text: str) -> str:
    """Returns a text with web addresses without their queries, which may be secrets. Their store keeps the queries.

    A query ends at a space, or where a plus sign adds another address.
    """
    return re.sub(_QUERIED, lambda found: str(parse(found[0])), text) if "?" in text and "://" in text else text


def has_scheme(text: str) -> bool:
    """Returns whether a text names its store."""
    return _SCHEME.match(text) is not None


def is_here(text: str) -> bool:
    """Whether a text without a scheme is a path on this machine that exists, even as a link that leads to nothing."""
    return not has_scheme(text) and LOCAL.parse(text).lexists()


HERE = LOCAL.parse(".")
"""The folder in which the process runs."""
