"""Reads the configuration beside a model's weights, such as ``config.json``, as Python reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.stores.base import Location

if TYPE_CHECKING:
    from streammerge.checkpoints.config_text import KeyPath

CONFIG = "config.json"
_MOST_BYTES = 16 << 20
_DEEPEST = 6

Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Config:
    """A configuration file. ``unread``: why its content is not known; then ``tree`` is empty."""

    name: str
    text: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    unread: str = ""


def config_folder(path: Location) -> Location | None:
    """Returns the folder whose configuration is a checkpoint's own; None for a single file."""
    if path.is_folder():
        return path
    return path.parent if path.name.endswith(".index.json") else None


def read_config(folder: Location | None, name: str = CONFIG) -> Config | None:
    """Returns a folder's configuration; None where there is none.

    Raises FormatError for a name that is there and is no regular file, nor a link to one.
    """
    if folder is None or not (path := folder / name).lexists():
        return None
    if (size := path.size) > _MOST_BYTES:
        return Config(name, unread=f"it is larger than {_MOST_BYTES >> 20} MiB")
    try:
        data = path.read(0, size)
        text = data.decode(json.detect_encoding(data))  # utf-8-sig too, which takes a byte order mark away
        tree = json.loads(text)
    except OSError as error:
        return Config(name, unread=f"it cannot be read ({error.strerror or error})")
    except RecursionError:
        return Config(name, unread="it is nested too deeply")
    except ValueError as error:
        return Config(name, unread=f"it is not JSON ({error})")
    return Config(name, text, tree) if isinstance(tree, dict) else Config(name, unread="it is no mapping")


def tree_of(path: Location) -> Tree:
    """Returns the content of a checkpoint's configuration, which is empty where there is none that can be read."""
    config = read_config(config_folder(path))
    return config.tree if config else {}


def mappings(tree: Tree) -> Iterator[tuple[KeyPath, Tree]]:
    """Yields the mapping and all mappings in it that speak of the model, the outer ones first."""
    from streammerge.checkpoints.config_keys import NOT_OF_THE_MODEL

    level: list[tuple[KeyPath, Tree]] = [((), tree)]
    for _ in range(_DEEPEST):
        yield from level
        level = [
            ((*path, key), value)
            for path, each in level
            for key, value in each.items()
            if isinstance(value, dict) and key not in NOT_OF_THE_MODEL
        ]


def value_at(tree: Tree, path: KeyPath) -> Any:
    """Returns the value at a path, None where there is none."""
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def tie_flag(tree: Tree) -> bool | None:
    """Returns ``tie_word_embeddings``, the outermost there is; None where there is none."""
    found = (each.get("tie_word_embeddings") for _, each in mappings(tree))
    return next((flag for flag in found if isinstance(flag, bool)), None)


def is_model_config(tree: Tree) -> bool:
    """Whether it is a configuration of transformers."""
    return "model_type" in tree or "architectures" in tree
