"""The work of a worker: from inputs to written bytes, unit by unit. It needs only plain data.

A unit is a batch of pieces, or a span of a long tensor that a method reads before it makes its kernel. A batch is computed
chunk by chunk in the worker's buffers, which are allocated once.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streammerge.errors import StreammergeError, TaskError, printable
from streammerge.kernels.agreed import AGREED, count_nonfinite, origins
from streammerge.kernels.chunk import Chunk, Kernel, Look, Step, chunk_spans
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.record import Record
from streammerge.planning.budget import Budget
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, joined, stretches
from streammerge.running.executors.base import Host
from streammerge.running.workspace import Inputs, Outgoing, Workspace, prepare_torch
from streammerge.sources.stored import Stored
from streammerge.stores import faults
from streammerge.stores.base import COPY_BYTES, Location, Output, Status
from streammerge.stores.checksums import Checksum
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Target(Protocol):
    """Takes the bytes of one unit."""

    def write_full(self, data: Any, offset: int) -> None: ...

    def found(self) -> Any:
        """Returns the finding about these bytes as small, plain data. None if there is none."""
        ...


class Destination(Protocol):
    """The destination of the bytes of tasks, as plain data that can be pickled."""

    def open(self, bench: Bench, /) -> Target:
        """Returns the target of one unit."""
        ...


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """A file of the output. The file exists already."""

    location: Location
    size: int

    def open(self, bench: Bench) -> _Written:
        return _Written(*bench.output(self))


class _Written:
    """Writes to a file of the output. ``own``: whether this process has opened the file itself."""

    __slots__ = ("_file", "_own", "write_full")

    def __init__(self, file: Output, own: bool) -> None:
        self._file, self._own, self.write_full = file, own, file.write_full

    def found(self) -> None:
        if self._own:
            self._file.check()


@dataclass(frozen=True, slots=True)
class Job:
    """The common data of all works of one run, as plain data that can be pickled.

    ``key``: a unique name of the run, see :func:`new_key`. ``inputs``: the expected status of each input file. ``polite``:
    see :class:`InputFiles`. ``mapped``: whether inputs are mapped or read. ``modules``: see :class:`Work`.
    """

    key: str
    budget: Budget
    inputs: dict[Location, Status]
    polite: bool
    mapped: bool
    checksum: Checksum
    destinations: tuple[Destination, ...]
    modules: tuple[str, ...] = ()


_runs = itertools.count()


def new_key() -> str:
    """Returns a key that no other run has, in any process."""
    return f"{os.getpid()}.{next(_runs)}"


_lent: dict[str, tuple[InputFiles, Sequence[Output]]] = {}


@contextmanager
def lent(job: Job, inputs: InputFiles, outputs: Sequence[Output] = ()) -> Iterator[None]:
    """Lends these open files to the job's workers in this process. Workers in other processes open the files again."""
    _lent[job.key] = inputs, outputs
    try:
        yield
    finally:
        del _lent[job.key]


