"""The state dicts of a tree, and what may be one: mappings of tensors, pickled modules, lists, loose tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, overload

from streammerge.errors import FormatError, printable
from streammerge.pickles.training_state import bars, is_optimizer_state, is_training_state
from streammerge.pickles.tree import MISSING, FlatTree, Instance, TensorRef, mapping_items, walk
from streammerge.tensors.conventions import AVERAGED

_Place = tuple[tuple[Any, ...], Any, bool, bool, bool, Any]
_KEYS = (str, int)
MOST_NAME = 4000


@dataclass(slots=True, eq=False)  # not frozen: creating a frozen one takes three times as long
class Found:
    """One tensor of a state dict: its name, and the mapping and key that hold it (None outside mappings).

    ``ref`` is the tensor that is read; ``node`` is the tensor in the tree. They differ if EMA weights replace plain
    ones.
    """

    name: str
    ref: TensorRef
    holder: Any = None
    key: Any = None
    node: TensorRef | None = None


class AllFound(Sequence[Found]):
    """All tensors of a flat tree. They are made when one is asked for, and then kept."""

    def __init__(self, tree: FlatTree) -> None:
        self.tree = tree

    @cached_property
    def _made(self) -> list[Found]:
        return [Found(name, ref, self.tree, name) for name, ref in self.tree.items()]

    def __len__(self) -> int:
        return len(self.tree)

    def __iter__(self) -> Iterator[Found]:
        return iter(self._made)

    @overload
    def __getitem__(self, at: int) -> Found: ...
    @overload
    def __getitem__(self, at: slice) -> list[Found]: ...
    def __getitem__(self, at: int | slice) -> Found | list[Found]:
        return self._made[at]


@dataclass(slots=True, eq=False)
class Candidate:
    """A state dict, or a possible one. ``kind`` is "state dict", "module", "list" or "loose tensors".

    ``barred``: it lies below a key that no weights lie below. ``stale``: it is the state of an optimizer, a scheduler or a
    scaler. ``swapped``: whether it holds a running mean of the weights, where a program puts it in an unusual place.
    ``within``: it lies inside another state dict.
    """

    path: tuple[Any, ...]
    kind: str
    tensors: Sequence[Found]
    others: int = 0
    barred: bool = False
    holder: Any = None
    key: Any = None
    stale: bool = False
    swapped: bool | None = None
    within: bool = False

    @property
    def label(self) -> str:
        return ".".join(printable(part) for part in self.path) or "(top level)"

    @property
    def nbytes(self) -> int:
        if isinstance(self.tensors, AllFound):
            return self.tensors.tree.table.nbytes
        return sum(_bytes_of(found.ref) for found in self.tensors)

    @property
    def averaged(self) -> bool:
        """Whether it is a running mean of the weights (EMA), as its path tells."""
        if self.swapped is not None:
            return self.swapped
        return any(isinstance(part, str) and re.fullmatch(AVERAGED, part) for part in self.path)


def candidates(tree: Any) -> list[Candidate]:
    """Returns every state dict in the tree, in its order. Those below optimizer-like keys are marked ``barred``."""
    found: list[Candidate] = []
    seen: set[int] = set()
    stack: list[Iterator[_Place]] = [iter([((), tree, False, False, False, None)])]
    while stack:
        place = next(stack[-1], None)
        if place is None:
            stack.pop()
            continue
        path, node, barred, stale, within, holder = place
        if id(node) in seen:
            continue
        seen.add(id(node))
        candidate = _as_state_dict(path, node)
        if candidate is not None:
            candidate.barred, candidate.stale, candidate.within = barred, stale, within
            candidate.holder, candidate.key = holder, path[-1] if path else None
            found.append(candidate)
        if len(path) < 32 and (candidate is None or candidate.others):
            optimizer = is_optimizer_state(node)
            within = within or candidate is not None
            stack.append(_places(path, node, barred or optimizer, stale or optimizer, within))
    return found or _loose(tree)


def _places(path: tuple[Any, ...], node: Any, barred: bool, stale: bool, within: bool) -> Iterator[_Place]:
    """Yields the children of a node that may hold tensors. A list of all of them could be larger than the tree."""
    holder, items = inside(node)
    for key, value in items:
        if isinstance(value, dict | list | tuple | Instance):
            yield (*path, key), value, barred or bars(key), stale or is_training_state(key, value), within, holder


def inside(node: Any) -> tuple[Any, Iterable[tuple[Any, Any]]]:
    """Returns the node that holds the (key, value) pairs of a container, and these pairs."""
    items = mapping_items(node)
    if items is not None:
        return node, items
    if isinstance(node, list | tuple):
        return node, enumerate(node)
    if isinstance(node, Instance):
        fields = fields_of(node)
        return fields, fields.items() if isinstance(fields, dict) else enumerate(fields)
    return None, ()


def fields_of(node: Instance) -> dict[Any, Any] | list[Any] | tuple[Any, ...]:
    """Returns the fields of an object that is no mapping: by name, or in their order as a NamedTuple has them."""
    state = state_of(node)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # with __slots__
        return state[1]
    if isinstance(state, dict | list | tuple):
        return state
    return node.elements or (node.args if node.kind == "new" else ())


def state_of(node: Instance) -> Any:
    """Returns the state of an object. StyleGAN's persistent classes pass theirs to a call, with the source of the class."""
    if node.state in (MISSING, None) and len(node.args) == 1 and isinstance(node.args[0], dict):
        return node.args[0].get("state", node.state) if "class_name" in node.args[0] else node.state
    return node.state


