"""Checkpoints that the caller holds in memory: state dicts, nested and wrapped like those in a ``.pth``."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex, index_of
from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container, flat_tensor
from streammerge.pickles.arrays import Arrays
from streammerge.pickles.training_state import bars
from streammerge.pickles.tree import MISSING, Global, Instance, OrderedTree, TensorRef
from streammerge.pickles.unpickle import unpickle
from streammerge.recipe.names import held_name
from streammerge.sources.memory import in_memory, is_array, is_tensor, is_unread
from streammerge.stores.locations import parse

_DEEPEST = 100
_PLAIN: tuple[Any, ...] = (type(None), bool, int, float, complex, str, bytes)


def hold(given: Any, held: dict[str, Mapping[str, Any]]) -> str:
    """Returns the name of an input in a recipe: its path, or a new name for a state dict, which is added to ``held``. The
    same object gets the same name."""
    if not isinstance(given, Mapping):
        return str(given)
    for name, known in held.items():
        if known is given:
            return name
    name = held_name(len(held) + 1)
    held[name] = given
    return name


def index_state_dict(
    state: Mapping[str, Any], name: str, state_dict: str | None = None, ema: str = "ignore"
) -> CheckpointIndex:
    """Returns the index of a state dict in memory, or of a mapping that holds one. Copies no tensor.

    Values that are neither tensors nor plain data become inert records, as in a pickle. Raises FormatError for tensors that
    cannot be read, and RecipeError as for files.
    """
    builder = _Builder(name)
    container = Container(parse(name), "in memory", builder.tree(state), {}, (), pickled=True)
    if builder.left_out:
        container.notes.append(f"{name}: left out, since they cannot be pickled: {listed(builder.left_out)}")
    return index_of(container, parse(name), state_dict, ema)


class _Builder:
    """Turns Python objects into an inert tree."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left_out: list[str] = []
        self._refs: dict[int, TensorRef] = {}
        self._open: set[int] = set()

    def tree(self, node: Any, path: tuple[str, ...] = ()) -> Any:
        if is_tensor(node) and is_unread(node) and any(map(bars, path)):
            self.left_out.append(".".join(path))
            return MISSING
        if is_tensor(node) or (is_array(node) and node.ndim):
            return self._tensor(node, path)
        if isinstance(node, _PLAIN):
            return _plain(node)
        if is_array(node):
            return node.item()
        if _is_module(node):
            node = node.state_dict()
        if isinstance(node, Mapping | list | tuple):
            return self._inside(node, path)
        if is_dataclass(node) and not isinstance(node, type) and hasattr(node, "__dict__"):
            kind = Global(type(node).__module__, type(node).__qualname__)
            return Instance("new", kind, (), state=self._inside(vars(node), path))
        try:
            return unpickle(pickle.dumps(node, protocol=2), where=self.name, arrays=Arrays(self.name, in_memory=True))
        except (StreammergeError, pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError):
            self.left_out.append(".".join(path))
            return MISSING

    def _inside(self, node: Any, path: tuple[str, ...]) -> Any:
        if len(path) > _DEEPEST or id(node) in self._open:
            raise FormatError(f"{self.name}: {printable('.'.join(path[:8]))} is nested too deeply, or holds itself")
        self._open.add(id(node))
        made: Any
        if isinstance(node, Mapping):
            made = OrderedTree() if isinstance(node, OrderedDict) else {}
            for key, value in node.items():
                child = self.tree(value, (*path, str(key)))
                if child is not MISSING:
                    made[key if isinstance(key, _PLAIN) else str(key)] = child
            if isinstance(made, OrderedTree) and vars(node):
                made.attributes = self.tree(vars(node), (*path, "attributes"))
        else:
            children = [self.tree(value, (*path, str(number))) for number, value in enumerate(node)]
            made = [None if child is MISSING else child for child in children]
            made = made if isinstance(node, list) else tuple(made)
            if hasattr(node, "_fields"):  # a NamedTuple
                made = Instance("new", Global(type(node).__module__, type(node).__qualname__), made)
        self._open.discard(id(node))
        return made

    def _tensor(self, node: Any, path: tuple[str, ...]) -> TensorRef:
        """Returns the node of a tensor. The same tensor object gives the same node. Another tensor over the same numbers
        gets an equal place, so that the two count as tied."""
        known = self._refs.get(id(node))
        if known is None:
            known = self._refs[id(node)] = flat_tensor(in_memory(".".join(path), node, self.name))
            if is_tensor(node):
                known.requires_grad = bool(node.requires_grad) and bool(node.is_leaf)
                known.wrapper = ("parameter",) if isinstance(node, sys.modules["torch"].nn.Parameter) else ()
        return known


def _plain(node: Any) -> Any:
    """Returns the value as its built-in type, also for values of subclasses."""
    if type(node) in _PLAIN:
        return node
    return next(kind(node) for kind in _PLAIN if isinstance(node, kind))


def _is_module(node: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(node, torch.nn.Module)
