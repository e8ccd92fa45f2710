"""One output tensor, from mapped inputs to written bytes.

A :class:`MergeTask` is plain data. Long tensors are cut into pieces so that one giant tensor uses every worker; a
piece is computed chunk by chunk in buffers that belong to a worker and are never allocated again. A method that looks
at its tensor in passes before it makes its kernel does so on one worker, or, where the tensor is long, on all of
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streammerge.budget import Budget
from streammerge.checksums import Checksum
from streammerge.errors import StreammergeError, TaskError, printable
from streammerge.group import Chunk, Kernel, TensorGroup, chunk_spans, whole_grains
from streammerge.methods.contracts import MergeMethod
from streammerge.storage import COPY_BYTES, InputFiles, OutputFile
from streammerge.tensors import GRAIN, TensorEntry, TensorSpec, ranges
from streammerge.workspace import Source, Workspace

if TYPE_CHECKING:
    import torch

PIECE_ELEMS = 64 * GRAIN
T = TypeVar("T")


class Executor(Protocol):
    """Runs ``run_one`` on each task, in any order; at most ``backlog`` results wait to be taken.

    ``stopping`` is set when what still runs is not wanted any more.
    """

    workers: int
    stopping: threading.Event

    def run(
        self, tasks: Iterable[Any], run_one: Callable[[Any], Any], backlog: int = ...
    ) -> Generator[Any, None, None]: ...


@dataclass(frozen=True, slots=True)
class MergeTask:
    """The work of one output tensor: from the bytes of ``sources`` to those at ``offset`` of output file ``file``.

    ``based`` says that the first source is the base; ``parameters`` are those of the method, resolved for these models.
    """

    out: TensorSpec
    method: MergeMethod
    sources: tuple[TensorEntry, ...]
    file: int
    offset: int
    parameters: dict[str, Any] = field(default_factory=dict)
    compute: str = "float32"
    based: bool = False
    seed: int = 0

    @property
    def verbatim(self) -> bool:
        """Whether the output's bytes are the source's, so that no arithmetic is needed."""
        return self.method.name == "copy" and self.sources[0].spec.dtype == self.out.dtype

    @property
    def read_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as arithmetic sees it: a complex number is two."""
        shape, parts = self.out.shape, 2 if self.out.dtype.kind == "complex" else 1
        return shape if parts == 1 else (*shape[:-1], shape[-1] * parts) if shape else (parts,)

    @property
    def elems(self) -> int:
        return self.out.nbytes // self.out.dtype.component.element_bytes

    @property
    def row(self) -> int:
        """Elements that belong together and are held at once."""
        return self.method.rows(self.shape, self.parameters)

    @property
    def piece_elems(self) -> int:
        return whole_grains(PIECE_ELEMS, self.row)

    @property
    def spread(self) -> bool:
        """Whether its passes are worth all workers."""
        return self.method.passes and self.elems > self.piece_elems


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of the task of that number; ``kernel`` where passes over the whole have made it."""

    task: MergeTask
    number: int
    start: int
    stop: int
    kernel: Kernel | None = None

    @property
    def key(self) -> tuple[int, int]:
        return (self.number, self.start)

    @property
    def offset(self) -> int:
        """Where its bytes lie in the output file."""
        return self.task.offset + self.start * self.task.out.dtype.component.element_bytes

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.task.out.dtype.component.element_bytes

    @property
    def read_bytes(self) -> int:
        return sum((self.stop - self.start) * source.spec.dtype.component.element_bytes for source in self.task.sources)


@dataclass(frozen=True, slots=True)
class PieceDone:
    """What came of a piece: the checksum of its bytes, and non-finite numbers met, by source."""

    piece: Piece
    checksum: int
    nonfinite: dict[str, int] = field(default_factory=dict)


class Halted(BaseException):
    """A worker gives up its piece, for nobody wants it any more."""


def pieces(task: MergeTask, number: int, kernel: Kernel | None = None) -> Iterator[Piece]:
    """The task, cut where it is long; an empty tensor has no piece."""
    for start, stop in ranges(task.elems, task.piece_elems):
        yield Piece(task, number, start, stop, kernel)


class Engine:
    """Runs tasks: on any threads, in any order, with the same bytes."""

    def __init__(
        self, budget: Budget, inputs: InputFiles, outputs: list[OutputFile], io: str, checksum: Checksum, executor: Executor
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
        with closing(self.executor.run(independent, self.run)) as results:
            yield from results
        for number, task in enumerate(tasks):
            if task.spread and any(map(wanted, pieces(task, number))):
                with _failures(task, 0, task.elems):
                    kernel = task.method.bind(self._group(task, self._sweep_on_all(task)), task.parameters)
                with closing(self.executor.run(filter(wanted, pieces(task, number, kernel)), self.run)) as results:
                    yield from results

    def run(self, piece: Piece) -> PieceDone:
        """Computes and writes one piece. Errors that are not streammerge's own come out as TaskError."""
        with _failures(piece.task, piece.start, piece.stop):
            done = self._copy(piece) if piece.task.verbatim else self._compute(piece)
            self.inputs.check_whole()
            return done

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

    def _copy(self, piece: Piece) -> PieceDone:
        task, value = piece.task, 0
        begin = piece.offset - task.offset
        source, output = self.inputs.get(task.sources[0].path), self.outputs[task.file]
        buffer = memoryview(bytearray(min(piece.nbytes, COPY_BYTES)))
        for start, stop in ranges(piece.nbytes, COPY_BYTES):
            self._halt()
            part = buffer[: stop - start]
            source.read_into(part, task.sources[0].offset + begin + start)
            output.write_full(part, piece.offset + start)
            value = self.checksum.update(part, value)
        output.start_writeback(piece.offset, piece.nbytes)
        return PieceDone(piece, value)

    def _compute(self, piece: Piece) -> PieceDone:
        task = piece.task
        with self._workspace() as workspace:
            source = self._source(task, workspace, keep=task.method.passes and piece.kernel is None)
            kernel = piece.kernel
            if kernel is None:

                def sweep(work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
                    yield work(self._chunks(task, workspace, source, start, stop, sparse))

                kernel = task.method.bind(self._group(task, sweep), task.parameters)
            done = self._write(piece, kernel, workspace, source)
            source.done()
            return done

    def _write(self, piece: Piece, kernel: Kernel, workspace: Workspace, source: Source) -> PieceDone:
        task, output, value = piece.task, self.outputs[piece.task.file], 0
        dtype = task.out.dtype.component
        size, nonfinite = dtype.element_bytes, dict[str, int]()
        for chunk in self._chunks(task, workspace, source, piece.start, piece.stop):
            result = kernel(chunk)
            if result.numel() != chunk.elems:
                raise ValueError(f"its kernel made {result.numel()} numbers of a chunk of {chunk.elems}")
            out = workspace.get("out", dtype.torch, chunk.elems).copy_(result.reshape(-1))
            if dtype.kind == "float" and _suspicious(out):
                for name, count in _nonfinite(out, source, chunk.start, chunk.stop).items():
                    nonfinite[name] = nonfinite.get(name, 0) + count
            data, offset = workspace.octets("out", chunk.elems * size), task.offset + chunk.start * size
            output.write_full(data, offset)
            value = self.checksum.update(data, value)
        for file, start, stop in workspace.written.add(output, piece.offset, piece.offset + piece.nbytes):
            file.start_writeback(start, stop - start)
        return PieceDone(piece, value, nonfinite)

    def _chunks(
        self, task: MergeTask, workspace: Workspace, source: Source, start: int, stop: int, sparse: int = 0
    ) -> Iterator[Chunk]:
        import torch

        compute, models = getattr(torch, task.compute), len(task.sources) - task.based
        for a, b in chunk_spans(start, stop, self.budget.chunk_elems, task.row, sparse):
            self._halt()
            workspace.clear()
            yield Chunk(a, b, compute, workspace, source.read, task.based, models)

    def _group(self, task: MergeTask, sweep: Any) -> TensorGroup:
        import torch

        models, compute = len(task.sources) - task.based, getattr(torch, task.compute)
        return TensorGroup(task.out.name, task.shape, models, compute, sweep, task.based, task.row, task.seed)

    def _source(self, task: MergeTask, workspace: Workspace, keep: bool) -> Source:
        return Source(self.inputs, task.sources, workspace, self.mapped, self.budget.kept_bytes if keep else -1)

    def _sweep_on_all(self, task: MergeTask) -> Callable[..., Iterator[Any]]:
        """A sweep over the pieces of a long tensor by all workers."""

        def sweep(work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            def run(numbered: tuple[int, tuple[int, int]]) -> tuple[int, T]:
                number, (a, b) = numbered
                with self._workspace() as workspace:
                    source = self._source(task, workspace, keep=False)
                    return number, work(self._chunks(task, workspace, source, start + a, start + b, sparse))

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

    @contextmanager
    def _workspace(self) -> Iterator[Workspace]:
        """A workspace that no other worker has: one that is free, or a new one."""
        if not hasattr(self._thread, "ready"):
            import torch

            torch.set_num_threads(1)  # of this worker; the workers are the parallelism
            self._thread.ready = True
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace(self.budget)
        yield workspace
        self._free.append(workspace)


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


def _nonfinite(out: torch.Tensor, source: Source, start: int, stop: int) -> dict[str, int]:
    """Non-finite numbers by the file they came from; those that no input had (an overflow) under "the result"."""
    if bool(out.float().isfinite().all() if out.element_size() == 1 else out.isfinite().all()):
        return {}
    counts = {}
    for model in range(len(source)):
        raw = source.read(model, start, stop)
        count = int((~(raw.float() if raw.element_size() == 1 else raw).isfinite()).sum())
        if count:
            counts[source.name(model)] = count
    return counts or {"the result (overflow)": int((~out.float().isfinite()).sum())}
