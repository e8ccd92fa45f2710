"""The table of dtypes: names in safetensors and torch, width in bits, and storage class in a ``.pth``.

A :class:`DType` is a string, its safetensors name. It therefore prints, compares and serialises as that name. The few
torch dtypes that safetensors cannot hold use torch's lower-case name.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError

if TYPE_CHECKING:
    import torch


class DType(str, Enum):
    """One element type. ``bits`` per element; ``kind`` is float, int, bool, complex, or packed (no arithmetic).

    ``element_bytes``: bytes of one torch element; a torch element of F4 holds two values. ``component``: the dtype of
    the real and imaginary parts of a complex number; for other dtypes, the dtype itself.
    """

    bits: int
    element_bytes: int
    kind: str
    torch_name: str
    storage_class: str | None
    component: DType

    def __new__(cls, name: str, torch_name: str, bits: int, kind: str, storage_class: str | None = None) -> DType:
        member = str.__new__(cls, name)
        member._value_ = name
        member.torch_name, member.bits, member.kind, member.storage_class = torch_name, bits, kind, storage_class
        member.element_bytes, member.component = max(bits // 8, 1), member
        return member

    F64 = ("F64", "float64", 64, "float", "DoubleStorage")
    F32 = ("F32", "float32", 32, "float", "FloatStorage")
    F16 = ("F16", "float16", 16, "float", "HalfStorage")
    BF16 = ("BF16", "bfloat16", 16, "float", "BFloat16Storage")
    F8_E4M3 = ("F8_E4M3", "float8_e4m3fn", 8, "float")
    F8_E5M2 = ("F8_E5M2", "float8_e5m2", 8, "float")
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, "float")
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, "float")
    F8_E8M0 = ("F8_E8M0", "float8_e8m0fnu", 8, "packed")
    F4 = ("F4", "float4_e2m1fn_x2", 4, "packed")
    I64 = ("I64", "int64", 64, "int", "LongStorage")
    I32 = ("I32", "int32", 32, "int", "IntStorage")
    I16 = ("I16", "int16", 16, "int", "ShortStorage")
    I8 = ("I8", "int8", 8, "int", "CharStorage")
    U64 = ("U64", "uint64", 64, "int")
    U32 = ("U32", "uint32", 32, "int")
    U16 = ("U16", "uint16", 16, "int")
    U8 = ("U8", "uint8", 8, "int", "ByteStorage")
    BOOL = ("BOOL", "bool", 8, "bool", "BoolStorage")
    C64 = ("C64", "complex64", 64, "complex", "ComplexFloatStorage")
    C128 = ("complex128", "complex128", 128, "complex", "ComplexDoubleStorage")
    C32 = ("complex32", "complex32", 32, "complex")

    __hash__ = str.__hash__  # Enum's own __hash__ is written in Python and slower

    def __str__(self) -> str:
        return str(self.value)

    @property
    def in_safetensors(self) -> bool:
        """Whether safetensors has a name for this dtype."""
        return self not in (DType.C128, DType.C32)

    @property
    def torch(self) -> torch.dtype:
        import torch

        found = getattr(torch, self.torch_name, None)
        if not isinstance(found, torch.dtype):
            raise RecipeError(f"this version of torch ({torch.__version__}) has no {self.torch_name}; install a newer one")
        return found


DType.C32.component, DType.C64.component, DType.C128.component = DType.F16, DType.F32, DType.F64

BY_TORCH_NAME = {d.torch_name: d for d in DType}
BY_STORAGE_CLASS = {d.storage_class: d for d in DType if d.storage_class}
_ALIASES = {
    "half": DType.F16,
    "float": DType.F32,
    "double": DType.F64,
    "bf16": DType.BF16,
    "long": DType.I64,
    "fp16": DType.F16,
    "fp32": DType.F32,
    "fp64": DType.F64,
    "fp8": DType.F8_E4M3,
    "float8": DType.F8_E4M3,
    "fp8_e4m3": DType.F8_E4M3,
    "fp8_e4m3fn": DType.F8_E4M3,
    "fp8_e5m2": DType.F8_E5M2,
}
"""Names that people type. fp8 alone means e4m3fn, the format in which weights are stored."""


def promoted(dtypes: Iterable[DType]) -> DType:
    """Returns the smallest floating-point dtype that holds the numbers of all these, as torch promotes them."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return DType.F64 if DType.F64 in found else DType.F32


def parse_dtype(name: object) -> DType:
    """Returns the dtype named ``"bfloat16"``, ``"torch.bfloat16"`` or ``"BF16"``, or of a torch dtype. Raises
    RecipeError."""
    text = name.__name__ if isinstance(name, type) else str(name).removeprefix("torch.")  # numpy.float16 is a class
    found = BY_TORCH_NAME.get(text) or _ALIASES.get(text.lower()) or DType.__members__.get(text.upper())
    if found is None:
        import difflib

        near = difflib.get_close_matches(text.lower(), BY_TORCH_NAME, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; write it as torch does, like bfloat16"
        raise RecipeError(f"unknown dtype {text!r}{hint}")
    return found
