"""numpy's arrays in a pickle. Their bytes lie inside the pickle, and are left there where it is in a file.

An array becomes a :class:`~streammerge.pickles.tree.TensorRef`. Its ``entry`` is its source, and its ``wrapper`` says how
numpy makes it again. Arrays of objects, texts, dates and records stay inert instances.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from streammerge.pickles.tree import MISSING, Blank, Global, Instance, StorageRef, TensorRef
from streammerge.sources.base import BlobPath, Source
from streammerge.sources.deflated import Deflated, PackedRecord, of_bytes, swapped
from streammerge.sources.inline import Inline
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides, is_contiguous

KEPT_BYTES = 64 << 10
"""Longer values of a pickle in a file are not read with it."""

_CODES = {
    "f8": DType.F64,
    "f4": DType.F32,
    "f2": DType.F16,
    "c16": DType.C128,
    "c8": DType.C64,
    "i8": DType.I64,
    "i4": DType.I32,
    "i2": DType.I16,
    "i1": DType.I8,
    "u8": DType.U64,
    "u4": DType.U32,
    "u2": DType.U16,
    "u1": DType.U8,
    "b1": DType.BOOL,
}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_RECONSTRUCT = Global("numpy.core.multiarray", "_reconstruct")
_NDARRAY = Global("numpy", "ndarray")
_DTYPE = Global("numpy", "dtype")
_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}
_MOST_DIMENSIONS = 64


@dataclass(slots=True, eq=False, repr=False)
class Payload:
    """A value of a pickle that was not read: ``nbytes`` bytes from ``offset`` of its file.

    ``form``: "raw", or "text", which has a character for each byte and is written in UTF-8.
    """

    offset: int
    nbytes: int
    form: str

    def __repr__(self) -> str:
        return f"<{self.nbytes} bytes>"


class Arrays:
    """Makes the arrays of one pickle, and remembers their sources.

    ``path`` and ``offset``: where the pickle begins in its file. Without an offset the pickle is in memory, because it is
    compressed in its file, and ``path`` serves messages; ``in_memory``: because it is in no file at all.
    """

    def __init__(self, path: BlobPath = "pickle", offset: int | None = None, in_memory: bool = False) -> None:
        self.path, self.offset, self.in_memory = path, offset, in_memory
        self.sources: list[Source] = []
        self.left_bytes = 0
        self._raw: dict[int, tuple[bytes, int]] = {}
        self._open: dict[int, Payload] = {}

    def begin(self) -> None:
        """Forgets everything, because the pickle is read again."""
        self.__init__(self.path, self.offset, self.in_memory)  # type: ignore[misc]

    def payload(self, at: int, nbytes: int, form: str) -> Payload:
        """Returns a value that stays in the file. ``at``: its offset in the pickle."""
        made = Payload((self.offset or 0) + at, nbytes, form)
        self._open[id(made)] = made
        self.left_bytes += nbytes
        return made

    def raw(self, data: bytes, at: int) -> bytes:
        """Remembers where in the file a short value lies. One array gets these bytes: Python keeps equal single bytes once,
        so that a pickle may mention the bytes of one array for another one."""
        if self.offset is not None and data:
            self._raw[id(data)] = (data, self.offset + at)
        return data

    def place_of(self, data: Any) -> Payload | None:
        """Returns where the bytes of something else than an array lie in the file. None if they are in no file."""
        if isinstance(data, Payload):
            self._open.pop(id(data), None)
            return data
        known = self._raw.get(id(data))
        return None if known is None else Payload(known[1], len(known[0]), "raw")

    @property
    def notes(self) -> list[str]:
        """Returns a sentence about arrays that cannot be read in place."""
        count = sum(isinstance(source, Deflated) for source in self.sources)
        told = f"{count} of its arrays are texts or big-endian; they are unpacked into a temporary file first"
        return [told] if count else []

    @property
    def unclaimed(self) -> set[int]:
        """Offsets in the pickle of the values that belong to no array, so that they have to be read."""
        return {payload.offset - (self.offset or 0) for payload in self._open.values()}

    def built(self, shell: Instance, state: Any, at: int) -> TensorRef | None:
        """Returns the array that ``numpy.core.multiarray._reconstruct`` and its state make; None for an array without
        plain numbers. ``at``: the offset in the pickle, which is its identity."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            return None
        shape, kind, fortran, data = state[-4:]
        return self._array(shape, kind, fortran is True or fortran == 1, data, at, (shell.function, shell.args))

    def from_buffer(self, args: tuple[Any, ...], at: int) -> TensorRef | None:
        """Returns the array that ``numpy.core.numeric._frombuffer`` makes; None for an array without plain numbers."""
        if len(args) != 4:
            return None
        data, kind, shape, order = args
        return self._array(shape, kind, order == "F", data, at, (_RECONSTRUCT, (_NDARRAY, (0,), b"b")))

    def _array(
        self, shape: Any, kind: Any, fortran: bool, data: Any, at: int, made_by: tuple[Any, tuple[Any, ...]]
    ) -> TensorRef | None:
        told = dtype_of(kind)
        if told is None or not _is_shape(shape):
            return None
        dtype, swapped_bytes = told
        spec = TensorSpec("", dtype, shape)
        strides = tuple(reversed(contiguous_strides(tuple(reversed(shape))))) if fortran else contiguous_strides(shape)
        entry = self._source(spec, strides, swapped_bytes, data, at)
        if entry is None:
            return None
        self.sources.append(entry)
        if swapped_bytes > 1 and isinstance(entry, Inline):
            kind = numpy_dtype(dtype)  # its bytes are in order now
        return TensorRef(StorageRef("", None, 0), dtype, 0, shape, (), wrapper=("array", *made_by, kind), entry=entry)

    def _source(self, spec: TensorSpec, strides: tuple[int, ...], swapped_bytes: int, data: Any, at: int) -> Source | None:
        """Returns the source of an array; None if the bytes are not as long as the array."""
        nbytes, data = spec.nbytes, _contents(data)
        if isinstance(data, Payload):
            if data.nbytes != nbytes if data.form == "raw" else not nbytes <= data.nbytes <= 2 * nbytes:
                return None
            self._open.pop(id(data), None)
            plain = data.form == "raw" and swapped_bytes == 1
            record = None if plain else PackedRecord(data.offset, data.nbytes, nbytes, data.form, swapped_bytes)
            return of_bytes(spec, self.path, data.offset if plain else 0, strides, record)
        octets, known = _octets(data, nbytes), self._raw.pop(id(data), None)
        if octets is None:
            return None
        if known is not None and swapped_bytes == 1:
            return of_bytes(spec, self.path, known[1], strides)
        ordered = in_c_order(swapped(octets, swapped_bytes), spec, strides)
        return Inline(spec, self.path, (self.offset or 0) + at, ordered, self.in_memory)


