"""Checks the values of an output: computes a sample of them again from recipe and inputs."""

from __future__ import annotations

import math
import random
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import ChangedError, VerifyError, listed, printable
from streammerge.events import Checked, Hashed, Listener, Preparing, RunFinished, RunStarted, quiet
from streammerge.formats.base import LayoutFile
from streammerge.methods.registry import INTEGERS
from streammerge.planning.budget import Budget
from streammerge.planning.costs import budget_of
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import ITSELF, InputSpans, Receipt
from streammerge.planning.tasks import MergeTask, Piece, piece_counts
from streammerge.running import process
from streammerge.running.engine import modules_of, run_all
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.job import Bench, Destination, Job, lent, new_key
from streammerge.running.readback import read_part
from streammerge.running.reading import HashWork, largest_first
from streammerge.running.spooling import spooled_tasks
from streammerge.running.turning import Turning
from streammerge.running.workspace import prepare_torch
from streammerge.sources.stored import Stored
from streammerge.stores import faults
from streammerge.stores.base import Input, Location, Output
from streammerge.stores.checksums import CRC32
from streammerge.stores.digests import digest_outside
from streammerge.stores.inputs import InputFiles
from streammerge.stores.journal import Key
from streammerge.stores.scratch import scratch
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import ranges
from streammerge.tensors.threads import one_torch_thread
from streammerge.verifying.files import Verified, rest_of

if TYPE_CHECKING:
    import torch

_ROUNDING = 2.0**-21
"""The largest relative error of a float32 result after a few operations."""
_COMPARED_ELEMS = 1 << 14
_REPEATED_BYTES = 256 << 10
_TASKS_IN_BLOCK = 4096
"""Tasks that are computed again together. Only these are objects, however many are sampled."""
_BESIDE_BYTES = 1 << 20
"""Memory of a worker for one block that it compares: 64 bytes for each of ``_COMPARED_ELEMS``, or ``_REPEATED_BYTES``."""


def check_inputs(files: Mapping[str, InputSpans], receipt: Receipt, workers: int, listener: Listener = quiet) -> None:
    """Raises ChangedError when an input is not the file that was merged, as far as the receipt can tell. ``files``: the
    inputs by their names in the receipt."""
    if set(files) != set(receipt.inputs):
        raise ChangedError(f"the inputs are others: {listed(sorted(set(files) ^ set(receipt.inputs)))}")
    hashed: dict[str, Location] = {}
    for name, (path, spans) in files.items():
        was = receipt.inputs[name]
        if path.size != was["bytes"] or digest_outside(path, spans) != was["header_sha256"]:
            raise _changed(path)
        if "sha256" in was:
            hashed[name] = path
    with (
        closing(ThreadExecutor(workers)) as executor,
        closing(executor.run(HashWork(), largest_first(hashed.items()))) as results,
    ):
        for name, digest in results:
            listener(Hashed(name, hashed[name].size))
            if digest != receipt.inputs[name]["sha256"]:
                raise _changed(hashed[name])


def _changed(path: Location) -> ChangedError:
    return ChangedError(f"{printable(path)} is not the file that was merged")


def recompute(
    verified: Verified, plan: Plan, receipt: Receipt, share: float, seed: int, listener: Listener = quiet
) -> None:
    """Computes a sample of the output's pieces again, in float64. Raises VerifyError when they differ.

    A number is right when it equals the float64 result within rounding. Methods that choose among numbers, and sums that
    cancel, may give other numbers. A piece with such numbers must equal the merge's own result bit for bit.
    """
    _budget(plan, plan.tasks)  # raises before the output's pickle is read
    places = _Places(plan, verified.out, receipt)
    counts = piece_counts(plan.tasks)
    firsts = array("Q", accumulate((n * places.known(at) for at, n in enumerate(counts)), initial=0))
    chosen = range(firsts[-1])
    if share < 1:
        chosen = array("Q", sorted(random.Random(seed).sample(chosen, math.ceil(len(chosen) * share))))  # type: ignore[assignment]
    if places.skipped:
        verified.notes.append(f"not computed again, because their places are not known: {listed(places.skipped)}")
    if not chosen:
        return
    alone: AbstractContextManager[None] = nullcontext()
    if plan.torch_needed:
        listener(Preparing("torch"))
        prepare_torch()
        alone = one_torch_thread()
    every = len(chosen) == sum(counts)
    total = plan.read_bytes if every else sum(places.piece(firsts, row).read_bytes for row in chosen)
    listener(RunStarted(total, 0, plan.memory_bytes, len(plan.tasks)))
    began, wrong = time.perf_counter(), list[str]()
    inputs = plan.budget.opened(plan.identities)
    with closing(inputs), scratch() as create, faults.survived(), alone:
        for block in places.blocks(firsts, chosen):
            check = _Recomputation(plan, block, inputs, create, listener)
            wrong += check.repeated(check.in_float64())
            verified.sampled_tensors += len(block)
            verified.sampled_elems += check.elems
            verified.equal_elems += check.equal
            verified.repeated_elems += check.repeated_elems
    listener(RunFinished(time.perf_counter() - began))
    if wrong:
        raise VerifyError(
            f"{printable(verified.out)} differs from the result of its recipe and these inputs in {listed(wrong)}; "
            "it was made from other inputs, or it is wrong"
        )


