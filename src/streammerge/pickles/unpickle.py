"""The inert unpickler: a pickle stream (protocols 0 to 5) -> the inert tree. Nothing is imported, called or executed.

It is a stack machine over the opcodes of :mod:`pickletools`. It passes over long values of a pickle in a file, and reads
those that are not the bytes of an array in a second round. Names of classes and functions become
:class:`~streammerge.pickles.tree.Global`. Calls become :class:`~streammerge.pickles.tree.Instance`, except those in the
closed table of :mod:`streammerge.pickles.rebuild` and numpy's arrays. Anything unexpected is a FormatError, "damaged
pickle". Each opcode is charged for its memory, so a small file cannot claim a large tree.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from streammerge.errors import FormatError, printable
from streammerge.pickles.arrays import FROM_BUFFER, KEPT_BYTES, RECONSTRUCT, Arrays
from streammerge.pickles.rebuild import Damaged, NotRead, call, set_items, text
from streammerge.pickles.tree import Global, Instance, OrderedTree, PersistentId, TensorRef

MAX_OPCODES = 20_000_000
MAX_PICKLE_BYTES = 1 << 30
FREE_BYTES, BYTES_PER_BYTE = 48 << 20, 64
"""Memory in bytes that a tree may take by :data:`_COST`: a fixed part, plus this many per byte of its pickle on the
disk."""

_MAX_INTEGER_BYTES = 1024
_DAMAGE = (
    IndexError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
    MemoryError,
    EOFError,
)

ResolveId = Callable[[Any], Any]
Enclosed = Callable[[tuple[Any, ...], Callable[[int, int], bytes]], Any]
"""Makes a storage from the arguments of ``torch.storage._load_from_bytes`` and a function that returns bytes of the pickle;
see :mod:`streammerge.pickles.storages`."""


def unpickle(
    source: bytes | BinaryIO,
    resolve: ResolveId = PersistentId,
    where: str = "pickle",
    disk_bytes: int | None = None,
    arrays: Arrays | None = None,
    enclosed: Enclosed | None = None,
) -> Any:
    """Turns one pickle into its inert tree. Leaves a stream directly behind the STOP opcode. Raises FormatError.

    ``disk_bytes``: the compressed size on the disk, if it was compressed; it limits the memory. ``arrays`` makes numpy's
    arrays; it knows where the pickle lies. ``enclosed`` makes the storages whose bytes lie in the pickle.
    """
    stream = _Limited(io.BytesIO(source) if isinstance(source, bytes) else source)
    arrays = arrays or Arrays(where)
    try:
        tree = _Machine(resolve, stream, disk_bytes, arrays, enclosed, set()).run()
        if unclaimed := arrays.unclaimed:
            arrays.begin()
            stream.rewind()
            tree = _Machine(resolve, stream, disk_bytes, arrays, enclosed, unclaimed).run()
    except NotRead as error:
        raise FormatError(f"{where}: {error}; nothing was executed") from error
    except Damaged as error:
        raise FormatError(f"{where}: damaged or hostile pickle ({error}); nothing was executed") from error
    except _DAMAGE as error:
        raise FormatError(
            f"{where}: damaged pickle ({type(error).__name__}: {printable(error)}); nothing was executed"
        ) from error
    return tree


class _Limited:
    """A stream that begins at a pickle. Rejects any length in the pickle beyond the limit or the end of the stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._start = stream, stream.tell()
        self._end = stream.seek(0, io.SEEK_END)
        self.rewind()
        self.byte = partial(stream.read, 1)

    def rewind(self) -> None:
        self._stream.seek(self._start)
        self._left = MAX_PICKLE_BYTES

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def read(self, nbytes: int) -> bytes:
        if nbytes > self._left:
            raise Damaged(f"it claims {nbytes} bytes for one value")
        data = self._stream.read(nbytes)
        self._left -= len(data)
        return data

    def exactly(self, nbytes: int) -> bytes:
        data = self.read(nbytes)
        if len(data) != nbytes:
            raise Damaged(f"it ends in a value of {nbytes} bytes")
        return data

    def skip(self, nbytes: int) -> None:
        at = self._stream.tell()
        if nbytes > self._end - at:
            raise Damaged(f"it ends in a value of {nbytes} bytes")
        self._stream.seek(at + nbytes)

    def peek(self, offset: int, nbytes: int) -> bytes:
        """Returns bytes that were passed over, without moving."""
        at = self._stream.tell()
        self._stream.seek(self._start + offset)
        data = self._stream.read(nbytes)
        self._stream.seek(at)
        return data

    def readline(self) -> bytes:
        return self._stream.readline(max(self._left, 0))


