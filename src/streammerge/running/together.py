"""Makes several outputs of the same inputs in one read: a chunk is read once, and each output's kernel computes it.

Tensors that all outputs make alike, with other parameters, are made here. A run makes all others by itself afterwards, such
as long tensors whose passes all workers share. So every output has the bytes of its own merge.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streammerge.errors import BudgetError
from streammerge.events import Listener, Spooled, TaskDone
from streammerge.kernels.chunk import chunk_spans
from streammerge.methods.linear import Combination
from streammerge.planning.budget import (
    BEST_CHUNK_ELEMS,
    PER_COLUMN_BYTES,
    PER_PROCESS_BYTES,
    PER_ROW_BYTES,
    PER_TASK_BYTES,
    PER_TENSOR_BYTES,
    Budget,
)
from streammerge.planning.costs import budget_of
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, as_one_piece, objects, pieces, stretches, where
from streammerge.running import process
from streammerge.running.choosing import executor_of
from streammerge.running.computing import KernelMaker, bind, failures
from streammerge.running.engine import modules_of
from streammerge.running.executors.base import Executors, Host
from streammerge.running.job import Job, OutputPlace, lent, new_key
from streammerge.running.session import Run
from streammerge.running.spooling import spooled_tasks
from streammerge.running.tiles import TILE_BYTES, Summed, Tiles
from streammerge.running.worker import MergeWork, MergeWorker, done_of, sweep_of
from streammerge.running.workspace import Inputs, Outgoing
from streammerge.sources.base import Source
from streammerge.sources.deflated import PackedRecord
from streammerge.stores.base import Output
from streammerge.stores.inputs import InputFiles
from streammerge.stores.scratch import scratch
from streammerge.units import PAGE_BYTES

if TYPE_CHECKING:
    import torch

_OUT_BYTES = (8 << 20, 4 << 20, 2 << 20, 1 << 20)
"""Bytes of each output that a worker collects before it writes, the best first."""
_MOST_TENSORS = 256


@dataclass(frozen=True, slots=True)
class Common:
    """Tensors that several outputs make of the same sources. ``sources``: pieces with all that any of them reads.
    ``outputs``: the numbers of the runs, and ``batches`` the pieces of each."""

    sources: list[Piece]
    outputs: list[int]
    batches: list[list[Piece]]


@dataclass(frozen=True, slots=True)
class TogetherWork:
    """Makes units of several outputs. ``outputs``: the most of one unit. ``out_bytes``: collected of each before it is
    written. ``raw_bytes``: of what is read of a chunk and does not stay mapped."""

    job: Job
    outputs: int
    out_bytes: int
    raw_bytes: int

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    def open(self, host: Host) -> TogetherWorker:
        return TogetherWorker(self, host)


class TogetherWorker(MergeWorker):
    def __init__(self, work: TogetherWork, host: Host) -> None:
        super().__init__(MergeWork(work.job), host)
        self._out_bytes = work.out_bytes
        each = work.out_bytes + PAGE_BYTES
        arena = memoryview(mmap.mmap(-1, work.outputs * each + work.raw_bytes))
        self._buffers = [arena[number * each : (number + 1) * each] for number in range(work.outputs)]
        self._raw = arena[work.outputs * each :]
        self._tiles = Tiles()

    def run(self, unit: Common) -> list[tuple[int, PieceDone]]:  # type: ignore[override]
        """Computes and writes the pieces of all outputs. Returns the number of the output with each. The last one says what
        was read for all."""
        self.one_torch_thread()
        asked = self.workspace.asked_bytes
        outgoing, targets = list[Outgoing](), []
        for batch, buffer in zip(unit.batches, self._buffers, strict=False):
            targets.append(self.job.destinations[batch[0].task.file].open(self.bench))
            outgoing.append(Outgoing(targets[-1].write_full, buffer, batch[0].offset))
        made = list[tuple[int, PieceDone]]()
        bounds = _bounds(unit, self.job.budget.kept_bytes)
        for start, stop in zip(bounds, [*bounds[1:], len(unit.sources)], strict=True):
            parts = [batch[start:stop] for batch in unit.batches]
            for number, done in self._stretch(unit.sources[start:stop], parts, outgoing):
                made.append((unit.outputs[number], done))
        for each in outgoing:
            each.flush()
        self.bench.inputs.check_whole()
        for target in targets:
            target.found()
        number, done = made[-1]
        made[-1] = number, done._replace(read_bytes=self.workspace.asked_bytes - asked)
        return made

    def _stretch(
        self, sources: list[Piece], parts: list[list[Piece]], outgoing: list[Outgoing]
    ) -> Iterator[tuple[int, PieceDone]]:
        alike = [number for number, part in enumerate(parts) if not (part[0].task.verbatim or part[0].task.method.passes)]
        for number, part in enumerate(parts):
            if number not in alike:
                for piece in part:
                    yield number, self._one(piece, outgoing[number])
        if alike:
            wholes = [as_one_piece(parts[number]) for number in alike]
            made = self._chunks_once(as_one_piece(sources), wholes, [outgoing[number] for number in alike])
            for number, whole, done in zip(alike, wholes, made, strict=True):
                part = parts[number]
                if len(part) == 1:
                    yield number, done
                elif done.nonfinite:  # it must be told tensor by tensor
                    outgoing[number].take_back(whole.nbytes)
                    for piece in part:
                        yield number, self._one(piece, outgoing[number])
                else:
                    data, at = outgoing[number].last(whole.nbytes), 0
                    for piece in part:
                        yield number, done_of(piece, self.job.checksum.update(data[at : at + piece.nbytes]))
                        at += piece.nbytes

    def _chunks_once(self, sources: Piece, wholes: list[Piece], outgoing: list[Outgoing]) -> list[PieceDone]:
        """Computes one piece of each output, chunk by chunk."""
        source = self.source(sources.task, keep=False)
        once = _Once(source, self._raw)
        views = [_Picked(once, source, _numbers(sources.task, whole.task)) for whole in wholes]
        makers, sums = list[KernelMaker](), [0] * len(wholes)
        for whole, view in zip(wholes, views, strict=True):
            with failures(whole.task, whole.start, whole.stop):
                kernel = bind(whole.task, sweep_of(self, whole.task, source))
                makers.append(KernelMaker(kernel, whole.task, view, self.workspace, self.job.budget.chunk_elems))
        widest = max(whole.task.out.dtype.component.element_bytes for whole in wholes)
        most, row = min(self.job.budget.chunk_elems, self._out_bytes // widest), wholes[0].task.row
        summed = self._tiles.fit(len(once)) and _weighted_sums(makers, views)
        for a, b in chunk_spans(sources.start, sources.stop, most, row):
            self.host.check()
            source.move_to(a, b)
            once.begin(a, b)
            parts = self._summed(summed, a, b, wholes, once, outgoing) if summed else []
            for number, maker in enumerate(makers):
                with failures(maker.task, a, b):
                    if parts:
                        part, finite = parts[number]
                        if not finite:
                            maker.count(_numbers_in(part, maker.task), maker.chunk(a, b))
                    else:
                        part = maker.put(a, b, outgoing[number])
                sums[number] = self.job.checksum.update(part, sums[number])
        return [done_of(*each) for each in zip(wholes, sums, [maker.nonfinite for maker in makers], strict=True)]

    def _summed(
        self,
        kernels: Sequence[Summed],
        start: int,
        stop: int,
        wholes: Sequence[Piece],
        once: _Once,
        outgoing: Sequence[Outgoing],
    ) -> list[tuple[memoryview, bool]]:
        """Computes a chunk of all outputs in tiles. Returns the bytes of each, and whether all are finite for certain."""
        import torch

        parts = [
            each.room((stop - start) * whole.task.out.dtype.component.element_bytes)
            for each, whole in zip(outgoing, wholes, strict=True)
        ]
        outs = [_numbers_in(part, whole.task) for part, whole in zip(parts, wholes, strict=True)]
        with failures(wholes[0].task, start, stop):
            compute = getattr(torch, wholes[0].task.compute)
            finite = self._tiles.sums(start, stop, compute, once.read, kernels, outs)
        return list(zip(parts, finite, strict=True))


def _numbers_in(part: memoryview, task: MergeTask) -> torch.Tensor:
    import torch

    return torch.frombuffer(part, dtype=task.out.dtype.component.torch)


def _weighted_sums(makers: Sequence[KernelMaker], views: Sequence[_Picked]) -> list[Summed]:
    """Returns the kernels with the numbers of their sources if all are weighted sums in one dtype; else nothing."""
    found = list[Summed]()
    for maker, view in zip(makers, views, strict=True):
        kernel, task = maker.kernel, maker.task
        if not isinstance(kernel, Combination) or task.compute != makers[0].task.compute:
            return []
        based = int(task.based)
        base = view.numbers[0] if based and kernel.of_base else None
        found.append((kernel, view.numbers[based:], base))
    return found if len(found) > 1 else []


def _bounds(unit: Common, kept_bytes: int) -> list[int]:
    """Returns where a stretch begins that every output can compute as one tensor."""
    starts = {0}
    for batch in (unit.sources, *unit.batches):
        at = 0
        for stretch in stretches(batch, kept_bytes):
            starts.update([at] if stretch[0].task.method.pointwise else range(at, at + len(stretch)))
            at += len(stretch)
    return sorted(starts)


def _numbers(all_of: MergeTask, one: MergeTask) -> list[int]:
    """Returns the number of each source of a task among all sources."""
    known = {id(source.spec): number for number, source in enumerate(all_of.sources)}
    found = [known.get(id(source.spec), -1) for source in one.sources]
    places = [source.place for source in all_of.sources] if -1 in found else []
    return [places.index(s.place) if n < 0 else n for n, s in zip(found, one.sources, strict=True)]


class _Once:
    """Reads each source once for a chunk, whoever asks for it."""

    def __init__(self, source: Inputs, raw: memoryview) -> None:
        self._source, self._free = source, raw
        self._held: dict[int, torch.Tensor] = {}
        self._begin = self._end = self._taken = 0

    def __len__(self) -> int:
        return len(self._source)

    def begin(self, start: int, stop: int) -> None:
        """Forgets the chunk before."""
        self._begin, self._end, self._taken = start, stop, 0
        self._held.clear()

    def read(self, source: int, start: int, stop: int) -> torch.Tensor:
        import torch

        if self._source.stays(source) or not self._begin <= start <= stop <= self._end:
            return self._source.read(source, start, stop)
        held = self._held.get(source)
        if held is None:
            made = self._source.read(source, self._begin, self._end)
            nbytes = made.numel() * made.element_size()
            part = self._free[self._taken : self._taken + nbytes]
            self._taken += -(-nbytes // 64) * 64
            held = torch.frombuffer(part, dtype=made.dtype).copy_(made) if nbytes else made
            self._held[source] = held
        return held[start - self._begin : stop - self._begin]


class _Picked:
    """The sources of one output among all sources."""

    def __init__(self, once: _Once, source: Inputs, numbers: list[int]) -> None:
        self._once, self._source, self.numbers = once, source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def move_to(self, start: int, stop: int) -> None:
        """Does nothing: the chunk has begun for all outputs."""

    def origin(self, source: int) -> str:
        return self._source.origin(self.numbers[source])

    def stays(self, source: int) -> bool:  # noqa: ARG002
        """Says yes: what is read of a chunk is held for all outputs."""
        return True

    def read(self, source: int, start: int, stop: int) -> torch.Tensor:
        return self._once.read(self.numbers[source], start, stop)


class Together:
    """The common tensors of several planned outputs. ``tasks``: with all sources that any output reads. ``numbers``: for
    each, the number of the task in each plan."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        self.tasks: list[MergeTask] = []
        self.numbers: list[list[int]] = []
        found = [{task.out.name: number for number, task in enumerate(plan.tasks)} for plan in plans[1:]]
        for number, task in enumerate(plans[0].tasks):
            others = [known.get(task.out.name, -1) for known in found]
            own = [task, *(plan.tasks[n] for plan, n in zip(plans[1:], others, strict=True) if n >= 0)]
            if -1 not in others and _are_alike(own):
                self.tasks.append(replace(task, sources=_all_sources(own)))
                self.numbers.append([number, *others])

    @property
    def read_bytes(self) -> int:
        return sum(task.read_bytes for task in self.tasks)

    def budget(self, memory_bytes: int, workers: int) -> tuple[Budget, str, int, int]:
        """Returns the budget, the way to read, the bytes that are collected of each output, and the bytes of what is read
        of a chunk. Raises BudgetError if the memory is too little for so many outputs."""
        plans, tasks = self.plans, self.tasks
        processes = PER_PROCESS_BYTES if plans[0].executor == "processes" else 0
        elems = max(BEST_CHUNK_ELEMS, *(task.row for task in tasks))
        raw = max(sum(s.spec.dtype.component.element_bytes * elems + 64 for s in task.sources) for task in tasks)
        fixed = plans[0].pickle_bytes + sum(map(bookkeeping_bytes, plans[1:]))
        error: BudgetError | None = None
        for out_bytes in _OUT_BYTES:
            beside = len(plans) * (out_bytes + PAGE_BYTES) + raw + TILE_BYTES + processes
            try:
                budget, io = budget_of(tasks, memory_bytes, workers, plans[0].io, bool(plans[0].spooled), fixed, beside)
            except BudgetError as failed:
                error = failed
                continue
            if budget.workers >= min(workers, 2) or out_bytes == _OUT_BYTES[-1]:
                return budget, io, out_bytes, raw
        raise error or BudgetError("there is no memory for several outputs")

    def make(
        self, runs: Sequence[Run], memory_bytes: int, workers: int, executor: str | Executors, polite: bool, tell: Listener
    ) -> int:
        """Makes what the runs lack of these tensors. Returns the bytes that were read."""
        if not self.tasks:
            return 0
        budget, io, out_bytes, raw = self.budget(memory_bytes, workers)
        plan = self.plans[0]
        outputs = [run.begin() for run in runs]
        firsts = [sum(map(len, outputs[:number])) for number in range(len(runs))]
        files: list[Output] = [file for own in outputs for file in own]
        if any(file.in_parts for file in files):
            return 0  # what is sent in parts is made in the order of the file
        identities = {path: known for each in self.plans for path, known in each.identities.items()}
        kind = plan.layout.receipt.kind
        modules = modules_of([*self.tasks, *self._methods()], kind, any(each.torch_needed for each in self.plans))
        places = tuple(OutputPlace(file.location, file.size) for file in files)
        read_bytes, gauge = 0, process.Gauge()
        with closing(budget.opened(identities, polite)) as inputs, _spooled(self, runs, inputs, tell) as tasks:
            job = Job(new_key(), budget, identities, polite, io == "mmap", kind, places, modules)
            units = self._units(tasks, runs, firsts, out_bytes)
            used = executor_of(plan, executor)(budget.workers)
            work = TogetherWork(job, len(runs), out_bytes, raw)
            with closing(used), lent(job, inputs, files), closing(used.run(work, units)) as results:
                for made in results:
                    for number, done in made:
                        piece = done.piece(self.plans[number].tasks)
                        finished = runs[number].take(piece, done)
                        nbytes = piece.read_bytes if number == made[0][0] else 0  # all outputs have read the same
                        read_bytes += done.read_bytes
                        tell(TaskDone(piece.task.out.name, nbytes, finished.nbytes, gauge.now()))
            for run in runs:
                run.peak_bytes, run.startup_bytes = max(run.peak_bytes, used.peak_bytes), used.startup_bytes
        return read_bytes

    def make_long(self, runs: Sequence[Run], executor: str | Executors) -> int:
        """Makes the long tensors whose passes all workers share, tensor by tensor, so that all outputs read one while it is
        in the system's cache. Returns how many. Leaves them to the runs where one needs more than inputs and files, and to
        worker processes, whose start would cost more."""
        plans = self.plans
        if executor == "processes" or any(plan.spooled or plan.executor == "processes" for plan in plans):
            return 0
        long = [where(plan.tasks, lambda task: task.spread and not task.of_one and not task.to_turn) for plan in plans]
        names = [{plan.tasks[number].out.name: number for number in own} for plan, own in zip(plans, long, strict=True)]
        every = dict.fromkeys(name for own in names for name in own)
        if not every or any(file.in_parts for run in runs for file in run.begin()):
            return 0
        for name in every:
            for run, own in zip(runs, names, strict=True):
                if name in own:
                    run.make_long(own[name])
        return len(every)

    def _methods(self) -> Iterator[MergeTask]:
        """Yields a task of each further method."""
        seen = {id(task.method) for task in self.tasks}
        for plan in self.plans[1:]:
            for task in plan.tasks:
                if id(task.method) not in seen:
                    seen.add(id(task.method))
                    yield task

    def _units(
        self, tasks: Sequence[MergeTask], runs: Sequence[Run], firsts: Sequence[int], out_bytes: int
    ) -> Iterator[Common]:
        """Yields neighbouring tensors together, up to ``out_bytes``, and the pieces of long tensors one by one."""
        unit: Common | None = None
        held = 0
        for task, numbers in zip(tasks, self.numbers, strict=True):
            own = [plan.tasks[number] for plan, number in zip(self.plans, numbers, strict=True)]
            order = _order(own, task)
            mine = [
                replace(one, sources=tuple(task.sources[n] for n in picked), file=one.file + first)
                for one, picked, first in zip(own, order, firsts, strict=True)
            ]
            for piece in pieces(task, numbers[0]):
                lacking = [k for k, number in enumerate(numbers) if runs[k].lacks((number, piece.start))]
                if not lacking:
                    continue
                parts = [Piece(mine[k], numbers[k], piece.start, piece.stop) for k in lacking]
                more = max(part.nbytes for part in parts)
                if unit is not None and (
                    not piece.whole or unit.outputs != lacking or held + more > out_bytes or not _follow(unit, parts)
                ):
                    yield unit
                    unit = None
                if unit is None:
                    unit, held = Common([], lacking, [[] for _ in lacking]), 0
                held += more
                unit.sources.append(piece)
                for batch, part in zip(unit.batches, parts, strict=True):
                    batch.append(part)
        if unit is not None:
            yield unit


