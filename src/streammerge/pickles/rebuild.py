"""Results of the known calls in a pickle: torch's storages and tensors, ordered dictionaries, bytes.

The table of calls is closed, and results are computed from the arguments alone. A call to anything else stays an inert
:class:`~streammerge.pickles.tree.Instance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from streammerge.errors import printable
from streammerge.pickles.arrays import Payload
from streammerge.pickles.tree import (
    QUANTISED,
    Global,
    Instance,
    OrderedTree,
    PersistentId,
    StorageRef,
    TensorRef,
    is_quantised,
)
from streammerge.tensors.dtypes import BY_STORAGE_CLASS, BY_TORCH_NAME, DType
from streammerge.tensors.spec import TensorSpec

MAX_NAME = 1000
"""Maximum number of characters in the name of a class, a function or a storage."""

_KEY_PARTS = 64

_INTEGERS = {  # the storages of quantised tensors hold these; two of 4 bits or four of 2 bits in a byte are not read
    "QInt8Storage": DType.I8,
    "QUInt8Storage": DType.U8,
    "QInt32Storage": DType.I32,
    "QUInt4x2Storage": DType.U8,
    "QUInt2x4Storage": DType.U8,
}


class Damaged(ValueError):
    """The stream is impossible. Callers turn it into a FormatError that names the file."""


class NotRead(Damaged):
    """The stream is whole, but of a form that is not read."""


class StorageTable:
    """Turns torch's persistent ids into one StorageRef per storage, and remembers all of them."""

    def __init__(self) -> None:
        self.refs: dict[tuple[str, int, int], StorageRef] = {}

    def __call__(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid or pid[0] not in ("storage", "module"):
            return PersistentId(pid)
        if pid[0] == "module":  # in files from before torch 1.6: a class with its source code
            return pid[1]
        _, kind, key, _location, numel, *rest = pid
        dtype = storage_dtype(kind)
        key, view_offset = text(key), 0
        if rest and rest[0] is not None:
            _view_key, view_offset, _view_numel = rest[0]
        own = kind.name if isinstance(kind, Global) and kind.name in _INTEGERS else ""
        return self.add(StorageRef(key, dtype, natural(numel), natural(view_offset), own))

    def add(self, ref: StorageRef) -> StorageRef:
        known = self.refs.setdefault((ref.key, ref.view_offset, ref.numel), ref)
        if known.dtype != ref.dtype:
            raise Damaged(f"storage {ref.key} is named with two dtypes")
        return known


def storage_dtype(kind: Any) -> Any:
    """Returns the dtype of ``torch.FloatStorage`` and similar classes; None for an untyped storage. Raises Damaged."""
    if not isinstance(kind, Global) or kind.module.partition(".")[0] != "torch":
        raise Damaged("a storage of an unknown class")
    if kind.name == "UntypedStorage":
        return None
    dtype = BY_STORAGE_CLASS.get(kind.name) or _INTEGERS.get(kind.name)
    if dtype is None:
        raise Damaged(f"a storage of class {printable(kind.path)}, which is not supported")
    return dtype


def text(value: Any) -> str:
    """Checks a name and returns it as text. Python 2 byte strings, which pickletools reads as latin-1, are decoded as
    utf-8 if possible."""
    if isinstance(value, bytes):
        value = value[: MAX_NAME + 1].decode("utf-8", errors="surrogateescape")
    if not isinstance(value, str):
        raise Damaged("a name is not a string")
    if len(value) > MAX_NAME:
        raise Damaged(f"a name of more than {MAX_NAME} characters")
    return value


def set_items(target: Any, pairs: list[tuple[Any, Any]]) -> None:
    for key, _ in pairs:
        _check_key(key)
    if isinstance(target, dict):
        target.update(pairs)
    elif isinstance(target, Instance):
        target.items.extend(pairs)
    else:
        raise Damaged(f"it sets items of a {type(target).__name__}")


def _check_key(key: Any, parts: int = _KEY_PARTS) -> int:
    """Checks a dictionary key; returns how many parts it may still have.

    Hashing a nested tuple visits all of it, so a small hostile file could make it endless.
    """
    if isinstance(key, tuple):
        for part in key:
            parts = _check_key(part, parts - 1)
    elif isinstance(key, list | dict):
        raise Damaged(f"a {type(key).__name__} as a dictionary key")
    elif isinstance(key, int) and key.bit_length() > 64:
        raise Damaged("a huge number as a dictionary key")
    if parts < 0:
        raise Damaged("a dictionary key is nested too deeply")
    return parts


def natural(value: Any) -> int:
    """Returns a size or an offset; raises Damaged if it is not one."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise Damaged("a size or offset is not a natural number")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if isinstance(values, Instance) and values.path == "torch.Size" and values.args:
        values = values.args[0]
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise Damaged("a shape is not a tuple")
    return tuple(natural(v) for v in values)


def _check_storage(storage: Any) -> None:
    if isinstance(storage, Instance) and storage.path == "torch.storage._load_from_bytes":
        raise NotRead(
            "its tensors of torch were pickled without torch.save; load it in Python and write it again with torch.save"
        )
    if not isinstance(storage, StorageRef):
        raise Damaged("a tensor without a storage")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *rest: Any) -> TensorRef:
    if isinstance(storage, PersistentId) and isinstance(storage.value, str):
        raise NotRead("its storages are named as text, which pickle protocol 0 does and torch itself cannot read back")
    _check_storage(storage)
    shape, strides = _counts(size), _counts(stride)
    if len(shape) != len(strides):
        raise Damaged("a tensor's shape and strides differ in length")
    if storage.dtype is None:
        raise Damaged("a tensor over an untyped storage without a dtype")
    if math.prod(n for n in shape if n) >= 1 << 60:
        raise Damaged("a tensor's size overflows")
    metadata = rest[1] if len(rest) > 1 and isinstance(rest[1], dict) else {}
    lazy = "conjugated" if metadata.get("conj") else "negated" if metadata.get("neg") else ""
    return TensorRef(storage, storage.dtype, natural(offset), shape, strides, requires_grad is True, lazy=lazy)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, rg: Any, hooks: Any, dtype: Any, *rest: Any) -> TensorRef:
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in BY_TORCH_NAME:
        raise Damaged(f"a tensor of unknown dtype {printable(getattr(dtype, 'path', dtype))}")
    _check_storage(storage)
    typed = StorageRef(storage.key, BY_TORCH_NAME[dtype.name], storage.numel, storage.view_offset)
    made = _tensor(typed, offset, size, stride, rg, hooks, *rest)
    made.storage = storage
    return made


def _wrap(data: Any, *wrapper: Any, requires_grad: Any = None) -> Any:
    """Returns a copy of the tensor with its wrapper. It is a copy because the bare tensor may be used elsewhere too."""
    if not isinstance(data, TensorRef) or is_quantised(data):
        return None
    grad = data.requires_grad if requires_grad is None else requires_grad is True
    return TensorRef(data.storage, data.dtype, data.offset, data.shape, data.strides, grad, wrapper, data.lazy)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return _wrap(data, "parameter", requires_grad=requires_grad)


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
    return _wrap(data, "parameter_with_state", state, requires_grad=requires_grad)


def _quantised(*args: Any) -> TensorRef | None:
    """Returns a quantised tensor as its numbers; None for one in a form that is not read."""
    if len(args) < 5 or not isinstance(args[0], StorageRef) or args[0].kind not in _WHOLE or quantiser(args[4]) is None:
        return None
    codes = _tensor(*args[:4])
    call = Instance("call", Global("torch._utils", "_rebuild_qtensor"), args)
    return TensorRef(codes.storage, DType.F32, codes.offset, codes.shape, codes.strides, wrapper=(QUANTISED, call))


_WHOLE = ("QInt8Storage", "QUInt8Storage", "QInt32Storage")


class Quantiser(NamedTuple):
    """What makes numbers of a quantised tensor's integers: a scale and a zero point, or tensors of them along an axis."""

    scale: float = 1.0
    zero: int = 0
    scales: TensorRef | None = None
    zeros: TensorRef | None = None
    axis: int = 0


def quantiser(said: Any) -> Quantiser | None:
    """Returns what the arguments of a quantised tensor say; None for a scheme that is not read."""
    if not isinstance(said, tuple) or not said or not isinstance(said[0], Global):
        return None
    if said[0].path == "torch.per_tensor_affine" and len(said) == 3:
        scale, zero = said[1:]
        plain = type(scale) is float and type(zero) is int and abs(zero) < 1 << 62
        return Quantiser(scale, zero) if plain else None
    if said[0].path in ("torch.per_channel_affine", "torch.per_channel_affine_float_qparams") and len(said) == 4:
        scales, zeros, axis = said[1:]
        tensors = isinstance(scales, TensorRef) and isinstance(zeros, TensorRef) and type(axis) is int
        return Quantiser(scales=scales, zeros=zeros, axis=axis) if tensors else None
    return None


def _on_device(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Any:
    """Returns a tensor of a device whose storages torch cannot write (XLA, Gaudi): torch writes a copy in the main memory,
    or its numbers as an array, and its dtype. It is an ordinary tensor here, which loads on every machine."""
    kind = BY_TORCH_NAME.get(dtype.name) if isinstance(dtype, Global) and dtype.module == "torch" else None
    if not isinstance(data, TensorRef) or kind is None:
        return None
    entry = data.entry
    if kind is not data.dtype:  # numpy has no bfloat16, so its numbers are in float32
        if entry is None:
            return None
        from streammerge.sources.recast import Recast  # here, because most tensors have their dtype

        entry = Recast(TensorSpec("", kind, data.shape), entry)
    return TensorRef(data.storage, kind, data.offset, data.shape, data.strides, requires_grad is True, entry=entry)


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    tensors_only = isinstance(function, Global) and function.module.startswith("torch.")
    inner = call(function, args) if tensors_only and isinstance(args, tuple) else None
    # A Parameter inside a subclass stays a Parameter: a checkpoint does not need the subclass.
    if not isinstance(inner, TensorRef):
        return None  # a subclass whose content is in its state
    return inner if inner.wrapper else _wrap(inner, "type", function, kind, state)


def _ordered_dict(pairs: Any = ()) -> Any:
    made = OrderedTree()
    for pair in pairs:
        key, value = pair
        set_items(made, [(key, value)])
    return made


def _encode(string: Any, encoding: Any) -> Any:
    if encoding not in ("latin1", "latin-1"):
        return None
    if isinstance(string, Payload):
        return string if string.form == "text" else None
    return string.encode("latin-1") if isinstance(string, str) else None


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _on_device,
    "torch._utils._rebuild_device_tensor_from_numpy": _on_device,
    "torch._utils._rebuild_xla_tensor": _on_device,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
}


def call(function: Any, args: tuple[Any, ...]) -> Any:
    rebuild = _REBUILD.get(function.path) if isinstance(function, Global) else None
    made = rebuild(*args) if rebuild else None
    return Instance("call", function, args) if made is None else made
