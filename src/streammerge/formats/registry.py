"""Formats by name: those of this room, those that the running program registers, and those of plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from streammerge.errors import RecipeError, printable
from streammerge.formats.base import Format
from streammerge.plugins import Registry, module_names

_ROOM = "streammerge.formats"
_HELPERS = (
    "archive", "base", "dcp", "dcp_alike", "dcp_items", "dcp_metadata", "dcp_names", "dcp_writer", "detect", "distributed",
    "dtensors", "file_names", "folder", "gguf_file", "gguf_names", "hf_storage", "nemo_folder", "pieces", "records",
    "registry", "safetensors_writer", "shards", "zero",
)  # fmt: skip
"""The modules beside this one that are no format, so that looking at a file imports only the formats that are asked."""


def others(asked: Sequence[str]) -> Iterator[Format]:
    """Yields every format but the modules ``asked``: this package's by name, then this program's, then plug-ins.

    Each is imported when its turn comes. Most files are recognised before plug-ins are searched for.
    """
    for name in module_names(_ROOM):
        if name not in _HELPERS and name not in asked:
            yield import_module(f"{_ROOM}.{name}")
    yield from FORMATS.beside_built_in()


def name_of(plug_in: Format) -> str:
    """Returns the name of a format for messages."""
    known = FORMATS.all().items()
    return printable(next((name for name, each in known if each is plug_in), type(plug_in).__name__))


def _of_plugin(name: str, found: Any) -> Format:
    made = found() if isinstance(found, type) else found
    if not callable(getattr(made, "matches", None)) or not callable(getattr(made, "read", None)):
        raise RecipeError(f"the format {printable(name)} has no matches(head, size) or no read(path)")
    return made  # type: ignore[no-any-return]


def _of_module(module: ModuleType) -> dict[str, Format]:
    name = module.__name__.rpartition(".")[2]
    return {} if name in _HELPERS else {name: module}


FORMATS: Registry[Format] = Registry("format", _ROOM, _of_module, _of_plugin)
Reader = TypeVar("Reader")


def file_format(name: str, *, replace: bool = False) -> Callable[[Reader], Reader]:
    """Registers a format in this process: a class or an object with the methods of ``Format``.

    It reads the files that it matches, where no format of this package recognises them for certain.
    """

    def mark(reader: Reader) -> Reader:
        FORMATS.register(name, _of_plugin(name, reader), getattr(reader, "__module__", ""), replace)
        return reader

    return mark