def _budget(plan: Plan, tasks: Sequence[MergeTask]) -> tuple[Budget, str]:
    """Returns the budget for making these tasks again, and the way to read. The output's pickle is read beside those
    of the inputs."""
    pickles = plan.pickle_bytes + plan.layout.pickle_bytes
    workers = plan.budget.workers
    planned = plan.tasks if tasks is not plan.tasks else ()
    return budget_of(tasks, plan.memory_bytes, workers, plan.io, bool(plan.spooled), pickles, _BESIDE_BYTES, planned)


class _Places:
    """Where the bytes of each task lie in the output, and the names of tensors whose place is not known.

    If all bytes outside the tensors are as planned now, the places are as planned too. Another version of streammerge may
    use another layout; then tensors are found by name, dtype and shape.
    """

    def __init__(self, plan: Plan, out: Location, receipt: Receipt) -> None:
        self.skipped = list[str]()
        self._tasks, self._index = plan.tasks, None
        files = plan.layout.files
        self._paths = [out / file.name if out.is_folder() else out for file in files]
        if all(_as_planned(path, file, receipt) for path, file in zip(self._paths, files, strict=True)):
            return
        self._index = open_checkpoint(out)
        self._found = bytearray(len(plan.tasks))
        planned = set()
        for number, task in enumerate(plan.tasks):
            planned.add(task.out.name)
            entry = self._index.entries.get(task.out.name)
            self._found[number] = isinstance(entry, Stored) and entry.spec == task.out
            if not self._found[number]:
                self.skipped.append(task.out.name)
        self.skipped += [name for name in self._index.entries if name not in planned]

    def known(self, number: int) -> bool:
        return self._index is None or bool(self._found[number])

    def blocks(self, firsts: Sequence[int], chosen: Iterable[int]) -> Iterator[list[_Sampled]]:
        """Yields blocks of tasks, each with its chosen pieces. ``firsts``: the row of each task's first piece."""
        block = list[_Sampled]()
        for number, rows in groupby(chosen, lambda row: bisect_right(firsts, row) - 1):
            if len(block) == _TASKS_IN_BLOCK:
                yield block
                block = []
            task = self._tasks[number]
            starts = frozenset((row - firsts[number]) * task.piece_elems for row in rows)
            block.append(_Sampled(task, starts, *self._place(task)))
        yield block

    def piece(self, firsts: Sequence[int], row: int) -> Piece:
        number = bisect_right(firsts, row) - 1
        task = self._tasks[number]
        start = (row - firsts[number]) * task.piece_elems
        return Piece(task, number, start, min(start + task.piece_elems, task.elems))

    def _place(self, task: MergeTask) -> tuple[Location, int]:
        entry = None if self._index is None else self._index.entries[task.out.name]
        return (entry.path, entry.offset) if isinstance(entry, Stored) else (self._paths[task.file], task.offset)


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A task, the first elements of its pieces in the sample, and where its bytes lie in the output."""

    task: MergeTask
    starts: frozenset[int]
    path: Location
    offset: int


def _as_planned(path: Location, file: LayoutFile, receipt: Receipt) -> bool:
    if not path.is_file() or path.size != file.size:
        return False
    if not file.offsets:
        return True
    _, spans = read_part(path)
    name = file.name if file.name in receipt.checksums else ITSELF
    starts = dict(zip((offset for offset, _ in spans), receipt.sums(name), strict=False))
    return rest_of(path, spans, receipt, name) == b"".join(part.data for part in file.around(starts, file.receipt))


class _Recomputation:
    """Runs tasks again by the engine. The engine gets comparisons in place of output files."""

    def __init__(
        self,
        plan: Plan,
        sampled: list[_Sampled],
        inputs: InputFiles,
        create: Callable[[int], Output],
        listener: Listener = quiet,
    ) -> None:
        self.plan, self.places, self._listener, self._held = plan, sampled, listener, process.Gauge()
        self.keys = {(at, start) for at, each in enumerate(sampled) for start in each.starts}
        self.elems = self.equal = self.repeated_elems = 0
        self._inputs, self._create = inputs, create
        tasks = [each.task for each in sampled]
        self._tasks = spooled_tasks(tasks, tasks, self._inputs, create, lambda tensor, record: None)

    def in_float64(self) -> set[Key]:
        """Compares with float64 results. Returns the pieces that must be repeated exactly."""
        wide, comparisons, copied = [], list[Destination](), set[int]()
        for at, (task, place) in enumerate(zip(self._tasks, self.places, strict=True)):
            dtype = task.out.dtype.component
            if task.verbatim or task.method is INTEGERS or dtype.kind != "float":
                copied.add(at)
            out = replace(task.out, dtype=DType.C128 if task.out.dtype.kind == "complex" else DType.F64)
            wide.append(replace(task, out=out, compute="float64", file=at, offset=0))
            comparisons.append(_Comparison(place.path, place.offset, dtype))
        exact = {key for key in self.keys if key[0] in copied}
        for piece, (elems, equal, far) in self._run(wide, comparisons, self.keys - exact):
            if far:
                exact.add(piece.key)
            else:
                self.elems += elems
                self.equal += equal
                self._listener(Checked(piece.task.out.name, piece.read_bytes, self._held.now()))
        return exact

    def repeated(self, keys: set[Key]) -> list[str]:
        """Repeats these pieces exactly as the merge made them. Returns the names of tensors that differ in any bit."""
        tasks, repetitions, differ = [], list[Destination](), set[int]()
        for at, (task, place) in enumerate(zip(self._tasks, self.places, strict=True)):
            tasks.append(replace(task, file=at, offset=0))
            repetitions.append(_Repetition(place.path, place.offset))
        for piece, differs in self._run(tasks, repetitions, keys):
            if differs:
                differ.add(piece.number)
            self.elems += piece.stop - piece.start
            self._listener(Checked(piece.task.out.name, piece.read_bytes, self._held.now()))
            if piece.task.verbatim or piece.task.method is INTEGERS:
                self.equal += piece.stop - piece.start
            else:
                self.repeated_elems += piece.stop - piece.start
        return [task.out.name for number, task in enumerate(self._tasks) if number in differ]

    def _run(self, tasks: list[MergeTask], destinations: list[Destination], keys: set[Key]) -> Iterator[tuple[Piece, Any]]:
        """Makes these pieces again. Yields each piece with the finding of its destination."""
        if not keys:
            return
        plan = self.plan
        budget, io = _budget(plan, tasks)
        modules = modules_of(tasks, CRC32, plan.torch_needed)
        job = Job(new_key(), budget, plan.identities, False, io == "mmap", CRC32, tuple(destinations), modules)
        wanted: Callable[[Piece], bool] = lambda piece: piece.key in keys  # noqa: E731
        turning = Turning(job, tasks, wanted, self._create)
        with closing(ThreadExecutor(budget.workers)) as executor, lent(job, self._inputs):
            for _ in turning.make(executor, self._inputs):
                pass
            with closing(run_all(job, executor, turning.tasks, wanted)) as results:
                for done in results:
                    yield done.piece(tasks), done.found


@dataclass(frozen=True, slots=True)
class _Repetition:
    """The place of a tensor's bytes. The bytes that are made again are compared with them."""

    location: Location
    offset: int

    def open(self, bench: Bench) -> _Repeated:
        return _Repeated(bench.inputs.get(self.location), self.offset)


