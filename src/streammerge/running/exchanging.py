"""Shares the passes over one long tensor among machines, each of which then makes its own part of it.

A sweep of a pass is cut into the units of the tensor. Whoever is free claims one of these blocks, and leaves its answers as
a small file, which only one machine can create. When all are there, every machine combines the same files in the same
order. The result of a whole pass is a file too. So a machine that comes late, or alone, or again, makes what nobody has
made, and waits only for blocks that others are making just now. All machines compute with the same numbers, also where
their last bits depend on a processor.
"""

from __future__ import annotations

import io
import pickle
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.kernels.chunk import Look, Step, Sweep
from streammerge.kernels.pass_results import PassResults
from streammerge.planning.tasks import MergeTask
from streammerge.planning.units import Unit
from streammerge.stores.claims import Claims, names_in, read_small
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_PAUSES = (0.02, 1.0)
"""The first and the longest time between two looks at what others have made, in seconds."""
_UNSENDABLE = b"-"
"""The file of answers that are not plain data. Then each machine makes the passes of the tensor itself."""


class Unsendable(Exception):
    """Raised for an answer that cannot be sent as plain data."""


# ---------------------------------------------------------------------------------------------------------- answers as data


class _Writer(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(thing, torch.Tensor):
            return None
        octets = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(thing.dtype).removeprefix("torch."), tuple(thing.shape), octets


class _Reader(pickle.Unpickler):
    """Reads plain values, tensors, and dataclasses of this package or of the method's module. Nothing else is called."""

    def __init__(self, data: bytes, module: str) -> None:
        super().__init__(io.BytesIO(data))
        self._module = module

    def persistent_load(self, said: Any) -> torch.Tensor:
        import torch

        name, shape, octets = said
        dtype = getattr(torch, name)
        if not octets:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(octets), dtype=dtype).reshape(shape)

    def find_class(self, module: str, name: str) -> Any:
        if module == self._module or module.startswith("streammerge."):
            found = getattr(import_module(module), name, None)
            if isinstance(found, type) and is_dataclass(found):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def as_data(answer: Any, module: str) -> bytes:
    """Returns an answer as data, with a checksum. ``module``: that of the merge method. Raises Unsendable."""
    buffer = io.BytesIO()
    try:
        _Writer(buffer, pickle.HIGHEST_PROTOCOL).dump(answer)
        made = buffer.getvalue()
        _Reader(made, module).load()
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
        raise Unsendable(str(error)) from error
    return b"%08x" % zlib.crc32(made) + made


def of_data(data: bytes, module: str) -> Any:
    """Returns the answer that was made to data. Raises ValueError if it is damaged."""
    sum_, made = data[:8], data[8:]
    if sum_ != b"%08x" % zlib.crc32(made):
        raise ValueError("the file of an answer is damaged")
    try:
        return _Reader(made, module).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error


# ------------------------------------------------------------------------------------------------------------ the exchange


@dataclass(slots=True)
class Exchange:
    """The passes of one long task, of which several machines make the ``parts``. ``own``: the part of this machine, whose
    blocks it prefers. ``number``: that of the task."""

    claims: Claims
    number: int
    task: MergeTask
    parts: Sequence[Unit]
    own: Unit
    _pass: int = 0
    _turn: int = 0
    _alone: bool = False

    @property
    def _module(self) -> str:
        return self.task.method.function.__module__

    def record(self) -> PassResults:
        """Returns the results of the passes. Those that another machine has are not made again."""
        return _SharedResults(self)

    def result(self, number: int, run: Callable[[], T]) -> T:
        """Returns the result of a pass: the one that was kept first, or what ``run`` makes."""
        self._pass, self._turn = number, 0
        name = f"{self.number}-{number}"
        if not self._alone:
            kept = self._kept(name)
            if kept is not None:
                return kept  # type: ignore[no-any-return]
        made = run()
        return made if self._alone else self._keep(name, made)

    def over(self, sweep: Sweep) -> Sweep:
        """Returns a sweep whose blocks are made by several machines. ``sweep`` makes a block on this machine."""

        def shared(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            if not self._alone:
                blocks, turn = self._blocks(start, stop), self._turn
                self._turn += 1
                names = [f"{self.number}-{self._pass}-{turn}-{block}" for block in range(len(blocks))]

                def make(block: int) -> list[T]:
                    return [*sweep(look, step, *blocks[block], sparse)]

                if self._make(names, blocks, make):
                    for block, name in enumerate(names):
                        kept = self._kept(name)
                        yield from self._keep(name, make(block), damaged=True) if kept is None else kept
                    return
                self._alone = True
            yield from sweep(look, step, start, stop, sparse)

        return shared

    def _blocks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the spans that machines make. They end where pieces of the sweep end."""
        if (start, stop) == (0, self.task.elems):
            return [(unit.first, unit.last) for unit in self.parts]
        most = self.own.last - self.own.first
        return [(start + a, start + b) for a, b in ranges(stop - start, most)]

    def _make(self, names: Sequence[str], blocks: Sequence[tuple[int, int]], make: Callable[[int], Any]) -> bool:
        """Makes blocks until all are there, those of the own part first. Returns whether all have answers that can be
        sent."""
        pause, longest = _PAUSES
        first = self.own.first
        left = sorted(range(len(names)), key=lambda n: (blocks[n][0] < first, blocks[n][0]))
        while True:
            there = {*names_in(self.claims.answers)}
            left = [n for n in left if names[n] not in there]
            if not left:
                break
            for number in left:
                if self.claims.take_free(f"answer-{names[number]}"):
                    self._keep(names[number], make(number))
                    break
            else:
                self.claims.fence.check()
                time.sleep(pause)
                pause = min(2 * pause, longest)
        return all(read_small(self.claims.answers / name) != _UNSENDABLE for name in names)

    def _keep(self, name: str, answer: Any, damaged: bool = False) -> Any:
        """Keeps an answer for all machines. Returns the answer that counts: another machine may have been earlier.
        ``damaged``: whether an answer is there that nobody can read; it is replaced."""
        place = self.claims.answers / name
        try:
            data = as_data(answer, self._module)
        except Unsendable:
            place.create_small(_UNSENDABLE, durable=False)
            return answer
        self.claims.fence.check()
        if not damaged and not place.create_small(data, durable=False):
            kept = self._kept(name)
            if kept is not None:
                return kept
            damaged = True
        if damaged:
            place.replace_small(data)
        return answer

    def _kept(self, name: str) -> Any:
        """Returns the answer that was kept, None if there is none that can be read."""
        try:
            return of_data(read_small(self.claims.answers / name), self._module)
        except ValueError:
            return None


class _SharedResults(PassResults):
    """Results of passes, of which others may have made some."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def next(self, run: Callable[[], T]) -> T:
        return super().next(lambda: self._exchange.result(len(self.results), run))