def dtype_of(kind: Any) -> tuple[DType, int] | None:
    """Returns the dtype that a pickled ``numpy.dtype`` means, and the size in bytes of its numbers if they are big-endian,
    else 1. Returns None for a dtype without plain numbers."""
    if not isinstance(kind, Instance) or kind.path != "numpy.dtype" or not kind.args:
        return None
    code = kind.args[0]
    if isinstance(code, Global):  # of the package ml_dtypes
        dtype = BY_TORCH_NAME.get(code.name) if code.module == "ml_dtypes" else None
    else:
        dtype = _CODES.get(code) if isinstance(code, str) else None
    state = () if kind.state is MISSING else kind.state
    if dtype is None or not isinstance(state, tuple) or (len(state) >= 4 and (state[2], state[3]) != (None, None)):
        return None
    big = len(state) >= 2 and state[1] == ">"
    return dtype, dtype.component.element_bytes if big else 1


def unread_kind(node: Any) -> str:
    """Returns what an array that is not read holds, if that may be numbers: "objects", "records", "masked numbers" or
    numbers of an unknown dtype; else ""."""
    if not isinstance(node, Instance):
        return ""
    if node.path == "numpy.ma.core._mareconstruct":
        return "masked numbers"
    if node.path not in RECONSTRUCT or not isinstance(node.state, tuple) or len(node.state) < 4:
        return ""
    kind = node.state[-3]
    code = str(kind.args[0]) if isinstance(kind, Instance) and kind.args else ""
    return {"O": "objects", "V": "records", "f": f"{code} numbers", "c": f"{code} numbers"}.get(code[:1], "")