class _Machine:
    """``kept``: the offsets of long values that are read in any case."""

    def __init__(
        self,
        resolve: ResolveId,
        stream: _Limited,
        disk_bytes: int | None,
        arrays: Arrays,
        enclosed: Enclosed | None,
        kept: set[int],
    ) -> None:
        self.resolve, self.enclosed = resolve, enclosed
        self.stream, self.disk_bytes = stream, disk_bytes
        self.arrays, self.kept = arrays, kept
        self.cost = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.shells: dict[int, list[int]] = {}
        """The places in the memo of arrays whose content has not come yet, by their id."""

    def charge(self, nbytes: int) -> None:
        """Charges memory, because one byte of a pickle can make an object of hundreds of bytes."""
        self.cost += nbytes
        if self.cost > FREE_BYTES:
            explained = self.disk_bytes
            if explained is None:
                explained = self.stream.tell() - self.arrays.left_bytes
            if self.cost > FREE_BYTES + BYTES_PER_BYTE * explained:
                raise Damaged("it would take far more memory than its size explains")

    def run(self) -> Any:
        byte, known, stream = self.stream.byte, _OPCODES, self.stream
        for _ in range(MAX_OPCODES):
            code = byte()
            found = known.get(code)
            if found is None:
                raise ValueError(f"opcode {code!r} is unknown" if code else "it ends before STOP")
            name, read, cost, action = found
            self.cost += cost
            if self.cost > FREE_BYTES:
                self.charge(0)
            if action is not None:
                action(self, None if read is None else read(stream))
            elif name in _LENGTHS:
                self.stack.append(self.value(name))
            elif name in _PUSHED:
                self.stack.append(_PUSHED[name](None if read is None else read(stream)))
            elif name == "STOP":
                return self.stack.pop()
            else:
                raise Damaged(f"opcode {name} is refused")
        raise Damaged(f"more than {MAX_OPCODES} opcodes")

    def value(self, name: str) -> Any:
        """Reads a text or bytes; passes over a long one in a file."""
        size, form = _LENGTHS[name]
        nbytes = int.from_bytes(self.stream.exactly(size), "little", signed=name == "BINSTRING")
        if nbytes < 0:
            raise Damaged(f"it claims {nbytes} bytes for one value")
        arrays = self.arrays
        if nbytes > KEPT_BYTES and arrays.offset is not None and (at := self.stream.tell()) not in self.kept:
            self.stream.skip(nbytes)
            data: Any = arrays.payload(at, nbytes, form)
        elif form == "text":
            octets = self.stream.exactly(nbytes)
            if self.enclosed is not None and octets.startswith(_STORAGE) and arrays.offset is not None:
                at = self.stream.tell() - nbytes
                if at not in self.kept:
                    return arrays.payload(at, nbytes, form)
            return octets.decode("utf-8", "surrogatepass")
        elif name.endswith("STRING"):
            return _python2_text(self.stream.exactly(nbytes).decode("latin-1"))
        else:
            at = self.stream.tell()
            data = arrays.raw(self.stream.exactly(nbytes), at)
        return Instance("call", _BYTEARRAY, (data,)) if name == "BYTEARRAY8" else data

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def discard(self, _: Any) -> None:
        self.pop_mark()

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, _: Any) -> None:
        self.put(len(self.memo))

    def put(self, index: Any) -> None:
        index = index if index.__class__ is int else int(index)
        value = self.memo[index] = self.stack[-1]
        if value.__class__ is Instance and value.path in RECONSTRUCT:
            self.shells.setdefault(id(value), []).append(index)

    def get(self, index: Any) -> None:
        self.stack.append(self.memo[index if index.__class__ is int else int(index)])

    def pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def tuple_of(self, size: int | None) -> None:
        if size is None:
            items = self.pop_mark()
        else:
            if len(self.stack) < size:
                raise Damaged("the stack is too short")
            items = self.stack[len(self.stack) - size :]
            del self.stack[len(self.stack) - size :]
        self.stack.append(tuple(items))

    def list_of(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def dict_of(self, _: Any) -> None:
        made: dict[Any, Any] = {}
        pairs = _pairs(self.pop_mark())
        self.charge_members([value for _, value in pairs], _COST_OF_PAIR)
        set_items(made, pairs)
        self.stack.append(made)

    def set_of(self, path: str) -> None:
        members = self.pop_mark()
        self.stack.append(Instance("call", Global("builtins", path), (members,)))

    def empty_set(self, _: Any) -> None:
        self.stack.append(Instance("call", Global("builtins", "set"), ([],)))

    def global_(self, arg: str) -> None:
        self.stack.append(_global(arg))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(text(module), text(name)))

    def inst(self, arg: str) -> None:
        self.call(_global(arg), tuple(self.pop_mark()))

    def obj(self, _: Any) -> None:
        function, *args = self.pop_mark()
        self.call(function, tuple(args))

    def reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise Damaged("a call without a tuple of arguments")
        self.call(function, args)

    def call(self, function: Any, args: tuple[Any, ...]) -> None:
        """Pushes the result of a call. Charges its arguments, because the same long argument can be passed many times."""
        self.charge(sum(len(a) * _COST_OF_PART.get(type(a), 0) for a in args if isinstance(a, str | tuple | list)))
        made = None
        if isinstance(function, Global) and function.path in FROM_BUFFER:
            made = self.arrays.from_buffer(args, self.stream.tell())
        elif self.enclosed is not None and isinstance(function, Global) and function.path == _LOAD_FROM_BYTES:
            made = self.enclosed(args, self.stream.peek)
        self.stack.append(call(function, args) if made is None else made)

    def newobj(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise Damaged("an object without a tuple of arguments")
        made: Any = Instance("new", function, args)
        if isinstance(function, Global) and function.path == "collections.OrderedDict" and not args:
            made = OrderedTree()
        self.stack.append(made)

    def newobj_ex(self, _: Any) -> None:
        kwargs, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise Damaged("an object with malformed arguments")
        self.stack.append(Instance("new_ex", function, args, kwargs))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, OrderedTree):
            target.attributes = state
        elif isinstance(target, Instance) and target.path in RECONSTRUCT:
            made = self.arrays.built(target, state, self.stream.tell())
            if made is None:
                target.state = state
                return
            self.stack[-1] = made
            for index in self.shells.pop(id(target), ()):
                self.memo[index] = made
        elif isinstance(target, Instance | TensorRef):
            target.state = state
        else:
            raise Damaged(f"it sets attributes of a {type(target).__name__}")

    def setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.charge_members([value], _COST_OF_PAIR)
        set_items(self.stack[-1], [(key, value)])

    def setitems(self, _: Any) -> None:
        pairs = _pairs(self.pop_mark())
        self.charge_members([value for _, value in pairs], _COST_OF_PAIR)
        set_items(self.stack[-1], pairs)

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self.charge_members([value], 0)
        _extend(self.stack[-1], [value])

    def appends(self, _: Any) -> None:
        items = self.pop_mark()
        self.charge_members(items, 0)
        _extend(self.stack[-1], items)

    def charge_members(self, values: list[Any], each: int) -> None:
        """Charges members. Every mention of a tensor becomes an entry of the checkpoint, repeated mentions too."""
        self.charge(len(values) * each + sum(_COST_OF_ENTRY for v in values if isinstance(v, TensorRef)))

    def additems(self, _: Any) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, Instance):
            raise Damaged("it adds members to something that is not a set")
        _extend(target.args[0] if target.path == "builtins.set" and target.args else target, items)

    def persistent(self, pid: Any) -> None:
        self.stack.append(self.resolve(self.stack.pop() if pid is None else pid))


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise Damaged("a key without a value")
    return list(zip(items[::2], items[1::2], strict=True))


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, Instance):
        target.elements.extend(values)
    else:
        raise Damaged(f"it appends to a {type(target).__name__}")


