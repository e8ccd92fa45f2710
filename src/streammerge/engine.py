"""One output tensor, from mapped inputs to written bytes.

A :class:`MergeTask` is plain data. Long tensors are cut into pieces so that one giant tensor uses every worker; a
piece is computed chunk by chunk in buffers that belong to the worker and are never allocated again.
"""

from __future__ import annotations

import mmap
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from streammerge.budget import Budget, slots
from streammerge.dtypes import DType
from streammerge.errors import StreammergeError, TaskError, printable
from streammerge.storage import COPY_BYTES, InputFile, InputFiles, OutputFile
from streammerge.tensors import GRAIN, TensorEntry, TensorSpec, ranges

if TYPE_CHECKING:
    import torch

    from streammerge.group import Kernel

PIECE_ELEMS = 64 * GRAIN
_WRITEBACK_BYTES = 8 << 20

File = TypeVar("File")


@dataclass(frozen=True, slots=True)
class MergeTask:
    """The work of one output tensor: from the bytes of ``sources`` to those at ``offset`` of output file ``file``."""

    out: TensorSpec
    method: str
    sources: tuple[TensorEntry, ...]
    file: int
    offset: int
    parameters: dict[str, Any] = field(default_factory=dict)
    compute: str = "float32"

    @property
    def verbatim(self) -> bool:
        """Whether the output's bytes are the source's, so that no arithmetic is needed."""
        return self.method == "copy" and self.sources[0].spec.dtype == self.out.dtype

    @property
    def read_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @property
    def elems(self) -> int:
        """Elements as arithmetic sees them: a complex number is two."""
        return self.out.nbytes // self.out.dtype.component.element_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of a task."""

    task: MergeTask
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PieceDone:
    """What came of a piece: CRC-32 values as (file, offset, bytes, crc), and non-finite numbers met, by source."""

    piece: Piece
    read_bytes: int
    written_bytes: int
    checksums: tuple[tuple[int, int, int, int], ...] = ()
    nonfinite: dict[str, int] = field(default_factory=dict)


def pieces(tasks: Iterable[MergeTask]) -> Iterator[Piece]:
    """The tasks, long ones cut; an empty tensor has no piece."""
    for task in tasks:
        for start, stop in ranges(task.elems, PIECE_ELEMS):
            yield Piece(task, start, stop)


class Engine:
    """Runs pieces: on any thread, in any order, with the same bytes."""

    def __init__(self, budget: Budget, inputs: InputFiles, outputs: list[OutputFile], io: str, checksums: bool) -> None:
        self.budget, self.inputs, self.outputs = budget, inputs, outputs
        self.mapped, self.checksums = io == "mmap", checksums
        self._workspaces = threading.local()

    def run(self, piece: Piece) -> PieceDone:
        """Computes and writes one piece. Errors that are not streammerge's own come out as TaskError."""
        try:
            return self._copy(piece) if piece.task.verbatim else self._compute(piece)
        except StreammergeError:
            raise
        except Exception as error:
            task = piece.task
            raise TaskError(
                f"{printable(task.out.name)} ({task.method}, elements {piece.start} to {piece.stop}) failed: "
                f"{printable(error)}"
            ) from error

    def _copy(self, piece: Piece) -> PieceDone:
        task, size = piece.task, piece.task.out.dtype.component.element_bytes
        source = self.inputs.get(task.sources[0].path)
        begin, nbytes = piece.start * size, (piece.stop - piece.start) * size
        output = self.outputs[task.file]
        checksums = []
        if not self.checksums:
            output.copy_from(source, task.sources[0].offset + begin, task.offset + begin, nbytes)
        else:
            buffer = memoryview(bytearray(min(nbytes, COPY_BYTES)))
            for start, stop in ranges(nbytes, COPY_BYTES):
                part = buffer[: stop - start]
                source.read_into(part, task.sources[0].offset + begin + start)
                output.write_full(part, task.offset + begin + start)
                checksums.append((task.file, task.offset + begin + start, stop - start, zlib.crc32(part)))
        output.start_writeback(task.offset + begin, nbytes)
        return PieceDone(piece, nbytes, nbytes, tuple(checksums))

    def _compute(self, piece: Piece) -> PieceDone:
        import torch

        from streammerge.group import Chunk, TensorGroup
        from streammerge.methods.registry import bind

        task = piece.task
        workspace = self._workspace()
        kernel: Kernel = bind(task.method, TensorGroup(task.out.name, len(task.sources)), task.parameters)
        dtypes = [source.spec.dtype.component for source in task.sources]
        out_dtype = task.out.dtype.component
        compute = getattr(torch, task.compute)
        reader = _Reader(self, task, workspace, dtypes)
        output, checksums = self.outputs[task.file], []
        nonfinite: dict[str, int] = {}
        for start, stop in (
            (piece.start + a, piece.start + b) for a, b in ranges(piece.stop - piece.start, self.budget.chunk_elems)
        ):
            result = kernel(Chunk(start, stop, dtypes, compute, workspace, reader.read))
            out = workspace.get("out", out_dtype.torch, stop - start).copy_(result)
            data = workspace.octets("out", (stop - start) * out_dtype.element_bytes)
            if out_dtype.kind == "float" and _suspicious(out):
                for name, count in _nonfinite(out, reader, start, stop).items():
                    nonfinite[name] = nonfinite.get(name, 0) + count
            del result, out
            offset = task.offset + start * out_dtype.element_bytes
            output.write_full(data, offset)
            if self.checksums:
                checksums.append((task.file, offset, len(data), zlib.crc32(data)))
        elems = piece.stop - piece.start
        begin, nbytes = task.offset + piece.start * out_dtype.element_bytes, elems * out_dtype.element_bytes
        for file, start, stop in workspace.written.add(output, begin, begin + nbytes):
            file.start_writeback(start, stop - start)
        read = elems * sum(dtype.element_bytes for dtype in dtypes)
        return PieceDone(piece, read, nbytes, tuple(checksums), nonfinite)

    def _workspace(self) -> _Workspace:
        workspace = getattr(self._workspaces, "value", None)
        if workspace is None:
            import torch

            torch.set_num_threads(1)  # of this worker; the workers are the parallelism
            workspace = self._workspaces.value = _Workspace(self.budget)
        return workspace


