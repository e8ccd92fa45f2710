"""The inert tree: a pickle as plain values and records. Nothing in it was imported, called or executed.

Plain values are themselves (None, bool, int, float, complex, str, bytes, list, tuple, dict). Everything else is one of
the records below. Records hash by identity, so dictionary keys can be hashed without running anything. Their text omits
their content, which can be endless in a hostile file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streammerge.sources.base import Source
from streammerge.sources.table import StoredTable
from streammerge.tensors.dtypes import DType

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "<missing>"})()
_PYTHON2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name, as in the pickle."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{_PYTHON2_MODULES.get(self.module, self.module)}.{self.name}"


class _Record:
    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


@dataclass(slots=True, eq=False, repr=False)
class Instance(_Record):
    """An object that was not created: the call that would create it, its arguments, and its later content.

    ``kind`` is "call" (function(*args)), "new" (function.__new__(function, *args)) or "new_ex" (with ``kwargs``).
    """

    kind: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Any = None
    state: Any = MISSING
    items: list[tuple[Any, Any]] = field(default_factory=list)
    elements: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.function.path if isinstance(self.function, Global) else "?"

    def __repr__(self) -> str:
        return f"<{self.path}>"


class OrderedTree(dict[Any, Any]):
    """A collections.OrderedDict, with the attributes of a state dict (``_metadata``)."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        super().__init__()
        self.attributes: Any = MISSING


@dataclass(slots=True, eq=False, repr=False)
class StorageRef(_Record):
    """A torch storage by its key. ``dtype`` is None for an untyped storage; its ``numel`` counts bytes.

    ``view_offset`` (elements) is that of an old-style storage view within the storage ``key``. ``kind``: the name of its
    class if that does not follow from the dtype, as for the integers of quantised tensors.
    """

    key: str
    dtype: DType | None
    numel: int
    view_offset: int = 0
    kind: str = ""

    @property
    def nbytes(self) -> int:
        return self.numel * (self.dtype.element_bytes if self.dtype else 1)


class Blank(StorageRef):
    """The bytes of an array inside a pickle that is being planned. ``key``: the tensor that they come from."""

    __slots__ = ()

    @classmethod
    def of(cls, label: str, nbytes: int) -> Blank:
        return cls(label, None, nbytes)


class Enclosed(Blank):
    """The bytes of a storage inside a pickle that is being planned. There it is a file of torch's old format."""

    __slots__ = ()


@dataclass(slots=True, eq=False, repr=False)
class TensorRef(_Record):
    """A tensor over a storage; ``offset`` and ``strides`` are in elements.

    ``wrapper`` keeps its wrapper: ("parameter",), ("parameter_with_state", state), ("type", function, class, state),
    ("array", function, arguments, dtype) for an array of numpy, or (QUANTISED, call) for a quantised tensor of torch, whose
    numbers are float32 and whose storage holds its integers.
    ``lazy`` names a pending conjugation or negation. ``entry`` is its source, in formats without storages.
    """

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool = False
    wrapper: tuple[Any, ...] = ()
    lazy: str = ""
    state: Any = MISSING
    entry: Source | None = None


QUANTISED = "quantised"


def is_quantised(ref: TensorRef) -> bool:
    """Whether it is a quantised tensor of torch."""
    return ref.wrapper[:1] == (QUANTISED,)


_NO_STORAGE = StorageRef("", None, 0)


def flat_tensor(entry: Source) -> TensorRef:
    """Makes a tensor with its own bytes, for formats without storages."""
    return TensorRef(_NO_STORAGE, entry.spec.dtype, 0, entry.spec.shape, (), entry=entry)


class FlatTree(Mapping[str, TensorRef]):
    """Names -> tensors with their own bytes. The tensors are columns, and each is made when it is asked for."""

    __slots__ = ("table",)

    def __init__(self, table: StoredTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __getitem__(self, name: str) -> TensorRef:
        return flat_tensor(self.table[name])


@dataclass(slots=True, eq=False, repr=False)
class PersistentId(_Record):
    """A reference to something outside the pickle that is not a torch storage."""

    value: Any


def mapping_items(node: Any) -> list[tuple[Any, Any]] | None:
    """Returns the (key, value) pairs of a dict or of an instance of a dict subclass; None for anything else."""
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, Instance) and node.items:
        return node.items
    return None


class FieldName(str):
    """The name of a part of a record, as a step of a path. It is no key that a program wrote."""

    __slots__ = ()


_ARGS, _KWARGS, _ELEMENTS, _STATE = map(FieldName, ("args", "kwargs", "elements", "state"))


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (key, child) of a node. Keys are dictionary keys, positions, or names of an instance's parts."""
    if isinstance(node, dict):
        yield from node.items()
        if isinstance(node, OrderedTree) and node.attributes is not MISSING:
            yield "attributes", node.attributes
    elif isinstance(node, list | tuple):
        yield from enumerate(node)
    elif isinstance(node, Instance):
        yield "function", node.function
        yield _ARGS, node.args
        yield _KWARGS, node.kwargs
        yield from node.items
        yield _ELEMENTS, node.elements
        if node.state is not MISSING:
            yield _STATE, node.state
    elif isinstance(node, TensorRef):
        if not is_quantised(node):  # the integers and scales of a quantised tensor are no tensors of their own
            yield "wrapper", node.wrapper
        if node.state is not MISSING:
            yield "state", node.state
    elif isinstance(node, PersistentId):
        yield "value", node.value