def _global(arg: str) -> Global:
    module, _, name = arg.partition(" ")
    return Global(text(module), text(name))


def _python2_text(arg: Any) -> Any:
    if isinstance(arg, bytes):
        return arg.decode("utf-8", errors="surrogateescape")
    try:
        return arg.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return arg


def _itself(arg: Any) -> Any:
    return arg


def _integer(arg: int) -> int:
    if arg.bit_length() > 8 * _MAX_INTEGER_BYTES:
        raise Damaged(f"an integer of more than {_MAX_INTEGER_BYTES} bytes")
    return arg


_BYTEARRAY = Global("builtins", "bytearray")
_LOAD_FROM_BYTES = "torch.storage._load_from_bytes"
_STORAGE = "\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".encode()
"""The begin of a storage in a pickle of protocol 2, where bytes are a text. A short one is passed over too."""
_LENGTHS = {
    "SHORT_BINUNICODE": (1, "text"),
    "BINUNICODE": (4, "text"),
    "BINUNICODE8": (8, "text"),
    "SHORT_BINBYTES": (1, "raw"),
    "BINBYTES": (4, "raw"),
    "BINBYTES8": (8, "raw"),
    "BYTEARRAY8": (8, "raw"),
    "SHORT_BINSTRING": (1, "raw"),
    "BINSTRING": (4, "raw"),
}
"""Opcodes of texts and bytes: how many bytes their length takes, and the form of what follows."""

