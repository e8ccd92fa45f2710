"""The inverse of :mod:`streammerge.pickles.unpickle`: an inert tree -> a pickle stream that torch.load reads.

The stream uses protocol 2 and the opcodes of Python's own pickler, so ``torch.load(weights_only=True)`` still accepts
it. A higher protocol is used only for what protocol 2 cannot express: some names and objects, and the bytes of arrays,
which are filled in later (:class:`~streammerge.pickles.tree.Blank`). Shared objects stay shared, and cycles stay cycles. An
:class:`Edit` describes differences from the tree; the tree itself is never changed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from streammerge.errors import FormatError
from streammerge.pickles.arrays import call_of, is_array
from streammerge.pickles.tree import (
    MISSING,
    Blank,
    Enclosed,
    Global,
    Instance,
    OrderedTree,
    PersistentId,
    StorageRef,
    TensorRef,
    is_quantised,
)
from streammerge.tensors.dtypes import DType

_BATCH = 1000
_PLAIN_GLOBAL = re.compile(r"[A-Za-z0-9_.]+:[A-Za-z0-9_]+")
_REBUILD_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_V3 = Global("torch._utils", "_rebuild_tensor_v3")
_LOAD_FROM_BYTES = Global("torch.storage", "_load_from_bytes")
_REBUILD_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")


@dataclass(slots=True)
class Edit:
    """Differences to write; nodes are identified by ``id``.

    ``replaced``: node -> its replacement. ``dropped``: (dictionary, key) to omit. ``values``: (dictionary, key) -> new
    value. ``renamed``: (dictionary, key) -> new key. ``added``: dictionary -> (key, value) pairs to append. ``emptied``:
    list or tuple -> the positions that become None.
    """

    replaced: dict[int, Any] = field(default_factory=dict)
    dropped: set[tuple[int, Any]] = field(default_factory=set)
    values: dict[tuple[int, Any], Any] = field(default_factory=dict)
    renamed: dict[tuple[int, Any], Any] = field(default_factory=dict)
    added: dict[int, list[tuple[Any, Any]]] = field(default_factory=dict)
    emptied: dict[int, set[int]] = field(default_factory=dict)

    def skipped(self) -> set[tuple[int, Any]]:
        """Returns (node, key or position) of everything that is not written as it is in the tree."""
        return self.dropped | set(self.values) | {(node, each) for node, places in self.emptied.items() for each in places}

    def members(self, node: Sequence[Any]) -> Sequence[Any]:
        """Returns the members of a list or tuple after the edit."""
        if not self.emptied or id(node) not in self.emptied:
            return node
        return tuple(None if place in self.emptied[id(node)] else each for place, each in enumerate(node))

    def items(self, node: Any, items: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """Returns the (key, value) pairs of a dictionary-like node after the edit."""
        where = id(node)
        kept = [(k, v) for k, v in items if (where, k) not in self.dropped]
        made = [(self.renamed.get((where, k), k), self.values.get((where, k), v)) for k, v in kept]
        return made + self.added.get(where, [])


Stream = list[bytes | Blank]
"""A pickle in parts: its bytes, and between them the bytes of arrays that come later."""


def repickle(root: Any, edit: Edit | None = None) -> bytes:
    """Returns the pickle stream of a tree. Raises FormatError if the tree is nested deeper than Python can walk."""
    return b"".join(part for part in stream(root, edit) if isinstance(part, bytes))


def stream(root: Any, edit: Edit | None = None, *, headers: Sequence[bytes] = (), origin: str = "the pickle") -> Stream:
    """Returns the pickle of a tree in parts. Raises FormatError as :func:`repickle` does.

    ``headers``: texts in UTF-8 at its begin. A loader reads them and drops them. ``origin``: what an error calls the tree.
    """
    writer = _Writer(edit or Edit())
    try:
        for text in headers:
            writer.out.append(b"X" + struct.pack("<I", len(text)) + text + b"0")
        writer.save(root)
    except RecursionError as error:
        raise FormatError(
            f"{origin} is nested too deeply to be written again; write a .safetensors file instead"
        ) from error
    return writer.parts()


class _Writer:
    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.out: Stream = []
        self.memo: dict[Any, int] = {}
        self.alive: list[Any] = []  # keeps memoised nodes alive, because the memo identifies them by id
        self.protocol = 2

    def parts(self) -> Stream:
        """Returns the whole pickle; neighbouring bytes are one part."""
        made: Stream = []
        pending: list[bytes] = [b"\x80" + bytes([self.protocol])]
        for part in (*self.out, b"."):
            if isinstance(part, bytes):
                pending.append(part)
            else:
                made += [b"".join(pending), part]
                pending = []
        return [*made, b"".join(pending)]

    def save(self, node: Any) -> None:
        node = self.edit.replaced.get(id(node), node)
        key = (type(node), node) if isinstance(node, str | bytes | Global) else id(node)
        if key in self.memo:
            index = self.memo[key]
            self.out.append(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))
            return
        save = _SAVERS.get(type(node))
        if save is None:
            raise FormatError(f"a {type(node).__name__} cannot be written into a .pth; write a .safetensors file instead")
        save(self, node, key)

    def memoize(self, key: Any, node: Any) -> None:
        index = self.memo[key] = len(self.memo)
        self.alive.append(node)
        self.out.append(b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def constant(self, node: Any, key: Any) -> None:
        self.out.append({None: b"N", True: b"\x88", False: b"\x89"}[node])

    def integer(self, node: int, key: Any) -> None:
        if 0 <= node < 256:
            self.out.append(b"K" + bytes([node]))
        elif 0 <= node < 65536:
            self.out.append(b"M" + struct.pack("<H", node))
        elif -(1 << 31) <= node < 1 << 31:
            self.out.append(b"J" + struct.pack("<i", node))
        else:
            data = node.to_bytes(node.bit_length() // 8 + 1, "little", signed=True)
            self.out.append(b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data)))
            self.out.append(data)

    def real(self, node: float, key: Any) -> None:
        self.out.append(b"G" + struct.pack(">d", node))

    def string(self, node: str, key: Any) -> None:
        data = node.encode("utf-8", "surrogatepass")
        self.out.append(b"X" + struct.pack("<I", len(data)) + data)
        self.memoize(key, node)

    def octets(self, node: bytes, key: Any) -> None:
        args = (node.decode("latin-1"), "latin1")
        self.call(Global("_codecs", "encode"), args) if node else self.call(Global("__builtin__", "bytes"), ())
        self.memoize(key, node)

    def blank(self, node: Blank, key: Any) -> None:
        self.blank_body(node, b"")
        self.memoize(key, node)

    def blank_body(self, node: Blank, head: bytes) -> None:
        nbytes = len(head) + node.nbytes
        wide = nbytes >= 1 << 32
        self.protocol = max(self.protocol, 4 if wide else 3)
        self.out.append((b"\x8e" + struct.pack("<Q", nbytes) if wide else b"B" + struct.pack("<I", nbytes)) + head)
        self.out.append(node)

    def enclosed(self, node: Enclosed, key: Any) -> None:
        self.save(_LOAD_FROM_BYTES)
        self.blank_body(node, _head_of(node))
        self.out.append(b"\x85R")
        self.memoize(key, node)

    def global_(self, node: Global, key: Any) -> None:
        if not _PLAIN_GLOBAL.fullmatch(f"{node.module}:{node.name}"):  # a line break in a name would end it
            self.protocol = 4
            self.save(node.module)
            self.save(node.name)
            self.out.append(b"\x93")
        else:
            self.out.append(b"c" + node.module.encode() + b"\n" + node.name.encode() + b"\n")
        self.memoize(key, node)

    def call(self, function: Any, args: tuple[Any, ...]) -> None:
        self.save(function)
        self.tuple_body(args)
        self.out.append(b"R")

    def tuple_body(self, items: tuple[Any, ...]) -> None:
        items = tuple(self.edit.members(items))
        if len(items) > 3:
            self.out.append(b"(")
        for item in items:
            self.save(item)
        self.out.append([b")", b"\x85", b"\x86", b"\x87"][len(items)] if len(items) <= 3 else b"t")

    def tuple_(self, node: tuple[Any, ...], key: Any) -> None:
        self.tuple_body(node)
        if node:
            self.memoize(key, node)

    def list_(self, node: list[Any], key: Any) -> None:
        self.out.append(b"]")
        self.memoize(key, node)
        self.elements(node, b"e")

    def elements(self, items: Sequence[Any], opcode: bytes) -> None:
        items = self.edit.members(items)
        for start in range(0, len(items), _BATCH):
            self.out.append(b"(")
            for item in items[start : start + _BATCH]:
                self.save(item)
            self.out.append(opcode)

    def pairs(self, node: Any, items: list[tuple[Any, Any]]) -> None:
        kept = self.edit.items(node, items)
        for start in range(0, len(kept), _BATCH):
            self.out.append(b"(")
            for key, value in kept[start : start + _BATCH]:
                self.save(key)
                self.save(value)
            self.out.append(b"u")

    def dict_(self, node: dict[Any, Any], key: Any) -> None:
        self.out.append(b"}")
        self.memoize(key, node)
        self.pairs(node, list(node.items()))

    def ordered(self, node: OrderedTree, key: Any) -> None:
        self.call(Global("collections", "OrderedDict"), ())
        self.memoize(key, node)
        self.pairs(node, list(node.items()))
        self.state(node.attributes)

    def state(self, state: Any) -> None:
        if state is not MISSING:
            self.save(state)
            self.out.append(b"b")

    def instance(self, node: Instance, key: Any) -> None:
        if node.kind == "call":
            self.call(node.function, node.args)
        else:
            self.save(node.function)
            self.tuple_body(node.args)
            if node.kind == "new_ex":
                self.protocol = 4
                self.save(node.kwargs)
            self.out.append(b"\x92" if node.kind == "new_ex" else b"\x81")
        self.memoize(key, node)
        self.elements(node.elements, b"e")
        self.pairs(node, node.items)
        self.state(node.state)

    def persistent(self, node: PersistentId, key: Any) -> None:
        self.save(node.value)
        self.out.append(b"Q")

    def storage(self, node: StorageRef, key: Any) -> None:
        self.out.append(b"(")
        for part in ("storage", _class_of(node), node.key, "cpu", node.numel):
            self.save(part)
        self.out.append(b"tQ")

    def tensor(self, node: TensorRef, key: Any) -> None:
        wrapper = node.wrapper
        if is_array(node):
            self.instance(call_of(node), key)
            self.state(node.state)
            return
        if is_quantised(node):
            self.instance(wrapper[1], key)
            self.state(node.state)
            return
        if wrapper[:1] in (("parameter",), ("parameter_with_state",)):
            self.save(Global("torch._utils", f"_rebuild_{wrapper[0]}"))
            self.out.append(b"(")
            self.bare_tensor(node, requires_grad=node.requires_grad)
            self.save(node.requires_grad)
            self.save(OrderedTree())
            for part in wrapper[1:]:
                self.save(part)
            self.out.append(b"tR")
        elif wrapper:
            _, _function, kind, state = wrapper
            self.save(_REBUILD_TYPE)
            self.out.append(b"(")
            self.save(_REBUILD_V3 if node.storage.dtype is None else _REBUILD_V2)
            self.save(kind)
            self.tensor_arguments(node, node.requires_grad)
            self.save(state)
            self.out.append(b"tR")
        else:
            self.bare_tensor(node, node.requires_grad)
        self.memoize(key, node)
        self.state(node.state)

    def bare_tensor(self, node: TensorRef, requires_grad: bool) -> None:
        self.save(_REBUILD_V3 if node.storage.dtype is None else _REBUILD_V2)
        self.tensor_arguments(node, requires_grad)
        self.out.append(b"R")

    def tensor_arguments(self, node: TensorRef, requires_grad: bool) -> None:
        parts: list[Any] = [node.storage, node.offset, node.shape, node.strides, requires_grad, OrderedTree()]
        if node.storage.dtype is None:
            parts.append(Global("torch", node.dtype.torch_name))
        self.out.append(b"(")
        for part in parts:
            self.save(part)
        self.out.append(b"t")


_SAVERS: dict[type, Any] = {
    type(None): _Writer.constant,
    bool: _Writer.constant,
    int: _Writer.integer,
    float: _Writer.real,
    str: _Writer.string,
    bytes: _Writer.octets,
    tuple: _Writer.tuple_,
    list: _Writer.list_,
    dict: _Writer.dict_,
    OrderedTree: _Writer.ordered,
    Global: _Writer.global_,
    Instance: _Writer.instance,
    PersistentId: _Writer.persistent,
    StorageRef: _Writer.storage,
    TensorRef: _Writer.tensor,
    Blank: _Writer.blank,
    Enclosed: _Writer.enclosed,
}


@cache
def _begin() -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(map(repickle, (0x1950A86A20F9469CFC6C, 1001, system)))


def _head_of(node: Enclosed) -> bytes:
    """Returns what stands before the elements of a storage in a file of torch's old format.

    torch reads no untyped storage there, which it writes itself for dtypes without a storage class. Bytes serve as well.
    """
    kind = Global("torch", "ByteStorage") if node.dtype is None else _class_of(node)
    own = PersistentId(("storage", kind, "0", "cpu", node.numel, None))
    return _begin() + repickle(own) + repickle(["0"]) + struct.pack("<q", node.numel)


def _class_of(storage: StorageRef) -> Global:
    if storage.dtype is None:
        return Global("torch.storage", "UntypedStorage")
    return Global("torch", storage.kind or storage.dtype.storage_class or "")


def storage_ref(key: str, dtype: DType, numel: int) -> StorageRef:
    """Makes a new storage of ``numel`` elements: typed if torch has a storage class for the dtype, else of bytes."""
    return StorageRef(key, dtype, numel) if dtype.storage_class else StorageRef(key, None, numel * dtype.element_bytes)