class _Repeated:
    """Compares bytes with the file, block by block. Finds whether any differ."""

    def __init__(self, file: Input, offset: int) -> None:
        self._file, self._offset = file, offset
        self._differs = False

    def found(self) -> bool:
        return self._differs

    def write_full(self, data: Any, offset: int) -> None:
        there = bytearray(min(len(data), _REPEATED_BYTES))
        for start, stop in ranges(len(data), _REPEATED_BYTES):
            if stop - start < len(there):  # the last block
                there = bytearray(stop - start)
            self._file.read_into(memoryview(there), self._offset + offset + start)
            if there != data[start:stop]:
                self._differs = True
                return


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The place of a tensor's numbers, and their dtype. Float64 results are compared with them."""

    location: Location
    offset: int
    dtype: DType

    def open(self, bench: Bench) -> _Compared:
        return _Compared(bench.inputs.get(self.location), self)


class _Compared:
    """Compares float64 numbers with the numbers in the file.

    Finds the number of all numbers, of those that equal the float64 result rounded once, and of those that differ from it
    by more than rounding.
    """

    def __init__(self, file: Input, place: _Comparison) -> None:
        self._file, self._offset, self._dtype = file, place.offset, place.dtype
        self._counts = [0, 0, 0]

    def found(self) -> tuple[int, ...]:
        return tuple(self._counts)

    def write_full(self, data: Any, offset: int) -> None:
        import torch

        size, exact = self._dtype.element_bytes, torch.frombuffer(data, dtype=torch.float64)
        first = offset // 8
        for start, stop in ranges(len(exact), _COMPARED_ELEMS):  # keeps the memory within _BESIDE_BYTES
            raw = bytearray((stop - start) * size)
            self._file.read_into(memoryview(raw), self._offset + (first + start) * size)
            equal, far = _compared(torch.frombuffer(raw, dtype=self._dtype.torch), exact[start:stop])
            for number, more in enumerate((stop - start, equal, far)):
                self._counts[number] += more


def _compared(there: torch.Tensor, exact: torch.Tensor) -> tuple[int, int]:
    """Returns how many numbers equal the exact ones rounded once, and how many differ from them by more than rounding."""
    import torch

    rounded, wide = exact.to(there.dtype).double(), there.double()
    equal = (rounded == wide) | (rounded.isnan() & wide.isnan())
    if bool(equal.all()):
        return len(there), 0
    near = (wide - exact).abs() <= max(torch.finfo(there.dtype).eps, _ROUNDING) * exact.abs()
    near &= exact.isfinite() & wide.isfinite()
    return int(equal.sum()), int((~(equal | near)).sum())
