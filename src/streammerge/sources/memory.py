"""A tensor that the caller holds in memory: a numpy array or a torch tensor, copied piece by piece."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.errors import FormatError, printable
from streammerge.sources.base import Allocated, BlobPath, Needs, Reader, Room, Source, boxes, read_whole
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType
from streammerge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Memory(Source):
    """A tensor in memory. ``values``: the array or tensor, of any strides, on any device. ``label``: the name of its
    checkpoint in messages.

    Readers copy only the requested elements, so that no method can change the caller's numbers. If the caller changes
    the values during the run, the changed values are read.
    :func:`in_memory` makes it.
    """

    spec: TensorSpec
    values: Any
    label: str = "memory"

    def needs(self) -> Needs:
        return Needs(computes=True)

    def open(self, room: Room) -> Reader:
        return _Torch(self) if is_tensor(self.values) else _Numpy(self)

    def __reduce__(self) -> Any:
        """Pickles the numbers of the view in C order, because plain pickle writes whole storages and lacks some dtypes."""
        return _restored, (self.spec, bytes(read_whole(self, Allocated())), self.label)

    @property
    def held(self) -> bool:
        return True

    @property
    def begin(self) -> tuple[BlobPath, int]:
        return self.label, 0

    @property
    def paths(self) -> tuple[BlobPath, ...]:
        return (self.label,)

    @property
    def place(self) -> tuple[object, ...]:
        return ("Memory", *_where(self.values), self.spec.dtype, self.spec.shape)


def _restored(spec: TensorSpec, data: bytes, label: str) -> Memory:
    import torch

    numbers = torch.frombuffer(bytearray(data), dtype=spec.dtype.torch) if data else torch.empty(0, dtype=spec.dtype.torch)
    return Memory(spec, numbers.view(spec.shape), label)


def is_tensor(value: object) -> bool:
    """Whether it is a torch tensor. Does not import torch: before torch is imported there is no tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: object) -> bool:
    """Whether it is a numpy array or a numpy number. Does not import numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)


def in_memory(name: str, values: Any, label: str = "memory") -> Source:
    """Returns the source of an array or tensor. A quantised tensor is its numbers in float32.

    Raises FormatError for numbers that are not plain: sparse, on the meta device, of another byte order or of an unknown
    dtype.
    """
    what = f"{label}: tensor {printable(name)}"
    if is_tensor(values):
        if isinstance(values, sys.modules["torch"].nn.parameter.UninitializedTensorMixin):
            raise FormatError(f"{what} is an uninitialised parameter of a lazy module; call the module once, then merge it")
        values = values.detach()
        if is_unread(values):
            raise FormatError(f"{what} is sparse, nested or without numbers; give an ordinary tensor")
        if values.is_quantized:
            return _quantised(name, values, label)
        dtype, shape = BY_TORCH_NAME.get(str(values.dtype).removeprefix("torch.")), tuple(values.shape)
    else:
        if values.dtype.byteorder == ">":
            raise FormatError(f"{what} has big-endian numbers; give .astype(array.dtype.newbyteorder('<'))")
        values = sys.modules["numpy"].asarray(values)
        dtype, shape = BY_TORCH_NAME.get(str(values.dtype.name)), tuple(map(int, values.shape))
    if dtype is None:
        raise FormatError(f"{what} has the dtype {printable(values.dtype)}, which no checkpoint can hold")
    return Memory(TensorSpec(name, dtype, shape), values, label)


def is_unread(values: Any) -> bool:
    """Whether a torch tensor is of a kind that is not read: sparse, nested, or without numbers."""
    quantised = values.is_quantized and str(values.dtype).removeprefix("torch.") not in _INTEGERS
    return values.layout is not _strided_layout() or values.is_nested or values.device.type == "meta" or quantised


_INTEGERS = {"qint8": DType.I8, "quint8": DType.U8, "qint32": DType.I32}


def _quantised(name: str, values: Any, label: str) -> Source:
    """Returns the numbers of a quantised tensor. Its integers are read where they lie, if they lie in C order."""
    from streammerge.sources.affine import affine  # here, because few tensors are quantised

    dtype = _INTEGERS[str(values.dtype).removeprefix("torch.")]
    in_place = values.is_contiguous() and values.device.type == "cpu"
    integers = Memory(TensorSpec(name, dtype, tuple(values.shape)), values if in_place else values.int_repr(), label)
    if "channel" not in str(values.qscheme()):
        return affine(name, integers, values.q_scale(), values.q_zero_point())
    scales, zeros = (
        in_memory(name, each, label) for each in (values.q_per_channel_scales(), values.q_per_channel_zero_points())
    )
    return affine(name, integers, scales=scales, zeros=zeros, axis=values.q_per_channel_axis())


def _strided_layout() -> Any:
    import torch

    return torch.strided


def _where(values: Any) -> tuple[object, ...]:
    """Returns a key that is equal for two arrays over the same numbers."""
    if is_tensor(values):
        lazy = (values.is_conj(), values.is_neg())
        return (str(values.device), values.data_ptr(), tuple(values.stride()), lazy)
    return ("cpu", values.__array_interface__["data"][0], tuple(values.strides))


class _Torch(Reader):
    def __init__(self, source: Memory) -> None:
        self._tensor: torch.Tensor = source.values
        self._shape, self._size = source.spec.shape, source.spec.dtype.element_bytes
        tensor = self._tensor
        in_place = tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        self._octets: memoryview | None = None
        if in_place and tensor.numel():  # by its address, because torch gives its memory only to numpy
            self._octets = memoryview((ctypes.c_ubyte * source.nbytes).from_address(tensor.data_ptr())).cast("B")

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        if self._octets is not None:
            out[:] = self._octets[start * self._size : stop * self._size]
            return out
        numbers, done = torch.frombuffer(out, dtype=self._tensor.dtype), 0
        for box in boxes(self._shape, start, stop):
            part = self._tensor[tuple(slice(a, b) for a, b in box)]
            numbers[done : done + part.numel()].view(part.shape).copy_(part)
            done += part.numel()
        return out


class _Numpy(Reader):
    def __init__(self, source: Memory) -> None:
        import numpy

        self._size = source.spec.dtype.element_bytes
        array = numpy.asarray(source.values)
        self._shape = array.shape
        self._array = array.view(f"V{self._size}")  # moved as bytes, also where numpy does not know the dtype
        self._octets: memoryview | None = None
        if array.flags.c_contiguous:
            self._octets = array.reshape(-1).view(numpy.uint8).data

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import numpy

        if self._octets is not None:
            out[:] = self._octets[start * self._size : stop * self._size]
            return out
        numbers, done = numpy.frombuffer(out, dtype=f"V{self._size}"), 0
        for box in boxes(self._shape, start, stop):
            part = self._array[tuple(slice(a, b) for a, b in box)]
            numbers[done : done + part.size].reshape(part.shape)[...] = part
            done += part.size
        return out