def _loose(tree: Any) -> list[Candidate]:
    """Collects tensors outside any state dict, each under its path."""
    loose = [(path, node) for path, node in walk(tree) if isinstance(node, TensorRef)]
    tensors = [Found(dotted(path), node) for path, node in loose if not any(map(bars, path))]
    return [Candidate((), "loose tensors", tensors)] if tensors else []


def _as_state_dict(path: tuple[Any, ...], node: Any) -> Candidate | None:
    if isinstance(node, TensorRef) and not path:
        return Candidate((), "list", [Found("tensor", node)])
    items = mapping_items(node)
    if items is not None:
        tensors = [
            Found(k if isinstance(k, str) and len(k) <= MOST_NAME else dotted((k,)), v, node, k)
            for k, v in items
            if isinstance(v, TensorRef) and isinstance(k, _KEYS)
        ]
        others = [(k, v) for k, v in items if not isinstance(v, TensorRef)] if len(tensors) < len(items) else []
        enough = tensors and (not others or _prevail(tensors, others))
        return Candidate(path, "state dict", tensors, len(others)) if enough else None
    if isinstance(node, list | tuple) and node and all(isinstance(v, TensorRef) for v in node):
        return Candidate(path, "list", [Found(str(i), v) for i, v in enumerate(node)])
    if isinstance(node, Instance):
        if tensors := _module_tensors(node):
            return Candidate(path, "module", tensors)
        fields = fields_of(node)
        return _as_state_dict(path, fields) if fields else None
    return None


def _prevail(tensors: list[Found], others: list[tuple[Any, Any]]) -> bool:
    """Whether tensors make a state dict of a mapping that holds other things too.

    They are at least half of its values, or have names with dots. No other value has more of them, except a running average
    beside names with dots, which has counters too. If they have no names with dots, the tensors of other values have none
    either, and not more bytes.
    """
    dotted = 2 * sum("." in found.name for found in tensors) >= len(tensors)
    if not dotted and len(tensors) < len(others):
        return False
    own_bytes = 0 if dotted else sum(_bytes_of(found.ref) for found in tensors)
    for key, value in others:
        if not isinstance(value, dict | list | tuple | Instance) or _ignorable(key) or is_training_state(key, value):
            continue
        if dotted and isinstance(key, str) and re.fullmatch(AVERAGED, key):
            continue
        count = nbytes = 0
        for path, node in walk(value):
            if isinstance(node, TensorRef):
                if not dotted and path and isinstance(path[-1], str) and "." in path[-1]:
                    return False
                count, nbytes = count + 1, nbytes + _bytes_of(node)
                if count > len(tensors):
                    return False
        if not dotted and nbytes > own_bytes:
            return False
    return True


def _bytes_of(ref: TensorRef) -> int:
    return prod(ref.shape) * ref.dtype.element_bytes


def _ignorable(key: Any) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] in ("_extra_state", "_metadata")


def _module_tensors(root: Instance) -> list[Found]:
    """Returns parameters and persistent buffers of a pickled nn.Module, or of a TorchScript object, under dotted names."""
    found: list[Found] = []
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    seen: set[int] = set()
    while stack:
        prefix, node, depth = stack.pop()
        state = state_of(node) if isinstance(node, Instance) else None
        if not isinstance(state, dict) or id(node) in seen or depth > 64:
            continue
        seen.add(id(node))
        if isinstance(state.get("_modules"), dict):
            transient = state.get("_non_persistent_buffers_set")
            skipped = _members(transient)
            for part in ("_parameters", "_buffers"):
                held = state.get(part)
                for name, value in held.items() if isinstance(held, dict) else ():
                    if isinstance(value, TensorRef) and not (part == "_buffers" and name in skipped):
                        found.append(Found(dotted((prefix + str(name),)), value, held, name))
            inner = state["_modules"]
        elif node.path.startswith("__torch__."):
            found += [Found(dotted((prefix + str(k),)), v, state, k) for k, v in state.items() if isinstance(v, TensorRef)]
            inner = state
        else:
            continue
        below = [(dotted((f"{prefix}{k}.",)), v, depth + 1) for k, v in inner.items() if isinstance(v, Instance)]
        stack.extend(reversed(below))
    return found


def _members(node: Any) -> set[str]:
    """Returns the names in a pickled set; none for anything else."""
    inside = node.args[0] if isinstance(node, Instance) and node.args else ()
    return set(map(str, inside)) if isinstance(inside, list | tuple) else set()


def dotted(path: tuple[Any, ...]) -> str:
    """Joins keys with dots. The length is limited, because long keys above many tensors would use unbounded memory."""
    if len(path) == 1 and isinstance(path[0], str) and len(path[0]) <= MOST_NAME:
        return path[0]
    parts = list(map(str, path))
    if sum(map(len, parts)) > MOST_NAME:
        raise FormatError(f"a tensor's name of {sum(map(len, parts))} characters is beyond the limit of {MOST_NAME}")
    return ".".join(parts)
