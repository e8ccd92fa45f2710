"""Weighted sums, conversions and integers without torch, with the bytes that the method's kernel makes with torch.

Sums are made by compiled functions where the package has them, else by numpy.

The numbers of the kernel are made in the same order: each product in float64 is rounded, then each sum, then the quotient,
and the result is rounded to float32, and from there to a shorter dtype. Infinities that all inputs have, such as those of
attention masks, stay in the result, as they do in every merge (:mod:`streammerge.kernels.agreed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from streammerge.kernels.agreed import AGREED
from streammerge.kernels.chunk import chunk_spans
from streammerge.kernels.group import TensorGroup
from streammerge.methods.linear import Combination, combination
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.planning.tasks import MergeTask
from streammerge.running.compiled import Octets, TaskSums, sums_of
from streammerge.running.workspace import load_torch
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, ranges
from streammerge.tensors.threads import one_torch_thread

if TYPE_CHECKING:
    import numpy as np

    from streammerge.running.computing import KernelMaker
    from streammerge.running.workspace import Inputs, Outgoing

    _Array = np.ndarray[Any, np.dtype[Any]]

_ELEMS = 1 << 15
"""Numbers that are converted at once. With fewer, workers spend their time on passing Python's lock to each other. With
more, all that is made of them leaves the cache of most cores."""
_WORDS = {DType.F64: "u8", DType.F32: "u4", DType.BF16: "u2", DType.F16: "u2"}
_FLOATS = {DType.F64: "f8", DType.F32: "f4", DType.F16: "f2"}
_EXPONENTS = {DType.F64: 0x7FF << 52, DType.F32: 0xFF << 23, DType.BF16: 0xFF << 7, DType.F16: 0x1F << 10}
"""Bits of the exponent. All are set in infinity and NaN, and infinity has no others but its sign."""
_MAGNITUDE, _ROUNDED_UP = 0x7FFFFFFF, 0x7F7F8000
"""Bits of a float32 without its sign, and those of the least one that is infinite as bfloat16."""
_WHOLE = {
    DType.BOOL: "?", DType.I8: "i1", DType.I16: "i2", DType.I32: "i4", DType.I64: "i8",
    DType.U8: "u1", DType.U16: "u2", DType.U32: "u4", DType.U64: "u8",
}  # fmt: skip
"""Dtypes whose largest numbers numpy finds."""


def _combination_of(task: MergeTask) -> Combination:
    """Returns the kernel of a weighted sum. It depends on no tensor, and not on torch. A conversion is such a sum too."""
    if task.method is COPY:
        return combination((1.0,))
    none: Any = None
    group = TensorGroup(task.out.name, task.shape, len(task.sources), none, none)
    kernel = task.method.bind(group, task.parameters)
    if not isinstance(kernel, Combination) or kernel.of_base:
        raise TypeError(f"{task.method.name} is declared as a weighted sum of models, but its kernel is none")
    return kernel


class PlainNumbers:
    """Makes the numbers of one worker.

    ``memory``: a float64 for each element that is asked for at once. Conversions need none.
    """

    def __init__(self, memory: memoryview) -> None:
        import numpy as np

        self._task: MergeTask | None = None
        self._kernel = combination((1.0,))
        self._compiled: TaskSums | None = None
        self._memory = memory
        self._totals = np.frombuffer(memory, np.float64) if memory else np.empty(0)
        self._term, self._single, self._words = np.empty(_ELEMS), np.empty(_ELEMS, np.float32), np.empty(_ELEMS, np.uint32)

    def put(self, task: MergeTask, source: Octets, start: int, stop: int, into: memoryview) -> int | None:
        """Writes elements ``start`` to ``stop`` of a task into memory. Returns how many of them are an infinity that all
        sources agree on. None if the elements are not the kernel's for certain: if others are not finite, or where the
        kernel raises an error.
        """
        if task.method is INTEGERS:
            return 0 if _settle(task, source, start, stop, into) else None
        if self._task is not task:
            self._task, self._kernel = task, _combination_of(task)
            self._compiled = sums_of(task, self._kernel, self._memory)
        if self._compiled is not None:
            if self._compiled.put(source, start, stop, into):
                return 0
        elif self._sum(task, self._kernel, source, start, stop, into):
            return 0
        up, down = _agreed(task, source, start, stop)
        either = up | down
        count = int(either.sum())
        if not count or not self._sum(task, self._kernel, source, start, stop, into, either):
            return None
        _put_infinities(up, down, into, task.out.dtype)
        return count

    def _sum(
        self,
        task: MergeTask,
        kernel: Combination,
        source: Octets,
        start: int,
        stop: int,
        into: memoryview,
        blank: _Array | None = None,
    ) -> bool:
        """Writes a weighted sum. Returns whether all numbers are finite. ``blank``: where zeros are summed."""
        import numpy as np

        elems, finite = stop - start, True
        last, totals = len(kernel.weights) - 1, self._totals[: stop - start]
        (quotient, divides), made = kernel.quotient, np.frombuffer(into, _WORDS[task.out.dtype])
        with np.errstate(all="ignore"):
            for number, weight in enumerate(kernel.weights):
                dtype = task.sources[number].spec.dtype
                words = np.frombuffer(source.raw(number, start, stop), _WORDS[dtype])
                for a, b in ranges(elems, _ELEMS):
                    total = totals[a:b] if last else self._term[: b - a]
                    term = self._term[: b - a] if number else total
                    self._load(words[a:b], dtype, term)
                    if blank is not None:
                        term[blank[a:b]] = 0
                    if weight != 1:
                        np.multiply(term, weight, out=term)
                    if number:
                        np.add(total, term, out=total)
                    if number < last:
                        continue
                    if divides:
                        np.divide(total, quotient, out=total)
                    elif quotient != 1:
                        np.multiply(total, quotient, out=total)
                    finite &= self._round(total, made[a:b], task.out.dtype)
        return finite

    def _load(self, words: _Array, dtype: DType, out: _Array) -> None:
        import numpy as np

        if dtype != DType.BF16:
            np.copyto(out, words.view(_FLOATS[dtype]))
            return
        wide, single = self._words[: len(words)], self._words[: len(words)].view(np.float32)
        np.copyto(wide, words)
        np.left_shift(wide, 16, out=wide)
        np.copyto(out, single)

    def _round(self, totals: _Array, out: _Array, dtype: DType) -> bool:
        """Rounds to the nearest number, to the even one of two, by way of float32 as torch does. Returns whether all are
        finite."""
        import numpy as np

        if dtype in (DType.F64, DType.F32):
            np.copyto(out.view(_FLOATS[dtype]), totals, casting="same_kind")
        else:
            single = self._single[: len(totals)]
            np.copyto(single, totals, casting="same_kind")
            if dtype == DType.F16:
                np.copyto(out.view(np.float16), single, casting="same_kind")
            else:
                bits, odd = single.view(np.uint32), self._words[: len(totals)]
                if int(np.bitwise_and(bits, _MAGNITUDE, out=odd).max(initial=0)) >= _ROUNDED_UP:
                    return False  # here, because the bits of NaN may be rounded to those of a number
                np.right_shift(bits, 16, out=odd)
                np.bitwise_and(odd, 1, out=odd)
                np.add(odd, 0x7FFF, out=odd)
                np.add(bits, odd, out=bits)
                np.right_shift(bits, 16, out=bits)
                np.copyto(out, bits, casting="same_kind")
                return True
        exponent = _EXPONENTS[dtype]
        return int(np.bitwise_and(out, out.dtype.type(exponent)).max(initial=0)) < exponent


def _agreed(task: MergeTask, source: Octets, start: int, stop: int) -> tuple[_Array, _Array]:
    """Returns where all sources have infinity, and where all have minus infinity. NaN that all have is left to the kernel,
    since torch chooses its bits."""
    import numpy as np

    up, down = np.ones(stop - start, bool), np.ones(stop - start, bool)
    for number, each in enumerate(task.sources):
        words = np.frombuffer(source.raw(number, start, stop), _WORDS[each.spec.dtype])
        plus, minus = _infinities(words.dtype, each.spec.dtype)
        up &= words == plus
        down &= words == minus
    return up, down


def _put_infinities(up: _Array, down: _Array, into: memoryview, dtype: DType) -> None:
    import numpy as np

    made = np.frombuffer(into, _WORDS[dtype])
    made[up], made[down] = _infinities(made.dtype, dtype)


def _infinities(word: np.dtype[Any], dtype: DType) -> tuple[Any, Any]:
    """Returns the bits of infinity and of minus infinity."""
    sign = 1 << (8 * dtype.element_bytes - 1)
    return word.type(_EXPONENTS[dtype]), word.type(_EXPONENTS[dtype] | sign)


class NumpyMaker:
    """Makes sums and integers by numpy. Hands a chunk that is not sure to the kernel's maker, for which torch is loaded.

    ``chunk_elems``: the most elements of a chunk. ``by_kernel``: returns the kernel's maker, when it is first needed.
    """

    def __init__(
        self,
        numbers: PlainNumbers,
        task: MergeTask,
        source: Inputs,
        chunk_elems: int,
        by_kernel: Callable[[], KernelMaker],
    ) -> None:
        self._numbers, self._task, self._source, self._by_kernel = numbers, task, source, by_kernel
        self._chunk_elems = min(chunk_elems, GRAIN)
        self._kernel: KernelMaker | None = None
        self.nonfinite: dict[str, int] = {}

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return chunk_spans(start, stop, self._chunk_elems, 1)

    def put(self, start: int, stop: int, outgoing: Outgoing) -> memoryview:
        self._source.move_to(start, stop)
        part = outgoing.room((stop - start) * self._task.out.dtype.element_bytes)
        agreed = self._numbers.put(self._task, self._source, start, stop, part)
        if agreed is not None:
            if agreed:
                self.nonfinite[AGREED] = self.nonfinite.get(AGREED, 0) + agreed
            return part
        outgoing.take_back(len(part))
        load_torch()
        with one_torch_thread():
            if self._kernel is None:
                self._kernel = self._by_kernel()
                self._kernel.nonfinite = self.nonfinite
            return self._kernel.put(start, stop, outgoing)


def _settle(task: MergeTask, source: Octets, start: int, stop: int, into: memoryview) -> bool:
    """Settles values of one dtype, as :func:`~streammerge.methods.exact.integers` does. Returns whether it is done."""
    import numpy as np

    policy, last, dtype = task.parameters["policy"], len(task.sources) - 1, task.out.dtype
    into[:] = source.raw(last if policy == "last" else 0, start, stop)
    if policy not in ("error", "max"):
        return True
    number = _WHOLE.get(dtype)
    for model in range(1, last + 1):
        other = source.raw(model, start, stop)
        if policy == "error":
            if other != into:
                return False
        elif number is None:
            return False
        else:
            made = np.frombuffer(into, number)
            np.maximum(made, np.frombuffer(other, number), out=made)
    return True