class _Spans(Generic[File]):
    """Byte ranges by file, collected until they are worth a system call: one range for each file, gaps included."""

    def __init__(self, enough_bytes: int) -> None:
        self._enough, self._collected = enough_bytes, 0
        self._spans: dict[File, tuple[int, int]] = {}

    def add(self, file: File, begin: int, end: int) -> list[tuple[File, int, int]]:
        """Takes a range in. Returns what came together before it, once that and this are enough, and starts over."""
        ripe: list[tuple[File, int, int]] = []
        if self._collected and self._collected + end - begin > self._enough:
            ripe = [(known, *span) for known, span in self._spans.items()]
            self._spans, self._collected = {}, 0
        low, high = self._spans.get(file, (begin, end))
        self._spans[file] = (min(low, begin), max(high, end))
        self._collected += end - begin
        return ripe


class _Workspace:
    """A worker's buffers, cut from one anonymous map: allocated once, page-aligned, given back as a whole."""

    def __init__(self, budget: Budget) -> None:
        self.mapped: _Spans[InputFile] = _Spans(budget.window_bytes * budget.cost.inputs)
        self.written: _Spans[OutputFile] = _Spans(_WRITEBACK_BYTES)
        self._slots = slots(budget.cost, budget.chunk_elems)
        total = max(sum(size for _, size in self._slots.values()), 1)
        self._arena = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._views: dict[tuple[str, Any], torch.Tensor] = {}

    def octets(self, slot: str, nbytes: int) -> memoryview:
        offset, size = self._slots[slot]
        if nbytes > size:
            raise ValueError(f"buffer {slot} has {size} bytes, {nbytes} were asked for")
        return memoryview(self._arena)[offset : offset + nbytes]

    def get(self, slot: str, dtype: torch.dtype, elems: int) -> torch.Tensor:
        import torch

        view = self._views.get((slot, dtype))
        if view is None:
            offset, size = self._slots[slot]
            view = torch.frombuffer(self._arena, dtype=dtype, count=size // dtype.itemsize, offset=offset)
            self._views[slot, dtype] = view
        if elems > len(view):
            raise ValueError(f"buffer {slot} holds {len(view)} elements, {elems} were asked for")
        return view[:elems]


class _Reader:
    """The raw numbers of a task's sources, by mapped pages or by reading into the worker's buffers."""

    def __init__(self, engine: Engine, task: MergeTask, workspace: _Workspace, dtypes: list[DType]) -> None:
        self._sources = [(engine.inputs.get(s.path), s.offset) for s in task.sources]
        self._dtypes, self._workspace, self._mapped = dtypes, workspace, engine.mapped
        self._next_slot = 0

    @property
    def models(self) -> int:
        return len(self._sources)

    def name(self, model: int) -> str:
        return self._sources[model][0].path

    def read(self, model: int, start: int, stop: int) -> torch.Tensor:
        import torch

        dtype = self._dtypes[model]
        size, (file, base) = dtype.element_bytes, self._sources[model]
        offset, nbytes = base + start * size, (stop - start) * size
        if not self._mapped:
            slot = f"read{self._next_slot}"
            self._next_slot ^= 1
            file.read_into(self._workspace.octets(slot, nbytes), offset)
            return self._workspace.get(slot, dtype.torch, stop - start)
        for seen, begin, end in self._workspace.mapped.add(file, offset, offset + nbytes):
            seen.release(begin, end - begin)
        return torch.frombuffer(file.view(offset, nbytes), dtype=dtype.torch)


def _suspicious(out: torch.Tensor) -> bool:
    """A sum is finite only if all its terms are; it may overflow without them, hence only suspicious."""
    import math

    if out.element_size() == 1:
        out = out.float()
    return not math.isfinite(out.sum().item())


def _nonfinite(out: torch.Tensor, reader: _Reader, start: int, stop: int) -> dict[str, int]:
    """Non-finite numbers by the file they came from; those that no input had (an overflow) under "the result"."""
    if bool(out.float().isfinite().all() if out.element_size() == 1 else out.isfinite().all()):
        return {}
    counts = {}
    for model in range(reader.models):
        raw = reader.read(model, start, stop)
        count = int((~(raw.float() if raw.element_size() == 1 else raw).isfinite()).sum())
        if count:
            counts[reader.name(model)] = count
    return counts or {"the result (overflow)": int((~out.float().isfinite()).sum())}
