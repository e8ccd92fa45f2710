"""Uniform random numbers that depend on (seed, tensor name, model, element index) only.

Counter-based, so that no chunk, worker or order can change them: an element's number is a keyed hash of its index.
Each grain has a key of its own, a BLAKE2b digest; within it the counter goes through two rounds of MurmurHash3's
32-bit finalizer, each after a part of the key. This is of the same kind as the generators of Salmon et al., *Parallel
random numbers: as easy as 1, 2, 3*, 2011, in the few vectorised integer operations that torch has.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

_BITS = 24  # what a float32 in [0, 1) can hold evenly


def uniform(seed: int, name: str, model: int, start: int, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Fills float32 ``out`` with the numbers in [0, 1) of elements ``start`` and on; ``scratch`` is int32 of its size."""
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
    work.copy_(_shift(work, 32 - _BITS, shifted))  # ``shifted`` lies over ``out``, which is written now
    return out.copy_(work).mul_(2.0**-_BITS)


@lru_cache(maxsize=1)
def _counters() -> torch.Tensor:
    import torch

    return torch.arange(GRAIN, dtype=torch.int32)


def _int32(octets: bytes) -> int:
    return int.from_bytes(octets, "little", signed=True)


def _shift(values: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    import torch

    return torch.bitwise_right_shift(values, bits, out=out).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(values: torch.Tensor, scratch: torch.Tensor) -> None:
    """MurmurHash3's finalizer, in place."""
    values.bitwise_xor_(_shift(values, 16, scratch)).mul_(_signed(0x85EBCA6B))
    values.bitwise_xor_(_shift(values, 13, scratch)).mul_(_signed(0xC2B2AE35))
    values.bitwise_xor_(_shift(values, 16, scratch))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