def walk(root: Any, skip: set[tuple[int, Any]] | None = None) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, node) once for every container and record, parents first. Cycles and depth are harmless.

    ``skip`` holds (id of a mapping, key) pairs that are not entered.
    """
    seen: set[int] = set()
    stack: list[Iterator[tuple[tuple[Any, ...], Any]]] = [iter([((), root)])]
    while stack:
        path, node = next(stack[-1], ((), None))
        if node is None:
            stack.pop()
        elif id(node) not in seen:
            seen.add(id(node))
            yield path, node
            if node.__class__ is TensorRef and not node.wrapper and node.state is MISSING:
                continue  # has nothing below it, as most tensors
            if len(stack) < _DEEPEST:
                stack.append(_below(path, node, skip or set()))


_DEEPEST = 2000  # deeper trees cannot be pickled or written again
_WALKED = (dict, list, tuple, Instance, TensorRef, StorageRef, PersistentId, Global)


def _below(path: tuple[Any, ...], node: Any, skip: set[tuple[int, Any]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, node) of the containers and records directly below a node, keys included.

    A list of all of them could need more memory than the tree.
    """
    for key, _ in mapping_items(node) or ():
        if isinstance(key, _WALKED):
            yield path, key
    for key, child in children(node):
        if isinstance(child, _WALKED) and (not skip or isinstance(key, _WALKED) or (id(node), key) not in skip):
            yield (*path, key) if len(path) < 64 else path, child


def number(node: Any) -> float | int | None:
    """Returns a Python or numpy number, else None. Booleans are not numbers here."""
    if isinstance(node, bool):
        return None
    if isinstance(node, int | float):
        return node
    if isinstance(node, Instance) and node.path.endswith("multiarray.scalar") and len(node.args) == 2:
        kind, data = node.args
        code = kind.args[0] if isinstance(kind, Instance) and kind.args else None
        form = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "u8": "<Q", "u4": "<I"}.get(
            str(code)
        )
        if form and isinstance(data, bytes) and len(data) == struct.calcsize(form):
            value: float | int = struct.unpack(form, data)[0]
            return value
    return None


def plain(node: Any) -> Any:
    """Returns the node as JSON-able data. Records become small dictionaries like ``{"$object": "module.Class", ...}``.

    Excessive nesting or sharing, as in a hostile file, is cut and shown as ``"..."``.
    """
    return Plain().render(node)


class Plain:
    """Renders one tree. ``left`` limits the number of values and their text, because sharing lets a small tree render
    as 2**60 values."""

    def __init__(self) -> None:
        self.left = 200_000

    def render(self, node: Any, depth: int = 20) -> Any:
        self.left -= 1
        if depth == 0 or self.left < 0:
            return "..."
        if isinstance(node, str):
            self.left -= len(node) // 64
            return node if self.left >= 0 else "..."
        if node is None or isinstance(node, bool | int):
            self.left -= node.bit_length() // 256 if node else 0
            return node
        if (value := number(node)) is not None:
            return value if value - value == 0 else repr(value)
        if isinstance(node, dict):
            return self._items(node.items(), depth)
        if isinstance(node, list | tuple):
            return self._list(node, depth)
        if isinstance(node, TensorRef):
            self.left -= len(node.shape) // 4
            return {"$tensor": {"dtype": node.dtype.torch_name, "shape": list(node.shape)}}
        if isinstance(node, StorageRef):
            return {"$storage": {"nbytes": node.nbytes}}
        if isinstance(node, Global):
            return {"$global": node.path}
        if isinstance(node, Instance):
            return self._instance(node, depth - 1)
        if isinstance(node, bytes):
            return {"$bytes": node[:64].hex() + ("..." if len(node) > 64 else ""), "length": len(node)}
        if isinstance(node, PersistentId):
            return {"$reference": self.render(node.value, depth - 1)}
        return repr(node)

    def _list(self, values: Sequence[Any], depth: int) -> list[Any]:
        shown: list[Any] = []
        for value in values:
            if self.left < 0:
                return [*shown, "..."]
            shown.append(self.render(value, depth - 1))
        return shown

    def _items(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        for key, value in items:
            name = _key(key)
            self.left -= len(name) // 64
            if self.left < 0:
                return {**shown, "...": "..."}
            shown[name] = self.render(value, depth - 1)
        return shown

    def _instance(self, node: Instance, depth: int) -> Any:
        if node.path in ("builtins.set", "builtins.frozenset", "collections.deque"):
            members = node.args[0] if node.args and isinstance(node.args[0], list | tuple) else ()
            return self._list([*members, *node.elements], depth)
        shown: dict[str, Any] = {"$object": node.path}
        if node.args:
            shown["args"] = self.render(node.args, depth)
        if node.items:
            shown["items"] = self._items(node.items, depth)
        if node.elements:
            shown["elements"] = self.render(node.elements, depth)
        if node.state is not MISSING:
            shown["state"] = self.render(node.state, depth)
        return shown


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, Instance | Global):
        return key.path
    return repr(key) if isinstance(key, int | float | bytes | bool | tuple) or key is None else type(key).__name__
