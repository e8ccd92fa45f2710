"""Output tensors, from mapped inputs to written bytes.

A batch of pieces is computed chunk by chunk in buffers that belong to a worker and are never allocated again. A method
that looks at its tensor in passes before it makes its kernel does so on one worker, or, where the tensor is long, on
all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.errors import StreammergeError, TaskError, printable
from streammerge.kernels.chunk import Chunk, Kernel, chunk_spans
from streammerge.kernels.group import TensorGroup
from streammerge.planning.budget import Budget
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, batches, joined, pieces, stretches
from streammerge.running.executors.base import Executor
from streammerge.running.workspace import Inputs, Outgoing, Workspace
from streammerge.sources.stored import Stored
from streammerge.stores.base import COPY_BYTES, Output
from streammerge.stores.checksums import Checksum
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Halted(BaseException):
    """A worker gives up its piece, for nobody wants it any more."""


class Engine:
    """Runs tasks: on any threads, in any order, with the same bytes."""

    def __init__(
        self, budget: Budget, inputs: InputFiles, outputs: list[Output], io: str, checksum: Checksum, executor: Executor
    ) -> None:
        self.budget, self.inputs, self.outputs = budget, inputs, outputs
        self.mapped, self.checksum, self.executor = io == "mmap", checksum, executor
        self._free: list[Workspace] = []
        self._thread = threading.local()

    def run_all(self, tasks: list[MergeTask], wanted: Callable[[Piece], bool]) -> Generator[PieceDone, None, None]:
        """All pieces that are wanted. First what is spread by tensors, then one by one what is spread within a tensor."""
        independent = (
            piece for number, task in enumerate(tasks) if not task.spread for piece in pieces(task, number) if wanted(piece)
        )
        with closing(self.executor.run(batches(independent, self.budget.out_bytes), self.run)) as results:
            for done in results:
                yield from done
        for number, task in enumerate(tasks):
            if task.spread and any(map(wanted, pieces(task, number))):
                with _failures(task, 0, task.elems):
                    kernel = task.method.bind(self._group(task, self._sweep_on_all(task)), task.parameters)
                spread = ([piece] for piece in pieces(task, number) if wanted(piece))
                with closing(self.executor.run(spread, partial(self.run, kernel=kernel))) as results:
                    for done in results:
                        yield from done

    def run(self, batch: list[Piece], kernel: Kernel | None = None) -> list[PieceDone]:
        """Computes and writes pieces that are neighbours; ``kernel``: that of a longer tensor, which all workers have made.
        Errors that are not streammerge's own come out as TaskError."""
        made: list[PieceDone] = []
        with self._workspace() as workspace:
            outgoing = Outgoing(self.outputs[batch[0].task.file], workspace, batch[0].offset)
            for stretch in stretches(batch):
                together = len(stretch) > 1 and self._together(stretch, workspace, outgoing)
                made += together or [self._one(piece, workspace, outgoing, kernel) for piece in stretch]
            outgoing.flush()
        self.inputs.check_whole()
        return made

    def _together(self, stretch: list[Piece], workspace: Workspace, outgoing: Outgoing) -> list[PieceDone] | None:
        """The pieces computed as one; None where that met what must be told tensor by tensor."""
        whole = joined(stretch)
        done = self._one(whole, workspace, outgoing)
        if done.nonfinite:
            outgoing.take_back(whole.nbytes)
            return None
        data, made, start = outgoing.last(whole.nbytes), [], 0
        for piece in stretch:
            made.append(_done(piece, self.checksum.update(data[start : start + piece.nbytes])))
            start += piece.nbytes
        return made

    def _one(self, piece: Piece, workspace: Workspace, outgoing: Outgoing, kernel: Kernel | None = None) -> PieceDone:
        with _failures(piece.task, piece.start, piece.stop):
            if piece.task.verbatim:
                return self._copy(piece, workspace, outgoing)
            return self._compute(piece, workspace, outgoing, kernel)

    def written(self, piece: Piece) -> int:
        """The checksum of a piece as it stands in the output file."""
        output, value = self.outputs[piece.task.file], 0
        buffer = memoryview(bytearray(min(piece.nbytes, COPY_BYTES)))
        for start, stop in ranges(piece.nbytes, COPY_BYTES):
            self._halt()
            value = self.checksum.update(buffer[: output.read_into(buffer[: stop - start], piece.offset + start)], value)
        return value

    def _halt(self) -> None:
        if self.executor.stopping.is_set():
            raise Halted

    def _copy(self, piece: Piece, workspace: Workspace, outgoing: Outgoing) -> PieceDone:
        whole = piece.task.sources[0]
        if whole.__class__ is not Stored:
            return self._copy_read(piece, workspace, outgoing)
        value, begin = 0, whole.offset + piece.offset - piece.task.offset
        source = self.inputs.get(whole.path)
        for start, stop in ranges(piece.nbytes, min(COPY_BYTES, self.budget.out_bytes)):
            self._halt()
            part = outgoing.room(stop - start)
            source.read_into(part, begin + start)
            value = self.checksum.update(part, value)
        source.release(begin, piece.nbytes)
        return _done(piece, value)

    def _copy_read(self, piece: Piece, workspace: Workspace, outgoing: Outgoing) -> PieceDone:
        """Copies a tensor that is no plain byte range, as its reader gives it."""
        value, dtype = 0, piece.task.out.dtype
        self._one_torch_thread()
        source = self._source(piece.task, workspace, keep=False)
        size, whole = dtype.component.element_bytes, dtype.element_bytes
        step = max(min(COPY_BYTES, self.budget.out_bytes) // whole, 1) * (whole // size)  # no complex number is cut
        for start, stop in ranges(piece.stop - piece.start, step):
            self._halt()
            part = outgoing.room((stop - start) * size)
            source.read_into(0, piece.start + start, piece.start + stop, part)
            value = self.checksum.update(part, value)
        return _done(piece, value)

    def _compute(self, piece: Piece, workspace: Workspace, outgoing: Outgoing, kernel: Kernel | None) -> PieceDone:
        task = piece.task
        self._one_torch_thread()
        source = self._source(task, workspace, keep=task.method.passes and kernel is None)
        if kernel is None:

            def sweep(work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
                yield work(self._chunks(task, workspace, source, start, stop, sparse))

            kernel = task.method.bind(self._group(task, sweep), task.parameters)
        done = self._apply(kernel, piece, workspace, source, outgoing)
        source.done()
        return done

    def _apply(self, kernel: Kernel, piece: Piece, workspace: Workspace, source: Inputs, outgoing: Outgoing) -> PieceDone:
        import torch

        value, dtype, nonfinite = 0, piece.task.out.dtype.component, dict[str, int]()
        for chunk in self._chunks(piece.task, workspace, source, piece.start, piece.stop):
            result = kernel(chunk)
            if result.numel() != chunk.elems:
                raise ValueError(f"its kernel made {result.numel()} numbers of a chunk of {chunk.elems}")
            part = outgoing.room(chunk.elems * dtype.element_bytes)
            out = torch.frombuffer(part, dtype=dtype.torch).copy_(result.reshape(-1))
            if dtype.kind == "float" and _suspicious(out):
                for name, count in _nonfinite(out, source, chunk.start, chunk.stop).items():
                    nonfinite[name] = nonfinite.get(name, 0) + count
            value = self.checksum.update(part, value)
        return _done(piece, value, nonfinite)

    def _chunks(
        self, task: MergeTask, workspace: Workspace, source: Inputs, start: int, stop: int, sparse: int = 0
    ) -> Iterator[Chunk]:
        import torch

        compute, models = getattr(torch, task.compute), len(task.sources) - task.based
        for a, b in chunk_spans(start, stop, self.budget.chunk_elems, task.row, sparse):
            self._halt()
            workspace.clear()
            source.move_to(a, b)
            yield Chunk(a, b, compute, workspace, source.read, task.based, models)

    def _group(self, task: MergeTask, sweep: Any) -> TensorGroup:
        import torch

        models, compute = len(task.sources) - task.based, getattr(torch, task.compute)
        return TensorGroup(task.out.name, task.shape, models, compute, sweep, task.based, task.row, task.seed)

    def _source(self, task: MergeTask, workspace: Workspace, keep: bool) -> Inputs:
        keep_bytes = self.budget.kept_bytes if keep else -1
        return Inputs(self.inputs, task.sources, workspace, self.mapped, keep_bytes, self._halt)

    def _sweep_on_all(self, task: MergeTask) -> Callable[..., Iterator[Any]]:
        """A sweep over the pieces of a long tensor by all workers."""

        def sweep(work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            def run(numbered: tuple[int, tuple[int, int]]) -> tuple[int, T]:
                number, (a, b) = numbered
                self._one_torch_thread()
                with self._workspace() as workspace:
                    source = self._source(task, workspace, keep=False)
                    answer = work(self._chunks(task, workspace, source, start + a, start + b, sparse))
                    source.done()
                    self.inputs.check_whole()  # here, where a worker in another process knows of it
                    return number, answer

            early: dict[int, T] = {}
            turn = 0
            spans = enumerate(ranges(stop - start, task.piece_elems))
            with closing(self.executor.run(spans, run, backlog=self.executor.workers)) as results:
                for number, result in results:
                    early[number] = result
                    while turn in early:
                        yield early.pop(turn)
                        turn += 1

        return sweep

    def _one_torch_thread(self) -> None:
        """Of this worker; the workers are the parallelism."""
        if not hasattr(self._thread, "ready"):
            import torch

            torch.set_num_threads(1)
            self._thread.ready = True

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        """A workspace that no other worker has: one that is free, or a new one."""
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace(self.budget)
        yield workspace
        self._free.append(workspace)


def _done(piece: Piece, checksum: int, nonfinite: dict[str, int] | None = None) -> PieceDone:
    return PieceDone(piece.number, piece.start, piece.stop, checksum, nonfinite or {})


@contextmanager
def _failures(task: MergeTask, start: int, stop: int) -> Iterator[None]:
    """Errors that are not streammerge's own come out as TaskError."""
    try:
        yield
    except StreammergeError:
        raise
    except Exception as error:
        raise TaskError(
            f"{printable(task.out.name)} ({task.method.name}, elements {start} to {stop}) failed: {printable(error)}"
        ) from error


def _suspicious(out: torch.Tensor) -> bool:
    """A sum is finite only if all its terms are; it may overflow without them, hence only suspicious."""
    import math

    if out.element_size() == 1:
        out = out.float()
    return not math.isfinite(out.sum().item())


def _nonfinite(out: torch.Tensor, source: Inputs, start: int, stop: int) -> dict[str, int]:
    """Non-finite numbers by the file they came from; those that no input had (an overflow) under "the result"."""
    if bool(out.float().isfinite().all() if out.element_size() == 1 else out.isfinite().all()):
        return {}
    counts: dict[str, int] = {}
    for model in range(len(source)):
        raw = source.read(model, start, stop)
        count = int((~(raw.float() if raw.element_size() == 1 else raw).isfinite()).sum())
        if count:
            counts[source.origin(model)] = counts.get(source.origin(model), 0) + count
    return counts or {"the result (overflow)": int((~out.float().isfinite()).sum())}
