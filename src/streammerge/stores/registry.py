"""Stores by the scheme of their names: ours, those of installed packages, and those that the caller registers.

A store of one's own is a class::

    from streammerge import Store, register_store

    @register_store
    class Bucket(Store):
        scheme = "bucket"
        ...

A package brings one by an entry point of the group ``streammerge.stores``, whose name is the scheme::

    [project.entry-points."streammerge.stores"]
    bucket = "my_package:Bucket"
"""

from __future__ import annotations

import re
from typing import TypeVar

from streammerge.errors import RecipeError, listed, printable
from streammerge.plugins import entry_points
from streammerge.stores.base import Store
from streammerge.stores.local import LOCAL

GROUP = "streammerge.stores"
_SCHEME = re.compile("[a-z][a-z0-9+.-]+")
_stores: dict[str, Store] = {LOCAL.scheme: LOCAL}

S = TypeVar("S", bound="type[Store]")


def register_store(store: S) -> S:
    """Makes a class of stores known under its ``scheme``; to be used as a decorator. RecipeError for an unusable scheme."""
    scheme = getattr(store, "scheme", None)
    if not isinstance(scheme, str) or not _SCHEME.fullmatch(scheme):
        raise RecipeError(f"the store {store.__name__} needs a scheme of two or more small letters, like scheme = 'bucket'")
    if scheme in _stores and type(_stores[scheme]) is not store and type(_stores[scheme]).__name__ != store.__name__:
        raise RecipeError(f"the scheme {scheme}:// belongs to {type(_stores[scheme]).__name__}; choose another")
    _stores[scheme] = store()
    return store


def store_of(scheme: str) -> Store:
    """The store with that scheme, loaded when it is first asked for. RecipeError for an unknown one."""
    if scheme not in _stores:
        if scheme == "memory":
            from streammerge.stores.memory import memory_store

            _stores[scheme] = memory_store
        elif scheme in entry_points(GROUP):
            _stores[scheme] = _loaded(scheme)
        else:
            known = sorted({*_stores, "memory", *entry_points(GROUP)})
            raise RecipeError(
                f"no store is known for {printable(scheme)}://; known are {listed(known)}, and a package can bring another"
            )
    return _stores[scheme]


def _loaded(scheme: str) -> Store:
    """The store that an installed package brings."""
    try:
        found = entry_points(GROUP)[scheme]()
        store = found() if isinstance(found, type) else found
    except Exception as error:
        raise RecipeError(f"the store for {scheme}:// cannot be loaded: {printable(error)}") from error
    if not isinstance(store, Store) or store.scheme != scheme:
        raise RecipeError(f"the store for {scheme}:// is a {type(store).__name__}, not a Store with this scheme")
    return store
