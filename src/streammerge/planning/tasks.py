"""The work of a run: tasks, pieces of long tasks, and batches of short ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streammerge.kernels.chunk import whole_grains
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY
from streammerge.sources.base import Source
from streammerge.sources.stored import Stored
from streammerge.tensors.spec import PIECE_ELEMS, TensorSpec, ranges


@dataclass(frozen=True, slots=True)
class MergeTask:
    """The work of one output tensor: from the numbers of ``sources`` to the bytes at ``offset`` of output file ``file``.

    ``based``: whether the first source is the base. ``parameters``: the method's parameters, resolved for these models.
    """

    out: TensorSpec
    method: MergeMethod
    sources: tuple[Source, ...]
    file: int
    offset: int
    parameters: dict[str, Any] = field(default_factory=dict)
    compute: str = "float32"
    based: bool = False
    seed: int = 0

    @property
    def verbatim(self) -> bool:
        """Whether the output's bytes equal the source's bytes, so that no arithmetic is needed."""
        return self.method is COPY and self.sources[0].spec.dtype == self.out.dtype

    @property
    def read_bytes(self) -> int:
        return sum([source.spec.nbytes for source in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in real numbers: a complex number counts as two."""
        return self.out.component_shape

    @property
    def elems(self) -> int:
        return self.out.nbytes // self.out.dtype.component.element_bytes

    @property
    def row(self) -> int:
        """Number of elements that must be in memory together."""
        return self.method.rows(self.shape, self.parameters)

    @property
    def piece_elems(self) -> int:
        return whole_grains(PIECE_ELEMS, self.row) if self.method.row else PIECE_ELEMS

    @property
    def spread(self) -> bool:
        """Whether the tensor is long enough to share its passes among all workers."""
        return self.method.passes and self.elems > self.piece_elems


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of the task with this number."""

    task: MergeTask
    number: int
    start: int
    stop: int

    @property
    def key(self) -> tuple[int, int]:
        return (self.number, self.start)

    @property
    def whole(self) -> bool:
        """Whether the piece is the whole tensor."""
        return self.stop - self.start == self.task.elems

    @property
    def offset(self) -> int:
        """Offset of its bytes in the output file."""
        return self.task.offset + self.start * self.task.out.dtype.component.element_bytes

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.task.out.dtype.component.element_bytes

    @property
    def read_bytes(self) -> int:
        return (self.stop - self.start) * sum([s.spec.dtype.component.element_bytes for s in self.task.sources])


@dataclass(frozen=True, slots=True)
class PieceDone:
    """The result of elements ``start`` to ``stop`` of the task with this number. Small, plain data that another process can
    send. ``checksum``: of their bytes. ``nonfinite``: the number of NaN and infinite values by source. ``found``: the
    finding of their destination."""

    number: int
    start: int
    stop: int
    checksum: int
    nonfinite: dict[str, int] = field(default_factory=dict)
    found: Any = None

    def piece(self, tasks: Sequence[MergeTask]) -> Piece:
        return Piece(tasks[self.number], self.number, self.start, self.stop)


def pieces(task: MergeTask, number: int) -> Iterator[Piece]:
    """Yields the pieces of a task. A long task has several, an empty tensor none."""
    elems, most = task.elems, task.piece_elems
    if 0 < elems <= most:  # nearly all tasks; this takes half the time
        yield Piece(task, number, 0, elems)
        return
    for start, stop in ranges(elems, most):
        yield Piece(task, number, start, stop)


def batches(wanted: Iterable[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Yields batches: whole tensors that are neighbours in the output, up to ``most_bytes``. A part of a tensor is a batch
    of its own."""
    batch: list[Piece] = []
    nbytes = 0
    for piece in wanted:
        more = piece.nbytes
        if batch and not (nbytes + more <= most_bytes and _follows(batch[-1], piece)):
            yield batch
            batch, nbytes = [], 0
        batch.append(piece)
        nbytes += more
    if batch:
        yield batch


def stretches(batch: list[Piece], most_bytes: int = 0) -> Iterator[list[Piece]]:
    """Yields the stretches of a batch: pieces whose inputs are read as if they were one tensor's.

    A stretch of a pointwise method is computed as one tensor. One of another method has inputs of at most ``most_bytes``,
    or is a single piece.
    """
    stretch, nbytes = [batch[0]], batch[0].read_bytes
    for piece in batch[1:]:
        more = piece.read_bytes
        if (nbytes + more <= most_bytes or piece.task.method.pointwise) and _continues(stretch[-1].task, piece.task):
            stretch.append(piece)
            nbytes += more
        else:
            yield stretch
            stretch, nbytes = [piece], more
    yield stretch


def as_one_piece(stretch: list[Piece]) -> Piece:
    """Returns one piece that does the work of the whole stretch."""
    first = stretch[0]
    if len(stretch) == 1:
        return first
    elems = sum(piece.stop for piece in stretch)
    parts = 2 if first.task.out.dtype.kind == "complex" else 1
    shape = (elems // parts,)
    sources = tuple(Stored(TensorSpec(s.spec.name, s.spec.dtype, shape), *s.begin) for s in first.task.sources)
    last = stretch[-1].task.out.name
    out = replace(first.task.out, name=f"{first.task.out.name} ... {last}", shape=shape)
    return Piece(replace(first.task, out=out, sources=sources), first.number, 0, elems)


def _follows(before: Piece, piece: Piece) -> bool:
    """Whether two whole tensors are neighbours in the output."""
    task, other = piece.task, before.task
    return task.file == other.file and task.offset == other.offset + other.out.nbytes and piece.whole and before.whole


def _continues(before: MergeTask, task: MergeTask) -> bool:
    """Whether a task follows another one in every input too, over stored bytes, and is computed in the same way."""
    if not (
        task.method is before.method
        and (task.method.pointwise or task.method.passes)
        and task.out.dtype is before.out.dtype
        and task.compute == before.compute
        and task.based == before.based
        and len(task.sources) == len(before.sources)
        and (task.parameters is before.parameters or task.parameters == before.parameters)
    ):
        return False
    for a, b in zip(before.sources, task.sources, strict=True):  # a plain loop: this runs for every tensor
        if (
            a.__class__ is not Stored
            or b.__class__ is not Stored
            or b.offset != a.offset + a.spec.nbytes
            or (b.path is not a.path and b.path != a.path)
            or b.spec.dtype is not a.spec.dtype
        ):
            return False
    return True
