"""Finds executors by name, and registers a user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from streammerge.errors import RecipeError, StreammergeError, printable
from streammerge.plugins import Registry
from streammerge.running.executors.base import Executor, Executors

_ROOM = "streammerge.running.executors"
Made = TypeVar("Made", bound=Executors)


def executor(name: str, *, replace: bool = False) -> Callable[[Made], Made]:
    """Registers a class or function that makes an executor from the number of workers. ``executor=name`` then finds it."""

    def mark(made: Made) -> Made:
        with contextlib.suppress(AttributeError):  # only the modules of this room are searched for it
            made.executor_name = name  # type: ignore[attr-defined]
        EXECUTORS.register(name, made, getattr(made, "__module__", ""), replace)
        return made

    return mark


def executors() -> dict[str, Executors]:
    """Returns every executor by name: those of this package, of installed plug-ins, and of the running program."""
    return EXECUTORS.all()


def find_executor(wanted: str | Executors) -> Executors:
    """Returns the function that makes the executor of that name. Returns a function itself. Raises RecipeError for an
    unknown name."""
    if not isinstance(wanted, str):
        if callable(wanted):
            return _checked(getattr(wanted, "__name__", type(wanted).__name__), wanted)
        raise RecipeError(f"`executor` takes a name, or what makes an executor of so many workers, not {printable(wanted)}")
    found = EXECUTORS.find(wanted)
    if found is not None:
        return _checked(wanted, found)
    import difflib

    near = difflib.get_close_matches(wanted, executors(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(executors())}"
    raise RecipeError(f"unknown executor {printable(wanted)}; {hint}")


def _checked(name: str, make: Executors) -> Executors:
    """Returns a function that also checks the executor. It raises RecipeError for anything that is no executor."""
    if isinstance(make, type) and issubclass(make, Executor) and make.__module__.startswith(_ROOM):
        return make

    def checked(workers: int) -> Executor:
        try:
            made = make(workers)
        except (StreammergeError, OSError, MemoryError):
            raise
        except Exception as error:  # a user's own function may raise anything
            said = f"{type(error).__name__}: {printable(error)}"
            raise RecipeError(f"the executor {printable(name)} cannot be made: {said}") from error
        if not isinstance(made, Executor):
            raise RecipeError(f"the executor {printable(name)} made {type(made).__name__}, not a streammerge.Executor")
        return made

    checked.__name__ = name
    return checked


def _of_module(module: ModuleType) -> dict[str, Executors]:
    made = [value for value in vars(module).values() if isinstance(getattr(value, "executor_name", None), str)]
    return {each.executor_name: each for each in made}


def _of_plugin(name: str, found: Any) -> Executors:
    if not callable(found):
        raise RecipeError(f"the executor {printable(name)} cannot be called with a number of workers")
    return found  # type: ignore[no-any-return]


EXECUTORS: Registry[Executors] = Registry("executor", _ROOM, _of_module, _of_plugin, group="streammerge.executors")
