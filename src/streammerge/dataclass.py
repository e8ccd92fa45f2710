"""Dataclasses that are made in a fifth of the time of the standard library's.

``dataclass`` writes and compiles six functions for each frozen class, which was a quarter of the time of importing this
package. Here only ``__init__`` is compiled, because it must be fast. The other methods are closures over the names of the
fields. For type checkers, and for everything that :mod:`dataclasses` tells about a class, it is the same.
"""

from __future__ import annotations

import dataclasses
import reprlib
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    from collections.abc import Callable
    from typing import Any

    def dataclass(
        cls: type | None = None, /, *, frozen: bool = False, slots: bool = False, eq: bool = True, repr: bool = True
    ) -> Any:
        """The decorator of :mod:`dataclasses`, with the options that this package uses."""

        def made(cls: type) -> type:
            return _made(cls, frozen, slots, eq, repr)

        return made if cls is None else made(cls)

    def _made(cls: type, frozen: bool, slots: bool, eq: bool, repr: bool) -> type:
        if any(dataclasses.is_dataclass(base) for base in cls.__mro__[1:]):
            return dataclasses.dataclass(cls, frozen=frozen, slots=slots, eq=eq, repr=repr)
        own = {*cls.__dict__}
        cls.__doc__ = cls.__doc__ or cls.__name__  # otherwise its signature is found out, which takes ten milliseconds
        cls = dataclasses.dataclass(cls, init=False, repr=False, eq=False, slots=slots)
        cls.__dataclass_params__.init = True
        cls.__dataclass_params__.repr, cls.__dataclass_params__.eq, cls.__dataclass_params__.frozen = repr, eq, frozen
        fields = dataclasses.fields(cls)
        methods = [_init(cls, fields, frozen)]
        if repr:
            methods.append(_repr(tuple(field.name for field in fields if field.repr)))
        if eq:
            methods += _comparison(tuple(field.name for field in fields if field.compare), frozen)
        if frozen:
            names = tuple(field.name for field in fields)
            methods += [*_refusals(cls, frozenset(names)), *(_state(cls, names) if slots else ())]
        for method in methods:
            if method.__name__ not in own:
                method.__qualname__ = f"{cls.__qualname__}.{method.__name__}"
                setattr(cls, method.__name__, method)
        if eq and not frozen and not {"__eq__", "__hash__"} & own:
            cls.__hash__ = None  # objects that change are not hashed
        return cls

    def _init(cls: type, fields: tuple[dataclasses.Field, ...], frozen: bool) -> Callable[..., None]:
        names: dict[str, Any] = {"_set": object.__setattr__, "_MISSING": dataclasses.MISSING}
        parameters, lines, annotations = ["self"], [], {}
        for field in fields:
            name = value = field.name
            if field.default_factory is not dataclasses.MISSING:
                names[f"_make_{name}"] = field.default_factory
                value = f"_make_{name}()" if not field.init else f"_make_{name}() if {name} is _MISSING else {name}"
            if field.init:
                names[f"_default_{name}"] = field.default
                given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
                parameters.append(f"{name}=_default_{name}" if given else name)
                annotations[name] = field.type
            elif field.default_factory is dataclasses.MISSING:
                continue  # __post_init__ sets it
            lines.append(f"_set(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
        if hasattr(cls, "__post_init__"):
            lines.append("self.__post_init__()")
        exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines or ["pass"]), names)
        made = names["__init__"]
        made.__annotations__, made.__module__ = annotations | {"return": "None"}, cls.__module__
        return made

    def _repr(names: tuple[str, ...]) -> Callable[..., str]:
        def __repr__(self: object) -> str:
            return f"{type(self).__qualname__}({', '.join([f'{name}={getattr(self, name)!r}' for name in names])})"

        return reprlib.recursive_repr()(__repr__)

    def _comparison(names: tuple[str, ...], frozen: bool) -> list[Callable[..., Any]]:
        values = attrgetter(*names) if names else lambda self: ()

        def __eq__(self: object, other: object) -> bool:
            if other.__class__ is not self.__class__:
                return NotImplemented
            return values(self) == values(other)

        def __hash__(self: object) -> int:
            return hash(values(self))

        return [__eq__, __hash__] if frozen else [__eq__]

    def _refusals(cls: type, names: frozenset[str]) -> list[Callable[..., None]]:
        def __setattr__(self: object, name: str, value: object) -> None:
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
            super(cls, self).__setattr__(name, value)

        def __delattr__(self: object, name: str) -> None:
            if type(self) is cls or name in names:
                raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
            super(cls, self).__delattr__(name)

        return [__setattr__, __delattr__]

    def _state(cls: type, names: tuple[str, ...]) -> list[Callable[..., Any]]:
        def names_of(thing: object) -> tuple[str, ...]:
            return names if type(thing) is cls else tuple(field.name for field in dataclasses.fields(thing))

        def __getstate__(self: object) -> list[Any]:
            return [getattr(self, name) for name in names_of(self)]

        def __setstate__(self: object, state: list[Any]) -> None:
            for name, value in zip(names_of(self), state, strict=True):
                object.__setattr__(self, name, value)

        return [__getstate__, __setstate__]
