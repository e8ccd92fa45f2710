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
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from streammerge.errors import RecipeError, listed, printable
from streammerge.plugins import Registry
from streammerge.stores.base import Store
from streammerge.stores.local import LOCAL

_SCHEME = re.compile("[a-z][a-z0-9+.-]+")

S = TypeVar("S", bound="type[Store]")


def _of_module(module: ModuleType) -> Mapping[str, Store]:
    return {each.scheme: each for each in vars(module).values() if isinstance(each, Store)}


def _of_plugin(scheme: str, found: Any) -> Store:
    """The store that an entry point names, which is its class or one of it."""
    store = found() if isinstance(found, type) else found
    if not isinstance(store, Store) or store.scheme != scheme:
        raise RecipeError(f"the store for {scheme}:// is a {type(store).__name__}, not a Store with this scheme")
    return store


_stores = Registry[Store]("store", "streammerge.stores", _of_module, _of_plugin)


def register_store(store: S) -> S:
    """Makes a class of stores known under its ``scheme``; to be used as a decorator. RecipeError for an unusable scheme."""
    scheme = getattr(store, "scheme", None)
    if not isinstance(scheme, str) or not _SCHEME.fullmatch(scheme):
        raise RecipeError(f"the store {store.__name__} needs a scheme of two or more small letters, like scheme = 'bucket'")
    _stores.register(scheme, store(), store.__module__)
    return store


def store_of(scheme: str) -> Store:
    """The store with that scheme, loaded when it is first asked for. RecipeError for an unknown one."""
    if scheme == LOCAL.scheme:
        return LOCAL
    found = _stores.find(scheme)
    if found is None:
        known = listed(sorted(_stores.all()))
        raise RecipeError(
            f"no store is known for {printable(scheme)}://; known are {known}, and a package can bring another"
        )
    return found