def numpy_dtype(dtype: DType) -> Instance | None:
    """Returns the pickled ``numpy.dtype``; None for a dtype that numpy lacks."""
    code = _CODE_OF.get(dtype)
    if code is None:
        return None
    order = "|" if dtype.element_bytes == 1 else "<"
    made = Instance("call", _DTYPE, (code, False, True))
    made.state = (3, order, None, None, None, -1, -1, 0)
    return made


RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")


def is_array(node: Any) -> bool:
    """Whether a node of a tree is an array of numpy."""
    return isinstance(node, TensorRef) and node.wrapper[:1] == ("array",)


def array_over(blank: Blank, dtype: DType, shape: tuple[int, ...], like: TensorRef | None, kind: Any) -> TensorRef:
    """Returns an array in C order over bytes that come later, of the class of ``like`` if that is an array.

    ``kind``: its pickled dtype.
    """
    made_by = like.wrapper[1:3] if like is not None and is_array(like) else (_RECONSTRUCT, (_NDARRAY, (0,), b"b"))
    state = like.state if like is not None and is_array(like) else MISSING
    return TensorRef(blank, dtype, 0, shape, (), wrapper=("array", *made_by, kind), state=state)


def call_of(node: TensorRef) -> Instance:
    """Returns the call in a pickle that makes an array."""
    _, function, args, kind = node.wrapper
    data = node.entry.data if isinstance(node.entry, Inline) else node.storage
    return Instance("call", function, args, state=(1, node.shape, kind, False, data))


def native(kind: Any, dtype: DType) -> bool:
    """Whether a pickled dtype is the little-endian ``dtype``."""
    return dtype_of(kind) == (dtype, 1)


def in_c_order(data: bytes, spec: TensorSpec, strides: tuple[int, ...]) -> bytes:
    """Returns the bytes of an array of these strides in C order."""
    if not spec.numel or is_contiguous(spec.shape, strides):
        return data
    size = min(spec.dtype.element_bytes, 8)
    shape, numbers = spec.shape, memoryview(array(_UNSIGNED[size], data))
    if spec.dtype.element_bytes > size:  # complex128: two numbers of eight bytes
        shape, strides = (*shape, 2), (*(2 * stride for stride in strides), 1)
    return b"".join(
        numbers[begin : begin + (shape[-1] - 1) * strides[-1] + 1 : strides[-1]].tobytes()
        for begin in _begins(shape[:-1], strides)
    )


def _begins(shape: tuple[int, ...], strides: tuple[int, ...], begin: int = 0) -> Iterator[int]:
    """Yields the place of the first number of each row."""
    if not shape:
        yield begin
        return
    for number in range(shape[0]):
        yield from _begins(shape[1:], strides[1:], begin + number * strides[0])


def _contents(data: Any) -> Any:
    """The bytes in a pickled bytearray."""
    if isinstance(data, Instance) and data.path == "builtins.bytearray" and len(data.args) == 1:
        return data.args[0]
    return data


def _octets(data: Any, nbytes: int) -> bytes | None:
    """Returns the bytes of an array that were read with the pickle; None if they are not of the array's length."""
    if isinstance(data, Instance) and data.path == "builtins.bytes" and not data.args:
        data = b""
    if isinstance(data, str):  # of Python 2, whose bytes were read as a text in UTF-8 if possible, else in latin-1
        try:
            data = data.encode("latin-1" if len(data) == nbytes else "utf-8")
        except UnicodeError:
            return None
    return data if isinstance(data, bytes) and len(data) == nbytes else None


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        return False
    natural = all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    return natural and prod(size for size in shape if size) < 1 << 60
