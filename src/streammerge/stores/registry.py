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
from types import ModuleType
from typing import Any, TypeVar

from streammerge.errors import RecipeError, listed, printable
from streammerge.plugins import Registry
from streammerge.stores.base import Store
from streammerge.stores.local import LOCAL

_SCHEME = "[a-z][a-z0-9+.-]+"

S = TypeVar("S", bound="type[Store]")


def register_store(store: S) -> S:
    """Registers a class of stores under its ``scheme`` in this process; a decorator. RecipeError for an unusable scheme."""
    scheme = getattr(store, "scheme", None)
    if not isinstance(scheme, str) or not re.fullmatch(_SCHEME, scheme):
        name = printable(getattr(store, "__name__", repr(store)))
        raise RecipeError(f"the store {name} needs a scheme of two or more small letters, like scheme = 'bucket'")
    if scheme == LOCAL.scheme:
        raise RecipeError(f"the scheme {scheme}:// belongs to {type(LOCAL).__name__}; choose another")
    made = _made(store)
    STORES.register(scheme, made, store.__module__)
    return store


def store_of(scheme: str) -> Store:
    """Returns the store with that scheme, imported when it is first asked for. Raises RecipeError for an unknown one."""
    if scheme == LOCAL.scheme:
        return LOCAL
    store = STORES.find(scheme)
    if store is None:
        raise RecipeError(
            f"no store is known for {printable(scheme)}://; known are {listed(sorted(STORES.all()))}, "
            "and a package can bring another"
        )
    return store


def _of_module(module: ModuleType) -> dict[str, Store]:
    """Returns the stores that a module of this room defines: its instances, and its classes with a scheme of their own."""
    values = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    made = [value for value in values if isinstance(value, Store)]
    classes = [
        value for value in values if isinstance(value, type) and issubclass(value, Store) and "scheme" in vars(value)
    ]
    made += [_made(each) for each in classes if each not in map(type, made)]
    return {store.scheme: store for store in made}


def _of_plugin(scheme: str, found: Any) -> Store:
    store = _made(found) if isinstance(found, type) else found
    if not isinstance(store, Store) or store.scheme != scheme:
        raise RecipeError(f"the store for {scheme}:// is a {type(store).__name__}, not a Store with this scheme")
    return store


def _made(store: type) -> Store:
    """Makes the store of a class. Raises RecipeError if it is no store, or lacks a method."""
    name = getattr(store, "__name__", repr(store))
    if not isinstance(store, type) or not issubclass(store, Store):
        raise RecipeError(f"{printable(name)} is no store; make it a subclass of streammerge.Store")
    missing = getattr(store, "__abstractmethods__", ())
    if missing:
        raise RecipeError(f"the store {printable(name)} lacks the methods {listed(sorted(missing))}; add them")
    try:
        return store()
    except Exception as error:  # its constructor may raise anything
        raise RecipeError(f"the store {printable(name)} cannot be made: {printable(error)}") from error


STORES: Registry[Store] = Registry("store", "streammerge.stores", _of_module, _of_plugin)
