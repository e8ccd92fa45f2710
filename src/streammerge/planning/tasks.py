"""The work of a run: tasks, pieces of long tasks, and batches of short ones."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, overload

from streammerge.kernels.chunk import whole_grains
from streammerge.kernels.spill import held_bytes
from streammerge.methods.contracts import MergeMethod
from streammerge.methods.registry import COPY
from streammerge.planning.aligned import Views, Way
from streammerge.sources.base import BlobPath, Source
from streammerge.sources.stored import Stored
from streammerge.tensors.spec import PIECE_ELEMS, TensorSpec, ranges

_MOST_IN_BATCH = 1024
_MOST_KEPT = 2048
"""Tasks that are kept after they were made. Those in work at one time are fewer, so none of them is made twice."""
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class MergeTask:
    """The work of one output tensor: from the numbers of ``sources`` to the bytes at ``offset`` of output file ``file``.

    ``based``: whether the first source is the base. ``parameters``: the method's parameters, resolved for these models.
    ``turned``: whether sources and output have their first axis last.
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
    turned: bool = False

    @property
    def verbatim(self) -> bool:
        """Whether the output's bytes equal the source's bytes, so that no arithmetic is needed."""
        return self.method is COPY and self.sources[0].spec.dtype == self.out.dtype

    @property
    def read_bytes(self) -> int:
        """Bytes that it reads: for computed sources those in files, each counted once."""
        if not self.computed:
            return sum([source.spec.nbytes for source in self.sources])
        return sum([blob.nbytes for blob in {blob for source in self.sources for blob in source.blobs}])

    @property
    def nested(self) -> bool:
        """Whether a merge is among its sources, at any depth."""
        for source in self.sources:  # a plain loop, because this runs for every piece
            if source.__class__ is not Stored:
                from streammerge.sources.merged import methods_in

                if any(True for _ in methods_in(source)):
                    return True
        return False

    @property
    def computed(self) -> bool:
        """Whether a merge or a quantised weight is among its sources, so that these have other bytes than the files."""
        plain = True
        for source in self.sources:  # a plain loop, because this runs for every piece
            if source.__class__ is not Stored:
                if source.dequantises:
                    return True
                plain = False
        return not plain and self.nested

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in real numbers: a complex number counts as two. A turned tensor is a matrix."""
        shape = self.out.component_shape
        return (math.prod(shape[:-1]), shape[-1]) if self.turned else shape

    @property
    def elems(self) -> int:
        return self.out.nbytes // self.out.dtype.component.element_bytes

    @property
    def to_turn(self) -> bool:
        """Whether it is made by way of a turned task, and then copied."""
        method = self.method
        if method.turns is None or self.turned or self.out.dtype.kind == "complex":
            return False
        return method.turns(self.shape, self.parameters)

    @property
    def row(self) -> int:
        """Number of elements that must be in memory together."""
        return 1 if self.method.row is None or self.to_turn else self.method.rows(self.shape, self.parameters)

    @property
    def piece_elems(self) -> int:
        if self.method.whole and not self.to_turn:
            return max(self.elems, 1)
        return whole_grains(PIECE_ELEMS, self.row) if self.method.row else PIECE_ELEMS

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the temporary file in which its method spills."""
        if self.method.spills is None:
            return 0
        task = turned_task(self, 0, 0) if self.to_turn else self
        size = self.method.spilled_bytes(task.shape, len(self.sources) - self.based, self.parameters, task.turned)
        return size - held_bytes(size)

    @property
    def of_one(self) -> bool:
        """Whether one worker makes all pieces of a long tensor, because passes look at merges or are made below one. Other
        workers would make these passes and merges again."""
        if self.elems <= self.piece_elems or self.turned or self.to_turn or not self.nested:
            return False
        from streammerge.sources.merged import methods_in

        return self.method.passes or any(method.passes for source in self.sources for method in methods_in(source))

    @property
    def spread(self) -> bool:
        """Whether the tensor is long enough to share its passes among all workers."""
        return self.method.passes and not self.method.whole and self.elems > self.piece_elems


def turned_task(task: MergeTask, file: int, offset: int) -> MergeTask:
    """Returns the task that makes the same tensor turned, at ``offset`` of output file ``file``."""
    from streammerge.sources.turned import turned, turned_spec

    sources = tuple(turned(source) for source in task.sources)
    return replace(task, out=turned_spec(task.out), sources=sources, file=file, offset=offset, turned=True)


