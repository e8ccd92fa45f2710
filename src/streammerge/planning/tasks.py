"""What there is to do: tasks, the pieces that long ones are cut into, and the batches that short ones are joined to."""

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

    ``based`` says that the first source is the base; ``parameters`` are those of the method, resolved for these models.
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
        """Whether the output's bytes are the source's, so that no arithmetic is needed."""
        return self.method is COPY and self.sources[0].spec.dtype == self.out.dtype

    @property
    def read_bytes(self) -> int:
        return sum([source.spec.nbytes for source in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as arithmetic sees it: a complex number is two."""
        return self.out.component_shape

    @property
    def elems(self) -> int:
        return self.out.nbytes // self.out.dtype.component.element_bytes

    @property
    def row(self) -> int:
        """Elements that belong together and are held at once."""
        return self.method.rows(self.shape, self.parameters)

    @property
    def piece_elems(self) -> int:
        return whole_grains(PIECE_ELEMS, self.row) if self.method.row else PIECE_ELEMS

    @property
    def spread(self) -> bool:
        """Whether its passes are worth all workers."""
        return self.method.passes and self.elems > self.piece_elems


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of the task of that number."""

    task: MergeTask
    number: int
    start: int
    stop: int

    @property
    def key(self) -> tuple[int, int]:
        return (self.number, self.start)

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.stop - self.start == self.task.elems

    @property
    def offset(self) -> int:
        """Where its bytes lie in the output file."""
        return self.task.offset + self.start * self.task.out.dtype.component.element_bytes

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.task.out.dtype.component.element_bytes

    @property
    def read_bytes(self) -> int:
        return (self.stop - self.start) * sum([s.spec.dtype.component.element_bytes for s in self.task.sources])


@dataclass(frozen=True, slots=True)
class PieceDone:
    """What came of elements ``start`` to ``stop`` of the task of that number: the checksum of their bytes, non-finite
    numbers met, by source, and what their destination found in them. Small and plain, so that it can come from another
    process."""

    number: int
    start: int
    stop: int
    checksum: int
    nonfinite: dict[str, int] = field(default_factory=dict)
    found: Any = None

    def piece(self, tasks: Sequence[MergeTask]) -> Piece:
        return Piece(tasks[self.number], self.number, self.start, self.stop)


def pieces(task: MergeTask, number: int) -> Iterator[Piece]:
    """The task, cut where it is long; an empty tensor has no piece."""
    for start, stop in ranges(task.elems, task.piece_elems):
        yield Piece(task, number, start, stop)


def batches(wanted: Iterable[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Whole tensors that are neighbours in the output together, as far as one write reaches; a part of one alone."""
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


def stretches(batch: list[Piece]) -> Iterator[list[Piece]]:
    """The batch in stretches that can be computed as if they were one tensor."""
    stretch = [batch[0]]
    for piece in batch[1:]:
        if _continues(stretch[-1].task, piece.task):
            stretch.append(piece)
        else:
            yield stretch
            stretch = [piece]
    yield stretch


def joined(stretch: list[Piece]) -> Piece:
    """One piece that does the work of all."""
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
    """Whether the bytes of two whole tensors lie one after the other in the output."""
    task, other = piece.task, before.task
    return task.file == other.file and task.offset == other.offset + other.out.nbytes and piece.whole and before.whole


def _continues(before: MergeTask, task: MergeTask) -> bool:
    """Whether a task that follows another in the output also does so in each input, whose bytes are stored, and is
    computed in the same way."""
    if not (
        task.method is before.method
        and task.method.pointwise
        and task.out.dtype is before.out.dtype
        and task.compute == before.compute
        and task.based == before.based
        and len(task.sources) == len(before.sources)
        and task.parameters == before.parameters
    ):
        return False
    for a, b in zip(before.sources, task.sources, strict=True):  # a plain loop: this runs for every tensor
        if (
            a.__class__ is not Stored
            or b.__class__ is not Stored
            or b.offset != a.offset + a.spec.nbytes
            or b.path != a.path
            or b.spec.dtype is not a.spec.dtype
        ):
            return False
    return True
