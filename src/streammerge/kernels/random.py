"""Uniform random numbers that depend on (seed, tensor name, model, element index) only.

The generator is counter-based: each number is a keyed hash of its element index, so chunks, workers and order cannot
change it. Each grain has its own key, a BLAKE2b digest. Within a grain, the counter passes twice through MurmurHash3's
32-bit finalizer, each time after a xor with half of the key. Generators of this kind are described by Salmon et al.,
*Parallel random numbers: as easy as 1, 2, 3*, 2011; this one uses the few vectorised integer operations of numpy.

The finalizer begins and ends with ``x ^= x >> 16``, which is its own inverse. So the last one of the first pass and the
first one of the second cancel, but for the key between them. The very first one changes the key only, since a counter
within a grain has 16 bits. What is left is a third of the operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from streammerge.compiled.library import address, library
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    Words = np.ndarray[Any, np.dtype[np.uint32]]
    Bits = np.ndarray[Any, np.dtype[np.uint8]]

_BITS = 24  # float32 holds 24 bits of [0, 1) evenly
_SPARE = 32 - _BITS
_HASHED_ELEMS = 1 << 17
"""Numbers of several tensors that are hashed at once: as many as stay in a CPU's own cache."""


def uniform(seed: int, name: str, model: int, start: int, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Fills float32 ``out`` with numbers in [0, 1) for the elements from ``start``. ``scratch`` is int32 of the same
    size."""
    import numpy as np

    words, spare = _words(out), _words(scratch)
    for a, b, first, keys in _grains(seed, name, model, start, len(words)):
        _hash(first, keys, words[a:b], spare[a:b])
    np.right_shift(words, _word(_SPARE), out=spare)
    return out.copy_(scratch).mul_(2.0**-_BITS)


def limits(chances: torch.Tensor) -> torch.Tensor:
    """Returns what :func:`chosen` takes for chances above 0, float32 or float64: unsigned 32-bit numbers, as int32."""
    import numpy as np
    import torch

    exact = np.ceil(chances.numpy().astype(np.float64) * (1 << _BITS))  # a product with a power of two is exact
    return torch.from_numpy(((exact.astype(np.int64) << _SPARE) - 1).astype(np.uint32).view(np.int32))


def chosen(
    seed: int,
    name: str,
    model: int,
    start: int,
    chance: float | torch.Tensor,
    words: torch.Tensor,
    scratch: torch.Tensor,
    flags: torch.Tensor,
) -> Bits:
    """Returns a bit for each element, 1 where the :func:`uniform` number is below the chance.

    ``chance``: a number, which counts as float32, or :func:`limits` of one chance for each element. ``flags`` is a bool for
    each element. ``words`` and ``scratch`` are numbers of 32 bits, as many as the elements or a grain.
    """
    import numpy as np

    limit, each = _limit(chance)
    found = flags.numpy()
    if limit < 0:
        return np.zeros(-(-len(found) // 8), np.uint8)
    if (compiled := library()) is not None and not start % 8:
        bits = np.empty(-(-len(found) // 8), np.uint8)
        for a, b, first, keys in _grains(seed, name, model, start, len(found)):
            of_grain = None if each is None else address(each[a:b])
            into = address(bits[a // 8 :])
            compiled.streammerge_choose_bits(first, *map(_mixed, keys), _mixes(limit), limit, of_grain, into, b - a)
        return bits
    made, spare, mixes = _words(words), _words(scratch), _mixes(limit)
    for a, b, first, keys in _grains(seed, name, model, start, len(found)):
        hashed = made[: b - a]  # always the same memory, which stays in the CPU's cache
        _hash(first, keys, hashed, spare[: b - a], mixes)
        np.less_equal(hashed, _word(limit) if each is None else each[a:b], out=found[a:b])
    return np.packbits(found)


def chosen_of_each(
    seed: int,
    names: Sequence[str],
    model: int,
    chance: float | torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Fills float32 ``out`` with 1 where :func:`chosen` has a bit, else 0, for whole tensors of equal size, up to a grain,
    which lie one after the other. ``scratch`` is int32 of the same size."""
    import numpy as np

    limit, each = _limit(chance)
    if limit < 0:
        return out.zero_()
    words, spare = (_words(numbers).reshape(len(names), -1) for numbers in (out, scratch))
    floats, n = out.numpy().reshape(words.shape), words.shape[1]
    pairs = [_grains(seed, name, model, 0, n)[0][3] for name in names]
    both = tuple(np.array(of, np.uint32).reshape(-1, 1) for of in zip(*pairs, strict=True))
    if (compiled := library()) is not None:
        one, two = map(_mixed, both)
        of_all, into = None if each is None else address(each), address(floats)
        compiled.streammerge_choose_rows(len(names), address(one), address(two), _mixes(limit), limit, of_all, into, n)
        return out
    for a, b in ranges(len(names), max(_HASHED_ELEMS // n, 1)):
        flags = spare[a:b].reshape(-1).view("?")[: (b - a) * n].reshape(b - a, n)
        _hash(0, (both[0][a:b], both[1][a:b]), words[a:b], spare[a:b], _mixes(limit))
        np.less_equal(words[a:b], _word(limit) if each is None else each.reshape(words.shape)[a:b], out=flags)
        floats[a:b] = flags
    return out


def _limit(chance: float | torch.Tensor) -> tuple[int, Words | None]:
    """Returns the largest hash that is chosen, -1 if there is none, and that of each element if they differ."""
    import numpy as np
    import torch

    # u < c for u = (h >> 8) / 2^24 is h <= limit, so no number is made of the hash h.
    if isinstance(chance, torch.Tensor):
        return 0, chance.numpy().view(np.uint32)
    return (min(math.ceil(float(np.float32(chance)) * (1 << _BITS)), 1 << _BITS) << _SPARE) - 1, None


def _mixes(limit: int) -> bool:
    """Whether a hash needs its last step for a comparison with this limit, or with others if it is 0. This step leaves the
    upper half of a hash."""
    return limit & 0xFFFF != 0xFFFF


def _grains(seed: int, name: str, model: int, start: int, count: int) -> list[tuple[int, int, int, tuple[int, int]]]:
    """Returns (first number, number after the last, place in the grain, both keys) for each grain of ``count`` elements."""
    from hashlib import blake2b  # here, because it loads all of OpenSSL

    made, cursor = [], 0
    while cursor < count:
        grain, first = divmod(start + cursor, GRAIN)
        stop = min(cursor + GRAIN - first, count)
        digest = blake2b(f"{seed}/{model}/{grain}/{name}".encode(), digest_size=8).digest()
        made.append((cursor, stop, first, (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))))
        cursor = stop
    return made


def _hash(first: int, keys: tuple[int, int] | tuple[Words, Words], words: Words, spare: Words, last: bool = True) -> None:
    """Fills ``words`` with the hashes of a grain's counters from ``first``. ``last``: whether to end with the last
    ``x ^= x >> 16``, which changes the lower half of each word only. Of several rows, each may have its own keys."""
    import numpy as np

    multiply, shift, xor = np.multiply, np.right_shift, np.bitwise_xor
    thirteen, one, two = _word(13), _word(0x85EBCA6B), _word(0xC2B2AE35)
    xor(_counters()[first : first + words.shape[-1]], np.asarray(_mixed(keys[0]), np.uint32), words)
    multiply(words, one, words)
    xor(words, shift(words, thirteen, spare), words)
    multiply(words, two, words)
    xor(words, np.asarray(_mixed(keys[1]), np.uint32), words)
    multiply(words, one, words)
    xor(words, shift(words, thirteen, spare), words)
    multiply(words, two, words)
    if last:
        xor(words, shift(words, _word(16), spare), words)


def _mixed(key: Any) -> Any:
    """Returns a key, or those of several rows, after the first step of a pass."""
    return key ^ key >> 16


@lru_cache(maxsize=1)
def _counters() -> Words:
    import numpy as np

    return np.arange(GRAIN, dtype=np.uint32)


@lru_cache(maxsize=64)
def _word(value: int) -> Words:
    """Returns a number as numpy takes it fastest beside an array."""
    import numpy as np

    return np.array(value, dtype=np.uint32)


def _words(values: torch.Tensor) -> Words:
    import numpy as np

    words: Words = values.numpy().view(np.uint32)
    return words