class Bench:
    """The open files and free buffers of a job, for the workers of one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        inputs, outputs = _lent.get(job.key, (None, ()))
        self._own_inputs = InputFiles(job.inputs, job.polite) if inputs is None else None
        self.inputs: InputFiles = inputs or self._own_inputs  # type: ignore[assignment]
        self._outputs = {file.location: file for file in outputs}
        self._own_outputs: dict[Location, Output] = {}
        self._last: tuple[int, MergeTask] | None = None
        self._free: list[Workspace] = []
        self._lock = threading.Lock()
        self._open = ExitStack()
        self._open.enter_context(faults.survived())
        if "torch" in job.modules:
            prepare_torch()

    def output(self, place: OutputPlace) -> tuple[Output, bool]:
        """Returns the open file of the output, and whether this process opened it itself."""
        file = self._outputs.get(place.location)
        if file is not None:
            return file, False
        with self._lock:
            file = self._own_outputs.get(place.location)
            if file is None:
                file = self._own_outputs[place.location] = place.location.reopen(place.size)
            return file, True

    def check_outputs(self) -> None:
        """Raises the error of a sync that failed when a file was closed between two uses. The kernel tells it only once, so
        no other process would learn of it."""
        with self._lock:
            opened = list(self._own_outputs.values())
        for file in opened:
            file.check()

    def same(self, number: int, task: MergeTask) -> MergeTask:
        """Returns the task object that came first under this number. Results of its sources are cached for that object."""
        last = self._last
        if last is not None and last[0] == number and last[1].out == task.out:
            return last[1]
        self._last = number, task
        return task

    def take(self) -> Workspace:
        """Returns a workspace that no other worker uses: a free one, or a new one."""
        with self._lock:
            return self._free.pop() if self._free else Workspace(self.job.budget)

    def give_back(self, workspace: Workspace) -> None:
        with self._lock:
            self._free.append(workspace)

    def close(self) -> None:
        self._free.clear()
        for file in self._own_outputs.values():
            file.close()
        if self._own_inputs is not None:
            self._own_inputs.close()
        self._open.close()


@dataclass(frozen=True, slots=True)
class MergeWork:
    """Computes and writes batches of pieces that are neighbours in the output.

    ``passes``: the results of the method's passes, as :class:`Record` keeps them, if all units are pieces of one long
    tensor. None if each worker runs the passes of its tensors itself.
    """

    job: Job
    passes: tuple[bytes, ...] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    def open(self, host: Host) -> MergeWorker:
        return MergeWorker(self, host)


@dataclass(frozen=True, slots=True)
class SweepWork:
    """Takes one step of a pass over spans of a long tensor.

    ``passes``: the results of the previous passes. The worker binds the method with them, and so gets the look of the
    next pass.
    """

    job: Job
    number: int
    task: MergeTask
    passes: tuple[bytes, ...]
    step: Step[Any]
    sparse: int

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    def open(self, host: Host) -> SweepWorker:
        return SweepWorker(self, host)


Span = tuple[int, int, int]
"""A number that comes back with the answer, the first element, and the element after the last one."""


class _Reached(BaseException):
    """Raised to abandon the binding of a method at the requested pass."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look


class _Worker:
    """The common part of both kinds of workers: buffers, and the chunks of a task."""

    def __init__(self, job: Job, host: Host) -> None:
        self.job, self.host = job, host
        self.bench = host.kept(job.key, lambda: Bench(job))
        self.workspace = self.bench.take()
        self._prepared = False

    def close(self) -> None:
        """Raises OSError if the disk failed to store anything that this process has written, at any time of the job."""
        self.bench.give_back(self.workspace)
        self.bench.check_outputs()

    def one_torch_thread(self) -> None:
        """Limits torch to one thread for this worker, because the workers already run in parallel."""
        if not self._prepared:
            import torch

            torch.set_num_threads(1)
            self._prepared = True

    def source(self, task: MergeTask, keep: bool) -> Inputs:
        kept_bytes = self.job.budget.kept_bytes if keep else -1
        return Inputs(self.bench.inputs, task.sources, self.workspace, self.job.mapped, kept_bytes, self.host.check)

    def chunks(self, task: MergeTask, source: Inputs, start: int, stop: int, sparse: int = 0) -> Iterator[Chunk]:
        import torch

        compute, models = getattr(torch, task.compute), len(task.sources) - task.based
        for a, b in chunk_spans(start, stop, self.job.budget.chunk_elems, task.row, sparse):
            self.host.check()
            self.workspace.clear()
            source.move_to(a, b)
            yield Chunk(a, b, compute, self.workspace, source.read, task.based, models)


