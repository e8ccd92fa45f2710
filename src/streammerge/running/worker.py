"""The work of a worker: computes and writes batches of pieces. It needs only plain data.

A batch is computed chunk by chunk in the worker's buffers, which are allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from streammerge.errors import StreammergeError, TaskError, printable
from streammerge.kernels.agreed import finite
from streammerge.kernels.batch import MOST_EACH, MOST_ELEMS, Batch
from streammerge.kernels.chunk import Chunk, Kernel, Look, Step, chunk_spans
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.pass_results import PassResults
from streammerge.kernels.spill import Spill
from streammerge.planning.summed import is_summed
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, as_one_piece, stretches
from streammerge.running.executors.base import Host
from streammerge.running.job import Bench, Job, Target
from streammerge.running.nonfinite import Numbers, may_be_nonfinite, nonfinite_of
from streammerge.running.workspace import Inputs, Outgoing, load_torch
from streammerge.sources.stored import Stored
from streammerge.stores.digests import COPY_BYTES
from streammerge.stores.libc import return_large_blocks
from streammerge.tensors.spec import GRAIN, ranges
from streammerge.tensors.threads import one_torch_thread

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.masks import MaskRoom
    from streammerge.running.masking import OwnMasks
    from streammerge.running.measuring import Measuring, Taking
    from streammerge.running.plain import PlainNumbers
    from streammerge.running.summing import Summing
    from streammerge.stores.spilled import SpillPlace

T = TypeVar("T")


class MergeWork(NamedTuple):
    """Computes and writes batches of pieces that are neighbours in the output.

    ``passes``: the results of the method's passes, as :class:`PassResults` keeps them, if all units are pieces of one long
    tensor. None if each worker runs the passes of its tensors itself. ``alone``: whether each unit has all pieces of a long
    tensor that are to be made. ``masks``: where the masks are that the passes of a long tensor have made.
    """

    job: Job
    passes: tuple[bytes, ...] | None = None
    alone: bool = False
    masks: SpillPlace | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    def open(self, host: Host) -> MergeWorker:
        return MergeWorker(self, host)


class Worker:
    """The common part of both kinds of workers: buffers, and the chunks of a task."""

    def __init__(self, job: Job, host: Host) -> None:
        self.job, self.host = job, host
        self.bench = host.kept(job.key, lambda: Bench(job))
        self.workspace = self.bench.take()
        self.bench.halted_by(host.check)
        self._prepared = False
        self._own_masks: OwnMasks | None = None

    def close(self) -> None:
        """Raises OSError if the disk failed to store anything that this process has written, at any time of the job."""
        if self._own_masks is not None:
            self._own_masks.close()
        self.bench.give_back(self.workspace)
        self.bench.check_outputs()

    def one_torch_thread(self) -> None:
        """Limits torch to one thread for this worker, because the workers already run in parallel."""
        if not self._prepared:
            import torch

            torch.set_num_threads(1)
            self._prepared = True

    def own_masks(self, nbytes: int) -> MaskRoom | None:
        """Returns room for the masks of a tensor that this worker makes alone."""
        if self._own_masks is None:
            from streammerge.running.masking import OwnMasks  # here, because most methods make no masks

            self._own_masks = OwnMasks(self.job)
        return self._own_masks.room(nbytes)

    def masks_at(self, place: SpillPlace | None) -> Callable[[int], MaskRoom | None] | None:
        """Returns what gives the room for the masks of a tensor that all workers share."""
        return None if place is None else lambda nbytes: self.bench.masks_at(place)

    def source(self, task: MergeTask, keep: bool) -> Inputs:
        kept_bytes = self.job.budget.kept_bytes if keep else -1
        return Inputs(self.bench.inputs, task.sources, self.workspace, self.job.mapped, kept_bytes, self.host.check)

    def chunks(
        self, task: MergeTask, source: Inputs, start: int, stop: int, sparse: int = 0, taking: Taking | None = None
    ) -> Iterator[Chunk]:
        import torch

        compute, models = getattr(torch, task.compute), len(task.sources) - task.based
        read = source.read if taking is None else taking.read
        for a, b in chunk_spans(start, stop, self.job.budget.chunk_elems, task.row, sparse):
            self.host.check()
            self.workspace.clear(b - a)
            source.move_to(a, b)
            if taking is not None:
                taking.move_to(a, b)
            yield Chunk(a, b, compute, self.workspace, read, task.based, models)


class MergeWorker(Worker):
    def __init__(self, work: MergeWork, host: Host) -> None:
        super().__init__(work.job, host)
        self._passes, self._alone, self._masks = work.passes, work.alone, work.masks
        self._kernel: Kernel | None = None
        self._measuring: Measuring | None = None
        self._numbers: PlainNumbers | None = None

    def run(self, batch: list[Piece]) -> list[PieceDone]:
        """Computes and writes pieces. Errors that are not streammerge's own come out as TaskError."""
        first, asked = batch[0], self.workspace.asked_bytes
        if not first.whole:
            task = self.bench.same(first.number, first.task)
            batch = [piece._replace(task=task) for piece in batch]
        if self.bench.announces:
            from streammerge.running.announcing import announce  # here, because most inputs are local

            for piece in batch:
                announce(self.bench.inputs, piece.task, piece.start, piece.stop)
        if self.job.measures:
            from streammerge.running.measuring import Measuring  # here, because most runs measure nothing

            self._measuring = self._measuring or Measuring()
            self._measuring.begin_unit(len(batch), max([len(piece.task.sources) for piece in batch]))
        target = self.job.destinations[batch[0].task.file].open(self.bench)
        if self._alone:
            return self._checked(self._all_of(batch, target), target, asked)
        outgoing = Outgoing(target.write_full, self.workspace.octets("out"), first.offset)
        made: list[PieceDone] = []
        for stretch in stretches(batch, self.job.budget.kept_bytes):
            if len(stretch) == 1:
                made.append(self._one(stretch[0], outgoing, len(made)))
            elif not stretch[0].task.method.pointwise:
                made += self._in_turn(stretch, outgoing, len(made))
            else:
                made += self._together(stretch, outgoing, len(made)) or [
                    self._one(piece, outgoing, row) for row, piece in enumerate(stretch, len(made))
                ]
        outgoing.flush()
        return self._checked(made, target, asked)

    def _checked(self, made: list[PieceDone], target: Target, asked: int) -> list[PieceDone]:
        """Returns the results of a unit, the last one with the finding of the unit's target, and with all that was read.

        ``asked``: what the worker had asked of stores before the unit.
        """
        self.bench.inputs.check_whole()
        if self._measuring is not None:
            made = self._measuring.put_into(made)
        made[-1] = made[-1]._replace(found=target.found(), read_bytes=self.workspace.asked_bytes - asked)
        return made

    def _together(self, stretch: list[Piece], outgoing: Outgoing, row: int) -> list[PieceDone] | None:
        """Computes pieces as one tensor. Returns None for NaN or infinity, which must be reported tensor by tensor.
        ``row``: the place of the first in the unit."""
        whole = as_one_piece(stretch)
        done = self._one(whole, outgoing, row, stretch)
        if done.nonfinite:
            outgoing.take_back(whole.nbytes)
            if self._measuring is not None:
                self._measuring.drop(row, len(stretch))
            return None
        return self._cut(stretch, outgoing.last(whole.nbytes))

    def _in_turn(self, stretch: list[Piece], outgoing: Outgoing, row: int) -> list[PieceDone]:
        """Computes pieces one after the other from inputs that are opened, mapped and announced once for all."""
        self.one_torch_thread()
        source, made = self.source(as_one_piece(stretch).task, keep=True), list[PieceDone]()
        for part in self._batches_of(stretch):
            done = self._at_once(part, source, outgoing, row + len(made)) if len(part) > 1 else None
            if done is not None:
                made += done
                source.first += sum([piece.stop for piece in part])
                continue
            for piece in part:
                with failures(piece.task, piece.start, piece.stop):
                    kernel = self._kernel_of(piece.task, source)
                    made.append(self._apply(kernel, piece, source, outgoing, row + len(made)))
                source.first += piece.stop
        return made

    def _batches_of(self, stretch: list[Piece]) -> Iterator[list[Piece]]:
        """Yields pieces that the method computes at once, which have one shape. All others are alone."""
        most = min(MOST_ELEMS, self.job.budget.chunk_elems)
        can = stretch[0].task.method.batch is not None
        batch = list[Piece]()
        for piece in stretch:
            if batch and not (
                can
                and piece.task.shape == batch[0].task.shape
                and 0 < piece.stop <= MOST_EACH
                and (len(batch) + 1) * piece.stop <= most
                and piece.task.out.dtype.kind == "float"
            ):
                yield batch
                batch = []
            batch.append(piece)
        yield batch

    def _at_once(self, batch: list[Piece], source: Inputs, outgoing: Outgoing, row: int) -> list[PieceDone] | None:
        """Computes pieces together. Returns None if a number is not finite, which must be settled tensor by tensor.
        ``row``: the place of the first in the unit."""
        import torch

        task, elems = batch[0].task, sum([piece.stop for piece in batch])
        self.host.check()
        self.workspace.clear(elems)
        source.move_to(0, elems)
        taking = None if self._measuring is None else self._measuring.begin(row, batch, source)
        if taking is not None:
            taking.move_to(0, elems)
        compute, models = getattr(torch, task.compute), len(task.sources) - task.based
        read = source.read if taking is None else taking.read
        chunk = Chunk(0, elems, compute, self.workspace, read, task.based, models)
        names = [piece.task.out.name for piece in batch]
        with failures(task, 0, elems):
            result = task.method.batch and task.method.batch(
                Batch(names, task.shape, models, task.seed, chunk), task.parameters
            )
        if result is None:
            return None
        dtype = task.out.dtype.component
        data = outgoing.room(elems * dtype.element_bytes)
        out = torch.frombuffer(data, dtype=dtype.torch).copy_(result.view(-1))
        if may_be_nonfinite(out) and not bool(finite(out).all()):
            outgoing.take_back(len(data))
            return None
        if taking is not None:
            taking.made(data)
        return self._cut(batch, data)

    def _cut(self, pieces: list[Piece], data: memoryview) -> list[PieceDone]:
        """Returns the results of pieces whose bytes lie one after the other."""
        made, start = list[PieceDone](), 0
        for piece in pieces:
            made.append(done_of(piece, self.job.checksum.update(data[start : start + piece.nbytes])))
            start += piece.nbytes
        return made

    def _all_of(self, batch: list[Piece], target: Target) -> list[PieceDone]:
        """Computes pieces of one long tensor. The passes sweep it piece by piece, as many workers would do."""
        self.one_torch_thread()
        task, made = batch[0].task, list[PieceDone]()

        def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            for begin, end in ranges(stop - start, task.piece_elems):
                yield step(look, self.chunks(task, source, start + begin, start + end, sparse))

        with failures(task, 0, task.elems):
            source = self.source(task, keep=False)
            kernel = None if task.verbatim else bind(task, sweep, spills=self.bench.spill, masks=self.own_masks)
        for row, piece in enumerate(batch):
            outgoing = Outgoing(target.write_full, self.workspace.octets("out"), piece.offset)
            with failures(task, piece.start, piece.stop):
                if kernel is None:
                    made.append(self._copy(piece, outgoing))
                else:
                    made.append(self._apply(kernel, piece, source, outgoing, row))
            outgoing.flush()
        return made

    def _one(self, piece: Piece, outgoing: Outgoing, row: int = 0, stretch: Sequence[Piece] | None = None) -> PieceDone:
        """Makes one piece. ``row``: its place in the unit. ``stretch``: the pieces that it does the work of."""
        with failures(piece.task, piece.start, piece.stop):
            if piece.task.verbatim:
                return self._copy(piece, outgoing)
            if "torch" not in self.job.modules:
                return self._plain(piece, outgoing)
            self.one_torch_thread()
            source = self.source(piece.task, keep=piece.task.method.passes and self._passes is None)
            return self._apply(self._kernel_of(piece.task, source), piece, source, outgoing, row, stretch)

    def _plain(self, piece: Piece, outgoing: Outgoing) -> PieceDone:
        """Makes a piece by numpy. Loads torch for chunks with NaN or infinity."""
        from streammerge.running.plain import PlainNumbers  # here, because most merges are made by torch

        task, value, nonfinite = piece.task, 0, dict[str, int]()
        elems = min(self.job.budget.chunk_elems, GRAIN)
        if self._numbers is None:
            self._numbers = PlainNumbers(self.workspace.octets("slots"))
        source = self.source(task, keep=False)
        for start, stop in chunk_spans(piece.start, piece.stop, elems, 1):
            self.host.check()
            source.move_to(start, stop)
            part = outgoing.room((stop - start) * task.out.dtype.element_bytes)
            if not self._numbers.put(task, source, start, stop, part):
                outgoing.take_back(len(part))
                load_torch()
                with one_torch_thread():
                    kernel = bind(task, _no_sweep)
                    for chunk in self.chunks(task, source, start, stop):
                        part = put(kernel, chunk, task, source, outgoing, nonfinite)
            value = self.job.checksum.update(part, value)
        return done_of(piece, value, nonfinite)

    def _copy(self, piece: Piece, outgoing: Outgoing) -> PieceDone:
        whole = piece.task.sources[0]
        if whole.__class__ is not Stored:
            return self._copy_read(piece, outgoing)
        value, begin = 0, whole.offset + piece.offset - piece.task.offset
        source = self.bench.inputs.get(whole.path)
        for start, stop in ranges(piece.nbytes, min(COPY_BYTES, self.job.budget.out_bytes)):
            self.host.check()
            part = outgoing.room(stop - start)
            self.workspace.asked_bytes += len(part)
            source.read_into(part, begin + start)
            value = self.job.checksum.update(part, value)
        source.release(begin, piece.nbytes)
        return done_of(piece, value)

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
        return done_of(piece, value, source.nonfinite)

    def _kernel_of(self, task: MergeTask, source: Inputs) -> Kernel:
        """Returns the kernel of a tensor. Runs its passes here, unless all workers have already run them."""
        if self._kernel is not None:
            return self._kernel
        if self._passes is not None:
            self._kernel = bind(task, _no_sweep, PassResults(self._passes), masks=self.masks_at(self._masks))
            return self._kernel

        return bind(task, sweep_of(self, task, source), spills=self.bench.spill, masks=self.own_masks)

    def _apply(
        self,
        kernel: Kernel,
        piece: Piece,
        source: Inputs,
        outgoing: Outgoing,
        row: int,
        stretch: Sequence[Piece] | None = None,
    ) -> PieceDone:
        value, nonfinite, taking = 0, dict[str, int](), None
        if self._measuring is not None and piece.task.out.dtype.kind == "float":
            taking = self._measuring.begin(row, stretch or [piece], source)
        sums = self._sums_of(kernel, piece.task, source) if taking is None else None
        for chunk in self.chunks(piece.task, source, piece.start, piece.stop, taking=taking):
            part = put(kernel, chunk, piece.task, source, outgoing, nonfinite, sums)
            value = self.job.checksum.update(part, value)
            if taking is not None:
                taking.made(part)
        return done_of(piece, value, nonfinite)

    def _sums_of(self, kernel: Kernel, task: MergeTask, source: Inputs) -> Summing | None:
        """Returns the way to make a kernel's sums by products. None if it is no weighted sum of many models."""
        memory = self.workspace.octets("summed")
        if not memory or not is_summed(task):
            return None
        from streammerge.running.summing import summing  # here, because most merges are of few models

        return summing(kernel, task, memory, self.workspace, source)


