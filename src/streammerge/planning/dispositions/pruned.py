"""What a ``.pth`` with only one state dict leaves out: all other state dicts, and the state of the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import printable
from streammerge.pickles.candidates import inside
from streammerge.pickles.training_state import is_training_state
from streammerge.pickles.tree import Instance, TensorRef, walk

WHY = "`only` keeps one state dict"


def pruned(first: CheckpointIndex) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, holder, key) of the entries that are left out: what holds tensors beside the path of the chosen state
    dict, and in it. Single tensors and plain facts stay."""
    paths = [candidate.path for candidate in first.selection.chosen]
    yield from _beside(first.extras, (), paths)


def _beside(node: Any, above: tuple[Any, ...], paths: list[tuple[Any, ...]]) -> Iterator[tuple[str, Any, Any]]:
    on_the_way = {path[len(above)] for path in paths if len(path) > len(above) and path[: len(above)] == above}
    holder, items = inside(node)
    for key, value in items:
        path = (*above, key)
        if key in on_the_way:
            yield from _beside(value, path, paths)
        elif value is not None and (is_training_state(key, value) or _holds_tensors(value)):
            yield ".".join(map(printable, path)), holder, key


def _holds_tensors(value: Any) -> bool:
    container = isinstance(value, dict | list | tuple | Instance)
    return container and any(isinstance(node, TensorRef) for _, node in walk(value))
