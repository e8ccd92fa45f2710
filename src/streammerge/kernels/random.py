"""Uniform random numbers that depend on (seed, tensor name, model, element index) only.

The generator is counter-based: each number is a keyed hash of its element index, so chunks, workers and order cannot
change it. Each grain has its own key, a BLAKE2b digest. Within a grain, the counter passes twice through MurmurHash3's
32-bit finalizer, each time after a xor with half of the key. Generators of this kind are described by Salmon et al.,
*Parallel random numbers: as easy as 1, 2, 3*, 2011; this one uses the few vectorised integer operations of torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

_BITS = 24  # float32 holds 24 bits of [0, 1) evenly


def uniform(seed: int, name: str, model: int, start: int, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Fills float32 ``out`` with numbers in [0, 1) for the elements from ``start``. ``scratch`` is int32 of the same
    size."""
    from hashlib import blake2b  # here, because it loads all of OpenSSL

    import torch

    work, shifted = scratch, out.view(torch.int32)
    keys = []
    cursor = 0
    while cursor < len(out):
        grain, first = divmod(start + cursor, GRAIN)
        count = min(GRAIN - first, len(out) - cursor)
        digest = blake2b(f"{seed}/{model}/{grain}/{name}".encode(), digest_size=8).digest()
        part = work[cursor : cursor + count]
        torch.bitwise_xor(_counters()[first : first + count], _int32(digest[:4]), out=part)
        keys.append((part, _int32(digest[4:])))
        cursor += count
    _mix(work, shifted)
    for part, key in keys:
        part.bitwise_xor_(key)
    _mix(work, shifted)
    work.copy_(_shift(work, 32 - _BITS, shifted))  # ``shifted`` shares the memory of ``out``, which is overwritten next
    return out.copy_(work).mul_(2.0**-_BITS)


@lru_cache(maxsize=1)
def _counters() -> torch.Tensor:
    import torch

    return torch.arange(GRAIN, dtype=torch.int32)


def _int32(octets: bytes) -> int:
    return int.from_bytes(octets, "little", signed=True)


def _shift(values: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Shifts to the right and fills with zeros; torch's own shift keeps the sign."""
    import torch

    return torch.bitwise_right_shift(values, bits, out=out).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(values: torch.Tensor, scratch: torch.Tensor) -> None:
    """Applies MurmurHash3's finalizer in place."""
    values.bitwise_xor_(_shift(values, 16, scratch)).mul_(_signed(0x85EBCA6B))
    values.bitwise_xor_(_shift(values, 13, scratch)).mul_(_signed(0xC2B2AE35))
    values.bitwise_xor_(_shift(values, 16, scratch))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