def put(
    kernel: Kernel,
    chunk: Chunk,
    task: MergeTask,
    source: Numbers,
    outgoing: Outgoing,
    nonfinite: dict[str, int],
    sums: Summing | None = None,
) -> memoryview:
    """Computes a chunk of a task. Returns its bytes, which are the last in ``outgoing``. Counts NaN and infinity by source
    in ``nonfinite``. ``sums``: another way to the kernel's numbers."""
    import torch

    dtype = task.out.dtype.component
    if sums is not None:
        part = outgoing.room(chunk.elems * dtype.element_bytes)
        out = torch.frombuffer(part, dtype=dtype.torch)
        if not sums.sums(chunk.start, chunk.stop, out):
            count_nonfinite(out, kernel, chunk, task, source, nonfinite)
        return part
    result = kernel(chunk)
    if result.numel() != chunk.elems:
        raise ValueError(f"its kernel made {result.numel()} numbers of a chunk of {chunk.elems}")
    part = outgoing.room(chunk.elems * dtype.element_bytes)
    out = torch.frombuffer(part, dtype=dtype.torch).copy_(result.reshape(-1))
    count_nonfinite(out, kernel, chunk, task, source, nonfinite)
    return part


def count_nonfinite(
    out: torch.Tensor, kernel: Kernel, chunk: Chunk, task: MergeTask, source: Numbers, nonfinite: dict[str, int]
) -> None:
    """Adds NaN and infinity in the result of a chunk to ``nonfinite``, by source. Puts in what all inputs agree on."""
    if task.out.dtype.kind == "float" and may_be_nonfinite(out):
        for name, count in nonfinite_of(out, kernel, task.row, chunk, source).items():
            nonfinite[name] = nonfinite.get(name, 0) + count


