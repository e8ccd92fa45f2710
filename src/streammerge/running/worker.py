"""The work of a worker: computes and writes batches of pieces. It needs only plain data.

A batch is computed chunk by chunk in the worker's buffers, which are allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from streammerge.kernels.batch import MOST_EACH, MOST_ELEMS
from streammerge.kernels.chunk import Chunk, Kernel, Look, Step, chunk_spans
from streammerge.kernels.pass_results import PassResults
from streammerge.planning.summed import is_summed
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, as_one_piece, stretches
from streammerge.running.computing import KernelMaker, bind, chunk_of, failures, no_sweep, put_batch
from streammerge.running.executors.base import Host
from streammerge.running.job import Bench, Job, Target
from streammerge.running.workspace import Inputs, Outgoing
from streammerge.sources.stored import Stored
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    from streammerge.kernels.masks import MaskRoom
    from streammerge.running.makers import Maker
    from streammerge.running.masking import OwnMasks
    from streammerge.running.measuring import Measuring
    from streammerge.running.plain import PlainNumbers
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

    def chunks(self, task: MergeTask, source: Inputs, start: int, stop: int, sparse: int = 0) -> Iterator[Chunk]:
        """Yields the chunks of a task for a pass."""
        for a, b in chunk_spans(start, stop, self.job.budget.chunk_elems, task.row, sparse):
            self.host.check()
            yield chunk_of(task, source, self.workspace, a, b)


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
                    maker = self._by_kernel(self._kernel_of(piece.task, source), piece, source, row + len(made))
                    made.append(self._made(maker, piece, outgoing))
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
        self.host.check()
        taking = None if self._measuring is None else self._measuring.begin(row, batch, source)
        data = put_batch(batch, source, self.workspace, outgoing, taking)
        return None if data is None else self._cut(batch, data)

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
                maker = self._copier(task) if kernel is None else self._by_kernel(kernel, piece, source, row)
                made.append(self._made(maker, piece, outgoing))
            outgoing.flush()
        return made

    def _one(self, piece: Piece, outgoing: Outgoing, row: int = 0, stretch: Sequence[Piece] | None = None) -> PieceDone:
        """Makes one piece. ``row``: its place in the unit. ``stretch``: the pieces that it does the work of."""
        with failures(piece.task, piece.start, piece.stop):
            return self._made(self._maker(piece, row, stretch), piece, outgoing)

    def _made(self, maker: Maker, piece: Piece, outgoing: Outgoing) -> PieceDone:
        """Lets a maker make a piece, chunk by chunk."""
        value = 0
        for start, stop in maker.spans(piece.start, piece.stop):
            self.host.check()
            value = self.job.checksum.update(maker.put(start, stop, outgoing), value)
        return done_of(piece, value, maker.nonfinite)

    def _maker(self, piece: Piece, row: int, stretch: Sequence[Piece] | None) -> Maker:
        """Chooses what makes a piece."""
        task = piece.task
        if task.verbatim:
            return self._copier(task)
        if "torch" not in self.job.modules:
            return self._by_numpy(task)
        self.one_torch_thread()
        source = self.source(task, keep=task.method.passes and self._passes is None)
        return self._by_kernel(self._kernel_of(task, source), piece, source, row, stretch)

    def _copier(self, task: MergeTask) -> Maker:
        from streammerge.running.copying import ReaderCopier, StoredCopier  # here, because most tensors are computed

        source, out_bytes = task.sources[0], self.job.budget.out_bytes
        if source.__class__ is Stored:
            return StoredCopier(source, self.bench.inputs, self.workspace, out_bytes)
        if "torch" in self.job.modules:
            self.one_torch_thread()
        return ReaderCopier(task, self.source(task, keep=False), out_bytes)

    def _by_numpy(self, task: MergeTask) -> Maker:
        from streammerge.running.plain import NumpyMaker, PlainNumbers  # here, because most merges are made by torch

        if self._numbers is None:
            self._numbers = PlainNumbers(self.workspace.octets("slots"))
        source, chunk_elems = self.source(task, keep=False), self.job.budget.chunk_elems

        def by_kernel() -> KernelMaker:
            return KernelMaker(bind(task, no_sweep), task, source, self.workspace, chunk_elems)

        return NumpyMaker(self._numbers, task, source, chunk_elems, by_kernel)

    def _by_kernel(
        self, kernel: Kernel, piece: Piece, source: Inputs, row: int, stretch: Sequence[Piece] | None = None
    ) -> Maker:
        """Returns the maker of a kernel, or of its sums by compiled functions or by products."""
        task, chunk_elems, taking = piece.task, self.job.budget.chunk_elems, None
        if self._measuring is not None and task.out.dtype.kind == "float":
            taking = self._measuring.begin(row, stretch or [piece], source)
        maker = KernelMaker(kernel, task, source, self.workspace, chunk_elems, taking)
        if task.compute == "float64" and (taking is None or all(map(source.stays, range(len(source))))):
            from streammerge.running.compiled import CompiledMaker, sums_of  # here, because many methods make no sums

            sums = sums_of(task, kernel, self.workspace.octets("slots"))
            if sums is not None:
                return CompiledMaker(sums, maker, source, taking)
        memory = self.workspace.octets("summed")
        if taking is not None or not memory or not is_summed(task):
            return maker
        from streammerge.running.summing import by_products  # here, because most merges are of few models

        return by_products(maker, memory, self.workspace, source) or maker

    def _kernel_of(self, task: MergeTask, source: Inputs) -> Kernel:
        """Returns the kernel of a tensor. Runs its passes here, unless all workers have already run them."""
        if self._kernel is not None:
            return self._kernel
        if self._passes is not None:
            self._kernel = bind(task, no_sweep, PassResults(self._passes), masks=self.masks_at(self._masks))
            return self._kernel

        return bind(task, sweep_of(self, task, source), spills=self.bench.spill, masks=self.own_masks)


def sweep_of(worker: Worker, task: MergeTask, source: Inputs) -> Callable[..., Iterator[Any]]:
    """Returns a sweep over a tensor that this worker makes alone."""

    def sweep(look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
        yield step(look, worker.chunks(task, source, start, stop, sparse))

    return sweep


def done_of(piece: Piece, checksum: int, nonfinite: dict[str, int] | None = None) -> PieceDone:
    """Returns the result of a piece."""
    return PieceDone(piece.number, piece.start, piece.stop, checksum, nonfinite or {})