def bookkeeping_bytes(plan: Plan) -> int:
    """Returns the memory that a plan holds while another one runs."""
    objects_ = sum(1 for _ in objects(plan.tasks))
    rows, inputs = len(plan.tasks) - objects_, max(len(plan.recipe.inputs), 1)
    held = objects_ * (PER_TASK_BYTES + inputs * PER_TENSOR_BYTES) + rows * (PER_ROW_BYTES + inputs * PER_COLUMN_BYTES)
    return held + plan.pickle_bytes


def _are_alike(tasks: Sequence[MergeTask]) -> bool:
    """Whether one worker can make a tensor of all outputs at once."""
    first = tasks[0]
    row = first.row
    for task in tasks:
        if (
            task.out.dtype.component.element_bytes * task.row > _OUT_BYTES[-1]
            or task.out.shape != first.out.shape
            or task.spread
            or task.of_one
            or task.to_turn
            or task.method.whole
            or task.row != row
            or task.piece_elems != first.piece_elems
            or not task.sources
        ):
            return False
    return first.elems > 0


def _all_sources(tasks: Sequence[MergeTask]) -> tuple[Source, ...]:
    first = tasks[0].sources
    if all(task.sources == first for task in tasks[1:]):
        return first
    return tuple({source.place: source for task in tasks for source in task.sources}.values())


