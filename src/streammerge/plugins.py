"""Finds things by name: in modules of this package, among those that the running program registers, and in plug-ins.

A plug-in is an entry point in the metadata of an installed package. It is imported when its name is asked for, or when all
names are listed.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from streammerge.errors import RecipeError, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Thing = TypeVar("Thing")


class Registry(Generic[Thing]):
    """Things of one kind by name. ``room``: the package whose modules define the built-in things.

    ``kind``: the word for one thing in messages. ``of_module`` returns the things that a module of the room defines.
    ``of_plugin`` makes a thing from the object that an entry point names, and raises RecipeError for an unsuitable object.
    ``group``: the group of the entry points, by default the room's name.
    """

    def __init__(
        self,
        kind: str,
        room: str,
        of_module: Callable[[ModuleType], Mapping[str, Thing]],
        of_plugin: Callable[[str, Any], Thing],
        group: str = "",
    ) -> None:
        self.kind, self.room, self.group = kind, room, group or room
        self._of_module, self._of_plugin = of_module, of_plugin
        self._own: dict[str, Thing] = {}
        self._replacing: set[str] = set()
        self._loaded: dict[str, Thing] = {}
        self._modules: dict[str, Mapping[str, Thing]] = {}

    @cached_property
    def built_in(self) -> dict[str, Thing]:
        """Returns the things of this package. Imports every module of the room, none of which imports torch."""
        found: dict[str, Thing] = {}
        for name in module_names(self.room):
            found |= self._of(name)
        return found

    @cached_property
    def plugins(self) -> dict[str, EntryPoint]:
        """Returns the entry points of installed packages by name. Of two with the same name, the first found."""
        from importlib.metadata import entry_points  # here, because the import takes as long as inspecting a file

        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, point)
        return found

    def register(self, name: str, thing: Thing, module: str, replace: bool = False) -> None:
        """Registers ``thing`` under ``name`` in this process. The last registration of a name counts.

        Ignores the things of the room's own modules, which are found there. If a built-in thing or a plug-in has the same
        name, finding the name raises RecipeError, unless ``replace``.
        """
        if module.startswith(f"{self.room}."):
            return
        self._own[name] = thing
        (self._replacing.add if replace else self._replacing.discard)(name)

    def unregister(self, name: str) -> None:
        """Removes the thing that the running program registered under that name."""
        self._own.pop(name, None)
        self._replacing.discard(name)

    def find(self, name: str) -> Thing | None:
        """Returns the thing with that name, or None. Raises RecipeError for a clash, or a plug-in that does not load."""
        own = self._own.get(name)
        if own is not None and name in self._replacing:
            return own
        known = self._built_in(name) or self._plugin(name)
        if own is not None and known is not None and known is not own:
            whose = "is built in" if name in self.built_in else f"is a plug-in of {_package(self.plugins[name])}"
            raise RecipeError(
                f"the {self.kind} {printable(name)} {whose}, and this program registers another under that name; "
                "rename it, register it with replace=True, or pass it itself instead of its name"
            )
        return known or own

    def is_known_as(self, name: str, thing: Thing) -> bool:
        """Whether every process finds that thing by the name, and not only a program that registers it."""
        built_in = self._built_in(name)
        if built_in is not None:
            return built_in is thing
        return name in self.plugins and self._plugin(name) is thing

    def all(self) -> dict[str, Thing]:
        """Returns everything by name. Leaves out plug-ins that do not load."""
        found = dict(self.built_in)
        for name in self.plugins:
            try:
                found.setdefault(name, self._load(name))
            except RecipeError:
                continue
        return found | {name: thing for name, thing in self._own.items() if name not in found or name in self._replacing}

    def beside_built_in(self) -> Iterator[Thing]:
        """Yields the things of the running program, then the plug-ins. Raises RecipeError if a plug-in does not load."""
        yield from list(self._own.values())
        for name in self.plugins:
            if name not in self._own:
                yield self._load(name)

    def _built_in(self, name: str) -> Thing | None:
        """Returns the thing of this package with that name. Imports one module if the module of that name has it."""
        if "built_in" not in self.__dict__ and name in module_names(self.room):
            found = self._of(name).get(name)
            if found is not None:
                return found
        return self.built_in.get(name)

    def _of(self, module: str) -> Mapping[str, Thing]:
        """Returns the things of one module of the room. They are made once, since a store has connections of its own."""
        made = self._modules.get(module)
        if made is None:
            made = self._modules.setdefault(module, self._of_module(import_module(f"{self.room}.{module}")))
        return made

    def _plugin(self, name: str) -> Thing | None:
        return self._load(name) if name in self.plugins else None

    def _load(self, name: str) -> Thing:
        if name in self._loaded:
            return self._loaded[name]
        point = self.plugins[name]
        try:
            loaded = point.load()
        except Exception as error:  # a plug-in may raise anything while it is imported
            whose = f"the {self.kind} {printable(name)} of {_package(point)}"
            raise RecipeError(f"{whose} cannot be loaded: {printable(error)}") from error
        made = self._loaded[name] = self._of_plugin(name, loaded)
        return made


def _package(point: EntryPoint) -> str:
    return printable(point.dist.name if point.dist else point.value)


def module_names(package: str) -> list[str]:
    """Returns the names of a package's modules, sorted. Imports none of them."""
    return sorted(found.name for found in pkgutil.iter_modules(import_module(package).__path__))


def imported(place: str) -> Any:
    """Imports ``package.module:name``, also from a module in the working directory. Raises whatever the import raises."""
    module, _, name = place.partition(":")
    with _working_directory_importable():
        found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Makes modules in the working directory importable, as ``python -m`` does. Restores ``sys.path`` afterwards."""
    if "" in sys.path:
        yield
        return
    sys.path.insert(0, "")
    try:
        yield
    finally:
        if "" in sys.path:
            sys.path.remove("")