def turned_places(tasks: Iterable[MergeTask]) -> tuple[list[int], int]:
    """Returns the offset of each task's turned tensor in a temporary file, and the size of the file in bytes."""
    offsets, cursor = [], 0
    for task in tasks:
        offsets.append(cursor)
        cursor += -(-task.out.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, cursor


def copy_of_turned(task: MergeTask, source: Source) -> MergeTask:
    """Returns the task that copies the tensor from its turned form."""
    from streammerge.sources.turned import turned_back

    return MergeTask(task.out, COPY, (turned_back(source, task.out),), task.file, task.offset)


class Piece(NamedTuple):
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
        if self.task.computed:
            return self.task.read_bytes * (self.stop - self.start) // self.task.elems
        return (self.stop - self.start) * sum([s.spec.dtype.component.element_bytes for s in self.task.sources])


class PieceDone(NamedTuple):
    """The result of elements ``start`` to ``stop`` of the task with this number. Small, plain data that another process can
    send. ``checksum``: of their bytes. ``nonfinite``: the number of NaN and infinite values by source. ``found``: the
    finding of their destination. ``measured``: for each source of the task the norm of its difference to the result, and
    its own norm, both over a sample, in float32; then the same of the tasks after it, as far as these have as many sources
    and say nothing. Empty if nothing was measured (:mod:`streammerge.running.measuring`). ``read_bytes``: what was asked of
    stores to make it, and other pieces before it that say 0."""

    number: int
    start: int
    stop: int
    checksum: int
    nonfinite: dict[str, int]
    found: Any = None
    read_bytes: int = 0
    measured: bytes = b""

    def piece(self, tasks: Sequence[MergeTask]) -> Piece:
        return Piece(tasks[self.number], self.number, self.start, self.stop)


def measured_bytes(inputs: int) -> int:
    """Returns the bytes that are measured of one piece: see :attr:`PieceDone.measured`."""
    return 2 * 4 * inputs


class Tasks(Sequence[MergeTask]):
    """The tasks of a plan, in the order of reading. Each is made when it is asked for. The last are kept.

    ``made``: how each tensor is merged, or the task itself if it is like no other. ``rows``: the rows of the others in the
    first table of ``views``. ``files`` and ``offsets``: where each tensor begins in the output.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.views: Views | None = None
        self.made: list[Way | MergeTask] = []
        self.rows, self.files, self.offsets = array("I"), array("I"), array("Q")
        self._kept: dict[int, MergeTask] = {}
        self._kinds: list[tuple[MergeTask, int]] | None = None

    def add(self, task: MergeTask) -> None:
        self.made.append(task)
        self.rows.append(0)
        self.files.append(task.file)
        self.offsets.append(task.offset)

    def extend(self, ways: Sequence[Way], rows: array[int], file: int, offsets: array[int]) -> None:
        """Adds tensors of tables, which all lie in one file of the output."""
        self.made.extend(ways)
        self.rows.extend(rows)
        self.files.extend(array("I", [file]) * len(rows))
        self.offsets.extend(offsets)

    def sort(self, key: Callable[[int], Any]) -> None:
        """Sorts the tasks by a key of their numbers."""
        order = sorted(range(len(self.made)), key=key)
        if order == list(range(len(order))):
            return
        self.made = [self.made[number] for number in order]
        for name in ("rows", "files", "offsets"):
            column: array[int] = getattr(self, name)
            setattr(self, name, array(column.typecode, [column[number] for number in order]))
        self.forget()

    def forget(self) -> None:
        """Forgets the tasks that were made, because the columns have changed."""
        self._kept, self._kinds = {}, None

    def place(self, number: int) -> tuple[int, int, int]:
        """Returns the number of a task's output file, and the offset and number of its bytes there."""
        made = self.made[number]
        nbytes = made.out.nbytes if isinstance(made, MergeTask) else made.like.spec.nbytes
        return self.files[number], self.offsets[number], nbytes

    def most_in_one_file(self) -> int:
        """Returns the number of tensors in the output file that has the most."""
        return max(Counter(self.files).values(), default=0)

    def begins(self) -> Iterator[tuple[MergeMethod, BlobPath, int]]:
        """Yields the method of each task, and where its first source begins."""
        for made, row in zip(self.made, self.rows, strict=True):
            if isinstance(made, MergeTask):
                yield made.method, *made.sources[0].begin
            elif self.views is not None:
                number = made.tables[0]
                table, row = self.views.tables[number], self.views.row(number, row)
                yield made.like.method, table.paths[table.files[row]], table.starts[row]

    def alike(self) -> Iterator[tuple[MergeTask, int]]:
        """Yields one task of each kind, and the number of tasks of this kind. They differ in names and places only."""
        if self._kinds is None:
            counts: dict[int, list[int]] = {}
            for number, made in enumerate(self.made):
                counts.setdefault(id(made), [number, 0])[1] += 1
            self._kinds = [(self._at(number), count) for number, count in counts.values()]
        return iter(self._kinds)

    def named(self) -> Iterator[tuple[str, MergeTask]]:
        """Yields the name of each tensor of the output, and a task of its kind."""
        kinds: dict[int, MergeTask] = {}
        for number, made in enumerate(self.made):
            if made.__class__ is MergeTask or self.views is None:
                task = self._at(number)
                yield task.out.name, task
                continue
            kind = kinds.get(id(made))
            if kind is None:
                kind = kinds[id(made)] = self._at(number)
            yield self.views.tables[0].names[self.rows[number]], kind

    def where(self, test: Callable[[MergeTask], bool]) -> list[int]:
        """Returns the numbers of the tasks that pass a test, which may not look at names and places."""
        known, found = dict[int, bool](), list[int]()
        for number, made in enumerate(self.made):
            passes = test(made) if made.__class__ is MergeTask else known.get(id(made))
            if passes is None:
                passes = known[id(made)] = test(self._at(number))
            if passes:
                found.append(number)
        return found

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[MergeTask]:
        return map(self._at, range(len(self.made)))

    @overload
    def __getitem__(self, number: int) -> MergeTask: ...
    @overload
    def __getitem__(self, number: slice) -> list[MergeTask]: ...
    def __getitem__(self, number: int | slice) -> MergeTask | list[MergeTask]:
        if isinstance(number, slice):
            return [self._at(each) for each in range(len(self.made))[number]]
        return self._at(range(len(self.made))[number] if number < 0 else number)

    def _at(self, number: int) -> MergeTask:
        way = self.made[number]
        if way.__class__ is MergeTask:
            return way
        task = self._kept.get(number)
        if task is None:
            task = self._of(way, number)  # type: ignore[arg-type]
            if len(self._kept) >= _MOST_KEPT:
                self._kept = {}  # a new one, because other threads may be using the old one
            self._kept[number] = task
        return task

    def _of(self, way: Way, number: int) -> MergeTask:
        if self.views is None:
            raise ValueError("tasks of tables need the tables")
        row, like = self.rows[number], way.like
        spec, sources = self.views.spec(way, row), self.views.sources(way, row)
        place = self.files[number], self.offsets[number]
        return MergeTask(spec, like.method, sources, *place, like.parameters, like.compute, like.based, self.seed)


def alike(tasks: Sequence[MergeTask]) -> Iterator[tuple[MergeTask, int]]:
    """Yields one task of each kind, and the number of tasks of this kind. They differ in names and places only."""
    return tasks.alike() if isinstance(tasks, Tasks) else ((task, 1) for task in tasks)


def named(tasks: Sequence[MergeTask]) -> Iterator[tuple[str, MergeTask]]:
    """Yields the name of each tensor of the output, and a task of its kind, which differs in names and places only."""
    return tasks.named() if isinstance(tasks, Tasks) else ((task.out.name, task) for task in tasks)


def where(tasks: Sequence[MergeTask], test: Callable[[MergeTask], bool]) -> list[int]:
    """Returns the numbers of the tasks that pass a test, which may not look at names and places."""
    if isinstance(tasks, Tasks):
        return tasks.where(test)
    return [number for number, task in enumerate(tasks) if test(task)]


def replaced(tasks: Sequence[MergeTask], others: Mapping[int, MergeTask]) -> Sequence[MergeTask]:
    """Returns the tasks with other ones under these numbers."""
    if isinstance(tasks, Tasks):
        made = copy(tasks)
        made.made = [others.get(number, each) for number, each in enumerate(tasks.made)]
        made.forget()
        return made
    return [others.get(number, task) for number, task in enumerate(tasks)]


def place_of(tasks: Sequence[MergeTask], number: int) -> tuple[int, int, int]:
    """Returns the number of a task's output file, and the offset and number of its bytes there."""
    if isinstance(tasks, Tasks):
        return tasks.place(number)
    task = tasks[number]
    return task.file, task.offset, task.out.nbytes


def objects(tasks: Sequence[MergeTask]) -> Iterable[MergeTask]:
    """Returns the tasks that are not made from tables. Only these may read anything but plain byte ranges."""
    return [task for task in tasks.made if isinstance(task, MergeTask)] if isinstance(tasks, Tasks) else tasks


def pieces(task: MergeTask, number: int) -> Iterator[Piece]:
    """Yields the pieces of a task. A long task has several, an empty tensor none."""
    elems, most = task.elems, task.piece_elems
    if 0 < elems <= most:  # nearly all tasks; this takes half the time
        yield Piece(task, number, 0, elems)
        return
    for start, stop in ranges(elems, most):
        yield Piece(task, number, start, stop)


def piece_counts(tasks: Sequence[MergeTask]) -> array[int]:
    """Returns the number of pieces of each task."""
    counts = array("I", [1]) * len(tasks)
    for number in where(tasks, lambda task: not 0 < task.elems <= task.piece_elems):
        counts[number] = sum(1 for _ in pieces(tasks[number], number))
    return counts


def batches(wanted: Iterable[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Yields batches: whole tensors that are neighbours in the output, up to ``most_bytes``, and so few that
    their tasks take little memory. A part of a tensor is a batch of its own."""
    batch: list[Piece] = []
    nbytes = 0
    for piece in wanted:
        more = piece.nbytes
        if batch and not (nbytes + more <= most_bytes and len(batch) < _MOST_IN_BATCH and _follows(batch[-1], piece)):
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