# Bytes of memory per opcode in CPython 3.11: the object, its place on the stack and in the memo.
_COST_OF_OTHERS = 16
_COST = {
    "EMPTY_SET": 500,
    **dict.fromkeys(["FROZENSET", "BYTEARRAY8"], 450),
    **dict.fromkeys(["REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX", "BINPERSID", "PERSID"], 300),
    **dict.fromkeys(["MEMOIZE", "PUT", "LONG_BINPUT", "GLOBAL", "STACK_GLOBAL", "LIST", "EMPTY_LIST", "EMPTY_DICT"], 110),
    **dict.fromkeys(["MARK", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"], 70),
    **dict.fromkeys(["BINFLOAT", "BININT", "BININT2", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES"], 50),
}
_COST_OF_PAIR, _COST_OF_ENTRY = 100, 600
_COST_OF_PART: dict[type, int] = {str: 1, list: 100, tuple: 100}


_PUSHED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["INT", "LONG", "LONG1", "LONG4"], _integer),
    **dict.fromkeys(["BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"], _itself),
    "UNICODE": _itself,
    "STRING": _python2_text,
    "NONE": lambda arg: None,
    "NEWTRUE": lambda arg: True,
    "NEWFALSE": lambda arg: False,
    "EMPTY_LIST": lambda arg: [],
    "EMPTY_DICT": lambda arg: {},
    "EMPTY_TUPLE": lambda arg: (),
}

_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.discard,
    "DUP": _Machine.dup,
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], _Machine.put),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], _Machine.get),
    "TUPLE": lambda machine, arg: machine.tuple_of(None),
    "TUPLE1": lambda machine, arg: machine.tuple_of(1),
    "TUPLE2": lambda machine, arg: machine.tuple_of(2),
    "TUPLE3": lambda machine, arg: machine.tuple_of(3),
    "LIST": _Machine.list_of,
    "DICT": _Machine.dict_of,
    "EMPTY_SET": _Machine.empty_set,
    "FROZENSET": lambda machine, arg: machine.set_of("frozenset"),
    "ADDITEMS": _Machine.additems,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BUILD": _Machine.build,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    **dict.fromkeys(["PERSID", "BINPERSID"], _Machine.persistent),
}

_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["BINGET", "BINPUT", "BININT1"], lambda stream: stream.exactly(1)[0]),
    **dict.fromkeys(["LONG_BINGET", "LONG_BINPUT"], lambda stream: int.from_bytes(stream.exactly(4), "little")),
    "BININT2": lambda stream: int.from_bytes(stream.exactly(2), "little"),
}
"""Readers of frequent arguments that are quicker than those of :mod:`pickletools`."""

_OPCODES: dict[bytes, tuple[str, Callable[[Any], Any] | None, int, Callable[[_Machine, Any], None] | None]] = {
    each.code.encode("latin-1"): (
        each.name,
        _READERS.get(each.name, each.arg.reader) if each.arg else None,
        _COST.get(each.name, _COST_OF_OTHERS),
        _ACTIONS.get(each.name),
    )
    for each in pickletools.opcodes
}
"""Code -> name, the reader of the argument, the memory that is charged, and what the opcode does."""