def _order(tasks: Sequence[MergeTask], whole: MergeTask) -> list[list[int]]:
    """Returns the numbers of each task's sources among those of the whole, whose records may be unpacked."""
    first = tasks[0].sources
    if all(task.sources == first for task in tasks[1:]):
        return [list(range(len(first)))] * len(tasks)
    numbers = {place: n for n, place in enumerate({s.place: None for task in tasks for s in task.sources})}
    return [[numbers[source.place] for source in task.sources] for task in tasks]


def _follow(unit: Common, parts: Sequence[Piece]) -> bool:
    if len(unit.sources) >= _MOST_TENSORS:
        return False
    for batch, part in zip(unit.batches, parts, strict=True):
        before, task = batch[-1], part.task
        other = before.task
        if not (before.whole and task.file == other.file and task.offset == other.offset + other.out.nbytes):
            return False
    return True


@contextmanager
def _spooled(together: Together, runs: Sequence[Run], inputs: InputFiles, tell: Listener) -> Iterator[Sequence[MergeTask]]:
    """Yields the tasks, with packed records that are unpacked once for all outputs."""
    if not together.plans[0].spooled:
        yield together.tasks
        return

    def told(tensor: str, record: PackedRecord) -> None:
        runs[0].read_bytes += record.compressed_bytes
        tell(Spooled(tensor, record.nbytes))

    def lacks(task: MergeTask, numbers: list[int]) -> bool:
        starts = [piece.start for piece in pieces(task, numbers[0])]
        return any(run.lacks((n, start)) for run, n in zip(runs, numbers, strict=True) for start in starts)

    with scratch() as create:
        needed = [task for task, n in zip(together.tasks, together.numbers, strict=True) if lacks(task, n)]
        yield spooled_tasks(together.tasks, needed, inputs, create, told)