def sweep_of(worker: Worker, task: MergeTask, source: Inputs) -> Callable[..., Iterator[Any]]:
    """Returns a sweep over a tensor that this worker makes alone."""

    def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
        yield step(look, worker.chunks(task, source, start, stop, sparse))

    return sweep


OTHER_PASSES = (
    "it makes other passes when it is bound a second time, and a method must depend on its group and parameters only"
)


def _no_sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
    raise ValueError(OTHER_PASSES)


def bind(
    task: MergeTask,
    sweep: Callable[..., Iterator[Any]],
    results: PassResults | None = None,
    spills: Callable[[int], Spill] | None = None,
    masks: Callable[[int], MaskRoom | None] | None = None,
) -> Kernel:
    """Returns the kernel of a task. ``sweep`` runs the passes whose results are not in ``results``; ``spills`` makes a
    temporary file, ``masks`` room for masks."""
    import torch

    if task.method.whole:
        return_large_blocks()
    models, compute = len(task.sources) - task.based, getattr(torch, task.compute)
    more = (task.based, task.row, task.seed, results, task.turned, spills, masks)
    group = TensorGroup(task.out.name, task.shape, models, compute, sweep, *more)
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


def done_of(piece: Piece, checksum: int, nonfinite: dict[str, int] | None = None) -> PieceDone:
    """Returns the result of a piece."""
    return PieceDone(piece.number, piece.start, piece.stop, checksum, nonfinite or {})