class MergeWorker(_Worker):
    def __init__(self, work: MergeWork, host: Host) -> None:
        super().__init__(work.job, host)
        self._passes = work.passes
        self._kernel: Kernel | None = None

    def run(self, batch: list[Piece]) -> list[PieceDone]:
        """Computes and writes pieces. Errors that are not streammerge's own come out as TaskError."""
        first = batch[0]
        if not first.whole:
            batch = [replace(first, task=self.bench.same(first.number, first.task))]
        target = self.job.destinations[batch[0].task.file].open(self.bench)
        outgoing = Outgoing(target.write_full, self.workspace, batch[0].offset)
        made: list[PieceDone] = []
        for stretch in stretches(batch, self.job.budget.kept_bytes):
            if len(stretch) == 1:
                made.append(self._one(stretch[0], outgoing))
            elif not stretch[0].task.method.pointwise:
                made += self._in_turn(stretch, outgoing)
            else:
                made += self._together(stretch, outgoing) or [self._one(piece, outgoing) for piece in stretch]
        outgoing.flush()
        self.bench.inputs.check_whole()
        found = target.found()
        if found is not None:
            made[-1] = replace(made[-1], found=found)
        return made

    def _together(self, stretch: list[Piece], outgoing: Outgoing) -> list[PieceDone] | None:
        """Computes pieces as one tensor. Returns None for NaN or infinity, which must be reported tensor by tensor."""
        whole = joined(stretch)
        done = self._one(whole, outgoing)
        if done.nonfinite:
            outgoing.take_back(whole.nbytes)
            return None
        data, made, start = outgoing.last(whole.nbytes), [], 0
        for piece in stretch:
            made.append(_done(piece, self.job.checksum.update(data[start : start + piece.nbytes])))
            start += piece.nbytes
        return made

    def _in_turn(self, stretch: list[Piece], outgoing: Outgoing) -> list[PieceDone]:
        """Computes pieces one after the other from inputs that are opened, mapped and announced once for all."""
        self.one_torch_thread()
        source, made = self.source(joined(stretch).task, keep=True), []
        for piece in stretch:
            with failures(piece.task, piece.start, piece.stop):
                made.append(self._apply(self._kernel_of(piece.task, source), piece, source, outgoing))
            source.first += piece.stop
        return made

    def _one(self, piece: Piece, outgoing: Outgoing) -> PieceDone:
        with failures(piece.task, piece.start, piece.stop):
            return self._copy(piece, outgoing) if piece.task.verbatim else self._compute(piece, outgoing)

    def _copy(self, piece: Piece, outgoing: Outgoing) -> PieceDone:
        whole = piece.task.sources[0]
        if whole.__class__ is not Stored:
            return self._copy_read(piece, outgoing)
        value, begin = 0, whole.offset + piece.offset - piece.task.offset
        source = self.bench.inputs.get(whole.path)
        for start, stop in ranges(piece.nbytes, min(COPY_BYTES, self.job.budget.out_bytes)):
            self.host.check()
            part = outgoing.room(stop - start)
            source.read_into(part, begin + start)
            value = self.job.checksum.update(part, value)
        source.release(begin, piece.nbytes)
        return _done(piece, value)

    def _copy_read(self, piece: Piece, outgoing: Outgoing) -> PieceDone:
        """Copies a tensor that is not a plain byte range, through its reader."""
        value, dtype = 0, piece.task.out.dtype
        self.one_torch_thread()
        source = self.source(piece.task, keep=False)
        size, whole = dtype.component.element_bytes, dtype.element_bytes
        step = max(min(COPY_BYTES, self.job.budget.out_bytes) // whole, 1) * (whole // size)  # no complex number is cut
        for start, stop in ranges(piece.stop - piece.start, step):
            self.host.check()
            part = outgoing.room((stop - start) * size)
            source.read_into(0, piece.start + start, piece.start + stop, part)
            value = self.job.checksum.update(part, value)
        return _done(piece, value, source.nonfinite)

    def _compute(self, piece: Piece, outgoing: Outgoing) -> PieceDone:
        self.one_torch_thread()
        source = self.source(piece.task, keep=piece.task.method.passes and self._passes is None)
        return self._apply(self._kernel_of(piece.task, source), piece, source, outgoing)

    def _kernel_of(self, task: MergeTask, source: Inputs) -> Kernel:
        """Returns the kernel of a tensor. Runs its passes here, unless all workers have already run them."""
        if self._kernel is not None:
            return self._kernel
        if self._passes is not None:
            self._kernel = bind(task, _no_sweep, Record(self._passes))
            return self._kernel

        def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            yield step(look, self.chunks(task, source, start, stop, sparse))

        return bind(task, sweep)

    def _apply(self, kernel: Kernel, piece: Piece, source: Inputs, outgoing: Outgoing) -> PieceDone:
        import torch

        value, dtype, nonfinite = 0, piece.task.out.dtype.component, dict[str, int]()
        for chunk in self.chunks(piece.task, source, piece.start, piece.stop):
            result = kernel(chunk)
            if result.numel() != chunk.elems:
                raise ValueError(f"its kernel made {result.numel()} numbers of a chunk of {chunk.elems}")
            part = outgoing.room(chunk.elems * dtype.element_bytes)
            out = torch.frombuffer(part, dtype=dtype.torch).copy_(result.reshape(-1))
            if dtype.kind == "float" and _suspicious(out):
                for name, count in _nonfinite(out, kernel, piece.task.row, chunk, source).items():
                    nonfinite[name] = nonfinite.get(name, 0) + count
            value = self.job.checksum.update(part, value)
        return _done(piece, value, nonfinite)


class SweepWorker(_Worker):
    def __init__(self, work: SweepWork, host: Host) -> None:
        super().__init__(work.job, host)
        self._task, self._work = self.bench.same(work.number, work.task), work
        self.one_torch_thread()
        with failures(work.task, 0, work.task.elems):
            try:
                bind(work.task, _reach, Record(work.passes))
            except _Reached as reached:
                self._look = reached.look
            else:
                raise ValueError(_OTHER_PASSES)

    def run(self, span: Span) -> tuple[int, Any]:
        """Returns the number of the span, and the answer of the step."""
        number, start, stop = span
        task, step = self._task, self._work.step
        with failures(task, start, stop):
            source = self.source(task, keep=False)
            answer = step(self._look, self.chunks(task, source, start, stop, self._work.sparse))
        self.bench.inputs.check_whole()
        return number, answer


_OTHER_PASSES = (
    "it makes other passes when it is bound a second time, and a method must depend on its group and parameters only"
)


def _reach(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
    raise _Reached(look)


def _no_sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
    raise ValueError(_OTHER_PASSES)


def bind(task: MergeTask, sweep: Callable[..., Iterator[Any]], record: Record | None = None) -> Kernel:
    """Returns the kernel of a task. ``sweep`` runs the passes whose results are not in ``record``."""
    import torch

    models, compute = len(task.sources) - task.based, getattr(torch, task.compute)
    group = TensorGroup(task.out.name, task.shape, models, compute, sweep, task.based, task.row, task.seed, record)
    return task.method.bind(group, task.parameters)


@contextmanager
def failures(task: MergeTask, start: int, stop: int) -> Iterator[None]:
    """Turns errors that are not streammerge's own into a TaskError."""
    try:
        yield
    except StreammergeError:
        raise
    except Exception as error:
        raise TaskError(
            f"{printable(task.out.name)} ({task.method.name}, elements {start} to {stop}) failed: {printable(error)}"
        ) from error


def modules_of(tasks: Iterable[MergeTask], checksum: Checksum, torch_needed: bool) -> tuple[str, ...]:
    """Returns the modules that workers need for these tasks. Each worker imports the modules of a user's own methods."""
    own = {method.function.__module__ for method in {id(task.method): task.method for task in tasks}.values()}
    found = [__name__, *sorted(name for name in own if name.startswith("streammerge."))]
    return (*found, *(["crc32c"] if checksum.name == "crc32c" else []), *(["torch"] if torch_needed else []))


def _done(piece: Piece, checksum: int, nonfinite: dict[str, int] | None = None) -> PieceDone:
    return PieceDone(piece.number, piece.start, piece.stop, checksum, nonfinite or {})


def _suspicious(out: torch.Tensor) -> bool:
    """Whether there may be NaN or infinity. The sum is finite only if all terms are; it may also overflow by itself."""
    import math

    if out.element_size() == 1:
        out = out.float()
    return not math.isfinite(out.sum().item())


def _nonfinite(out: torch.Tensor, kernel: Kernel, row: int, chunk: Chunk, source: Inputs) -> dict[str, int]:
    """Counts the non-finite numbers by the file that they come from. An overflow, which no input has, is counted under
    "the result".

    Numbers that all inputs agree on are put into the result first, and are counted under AGREED.
    """
    if not count_nonfinite(out):
        return {}
    counts: dict[str, int] = {}
    settled = chunk.settle(kernel, row, out)
    if settled:
        counts[AGREED] = settled
    for name, count in origins(out, settled, source.read, len(source), chunk.start, source.origin):
        counts[name] = counts.get(name, 0) + count
    return counts
