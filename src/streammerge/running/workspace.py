"""The workspace of one worker: its buffers, and the numbers of a task's sources, mapped or read."""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.errors import RecipeError, printable
from streammerge.kernels.chunk import Slot, shown
from streammerge.planning.budget import Budget, regions
from streammerge.running import process
from streammerge.sources.base import BlobPath, File, Reader, Source, region_bytes
from streammerge.sources.remembered import Remembered
from streammerge.sources.stored import Stored
from streammerge.stores.base import Input
from streammerge.stores.inputs import InputFiles
from streammerge.units import PAGE_BYTES

if TYPE_CHECKING:
    import torch

    from streammerge.tensors.dtypes import DType

T = TypeVar("T")
_MOST_VIEWS = 256
_REGIONS = ("read0", "read1")
_loading = threading.Lock()


def prepare_torch() -> None:
    """Imports torch, and triggers its one-time warning about read-only buffers here, where it is suppressed.

    Raises RecipeError if torch is not installed.
    """
    import warnings

    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise RecipeError("torch is not installed, and this merge computes with it; install torch") from None
    except (
        ImportError,
        SystemError,
    ) as error:  # SystemError: its extension modules, where memory ends while they are loaded
        raise RecipeError(
            f"torch cannot be loaded ({printable(error)}); install it again, or raise the limit on memory (ulimit -v)"
        ) from error

    torch.get_num_threads()  # fixes the caller's number of threads before the workers set theirs to one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


def load_torch() -> None:
    """Loads torch in the middle of a run that seemed to need none. Several workers may call it at once."""
    with _loading:
        if "torch" not in sys.modules:
            with process.of_startup():
                prepare_torch()


class Workspace:
    """A worker's buffers, cut from one anonymous map: allocated once, page-aligned, freed as a whole.

    The slots that methods name are taken one after the other. The budget limits their number.
    """

    def __init__(self, budget: Budget) -> None:
        self.mapped, self.read = Spans(budget.kept_bytes), Spans(budget.kept_bytes)
        self.announced_elems = budget.window_bytes // 4 // max(budget.cost.mapped, 1)
        self.tile_bytes = budget.tile_bytes
        self.remembered_bytes, self.chunk_elems = budget.remembered_bytes, budget.chunk_elems
        self.asked_bytes = 0
        """What the worker has asked of stores so far: all that it read, and each mapped part that it looked at."""
        self._regions = regions(budget)
        self._compute_bytes = budget.cost.compute
        self._slots, self._most_slots = self._regions["slots"], budget.cost.buffers
        self._slot_bytes = self._most_slot_bytes = budget.chunk_elems * budget.cost.compute
        total = max(offset + size for offset, size in self._regions.values())
        self._arena = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._views: dict[tuple[int, torch.dtype, int], torch.Tensor] = {}
        self._taken: dict[Slot, int] = {}
        self._known: tuple[tuple[Source, ...], dict[tuple[object, ...], Any]] = ((), {})

    def kernels_of(self, sources: tuple[Source, ...]) -> dict[tuple[object, ...], Any]:
        """Returns the cache for results that readers of these sources compute once. Drops the cache of any other task.

        A worker process gets the sources anew with each piece of a tensor, so they are compared.
        """
        if self._known[0] is not sources and self._known[0] != sources:
            self._known = (sources, {})
        return self._known[1]

    def clear(self, elems: int) -> None:
        """Forgets the names of the slots, for the next chunk of ``elems`` elements.

        Slots are as long as the chunk and lie close together, so that those of a short tensor stay in the CPU's own cache.
        """
        self._taken.clear()
        self._slot_bytes = min(-(-elems * self._compute_bytes // PAGE_BYTES) * PAGE_BYTES, self._most_slot_bytes)

    def octets(self, region: str, nbytes: int | None = None, start: int = 0) -> memoryview:
        """Returns ``nbytes`` bytes of a fixed region, from ``start``. Returns the whole region if ``nbytes`` is None."""
        offset, size = self._regions[region]
        nbytes = size if nbytes is None else nbytes
        if start + nbytes > size:
            raise ValueError(f"buffer {region} has {size} bytes, {start + nbytes} were asked for")
        return memoryview(self._arena)[offset + start : offset + start + nbytes]

    def numbers(self, region: str, dtype: torch.dtype, elems: int) -> torch.Tensor:
        """Returns a tensor of ``elems`` numbers in a fixed region."""
        return self._view(*self._regions[region], dtype, elems)

    def get(self, slot: Slot, dtype: torch.dtype, elems: int) -> torch.Tensor:
        """Returns a tensor of ``elems`` numbers in a named slot. A new name takes the next free slot."""
        number = self._taken.get(slot)
        if number is None:
            number = self._taken[slot] = len(self._taken)
            if number >= self._most_slots:
                raise ValueError(
                    f"there is no room for the buffer {shown(slot)} beside {', '.join(map(shown, self._taken))}"
                )
        offset = self._slots[0] + number * self._slot_bytes
        known = self._views.get((offset, dtype, elems))
        return self._view(offset, self._slot_bytes, dtype, elems) if known is None else known

    def _view(self, offset: int, size: int, dtype: torch.dtype, elems: int) -> torch.Tensor:
        view = self._views.get((offset, dtype, elems))
        if view is None:
            import torch

            if elems * dtype.itemsize > size:
                raise ValueError(f"a buffer holds {size // dtype.itemsize} elements, {elems} were asked for")
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = torch.frombuffer(self._arena, dtype=dtype, count=elems, offset=offset)
            self._views[offset, dtype, elems] = view
        return view


class Outgoing:
    """The output bytes of a worker: bytes of one file in order, collected in a buffer, written when the buffer is full.

    The buffer has the page alignment of the file, so that pages can go to the disk without a copy.
    """

    def __init__(self, write: Callable[[memoryview, int], object], buffer: memoryview, offset: int) -> None:
        """``buffer``: begins with a page, and has one page more than is collected."""
        self._write, self._buffer = write, buffer
        self._start, self._held = offset, 0

    def room(self, nbytes: int) -> memoryview:
        """Returns the memory for the next ``nbytes`` bytes, at most ``Budget.out_bytes``."""
        if self._held + nbytes > len(self._buffer) - PAGE_BYTES:
            self.flush()
        self._held += nbytes
        return self.last(nbytes)

    def last(self, nbytes: int) -> memoryview:
        """Returns the last ``nbytes`` bytes, which are not written yet."""
        end = self._start % PAGE_BYTES + self._held
        return self._buffer[end - nbytes : end]

    def take_back(self, nbytes: int) -> None:
        """Forgets the last ``nbytes`` bytes, which are not written yet."""
        self._held -= nbytes

    def flush(self) -> None:
        if self._held:
            self._write(self.last(self._held), self._start)
            self._start, self._held = self._start + self._held, 0


class Spans:
    """Byte ranges by file, collected until they are worth a system call. Their pages are then given back.

    Keeps one range for each file, gaps included, because a page fault may map the bytes in a gap too. Forgets a file that
    nobody else holds any more, because its map and pages are gone.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._spans: _Spans = {}

    def add(self, ranges: Sequence[tuple[Input, int, int]]) -> None:
        """Adds (file, begin, end) of bytes that are touched next. Releases the earlier ranges before, if all would be too
        many together."""
        wider = _widened(self._spans, ranges)  # only these, since there may be many files
        more = sum([high - low - self._length(number) for number, (_, low, high) in wider.items()])
        if self._held + more > self._most:
            for known, low, high in self._spans.values():
                file = known()
                if file is not None:
                    file.release(low, high - low)
            self._spans, self._held = {}, 0
            wider = _widened({}, ranges)
            more = sum([high - low for _, low, high in wider.values()])
        self._spans.update(wider)
        self._held += more

    def _length(self, number: int) -> int:
        known = self._spans.get(number)
        return known[2] - known[1] if known is not None else 0


_Spans = dict[int, tuple["weakref.ref[Input]", int, int]]


def _widened(spans: _Spans, ranges: Sequence[tuple[Input, int, int]]) -> _Spans:
    """Returns the range of each of these files with the ranges added."""
    made: _Spans = {}
    for file, begin, end in ranges:
        known = made.get(id(file)) or spans.get(id(file))
        if known is not None and known[0]() is file:
            begin, end = min(known[1], begin), max(known[2], end)
        made[id(file)] = weakref.ref(file), begin, end
    return made


class Inputs:
    """The raw numbers of a task's sources, for one worker. A complex number counts as two elements.

    Stored sources are mapped if ``mapped``. A worker gives pages back before it goes on to others. All other sources are
    read. Inputs of up to ``keep_bytes`` together are kept for all passes: mapped pages stay, and other bytes are read once.

    The sources may be those of neighbouring tensors, joined. ``first`` is then the first element of the present tensor.
    """

    def __init__(
        self,
        files: InputFiles,
        sources: tuple[Source, ...],
        workspace: Workspace,
        mapped: bool,
        keep_bytes: int,
        halt: Callable[[], None],
    ) -> None:
        self._files, self._sources, self._workspace, self._mapped = files, sources, workspace, mapped
        self._dtypes = [s.spec.dtype.component for s in sources]
        self._stored = [(files.get(s.path), s.offset) if s.__class__ is Stored else None for s in sources]
        self._readers: list[Reader | None] | None = None
        self.nonfinite: dict[str, int] = {}
        """Counts of NaN and infinity in what nested merges have computed, by origin."""
        if None in self._stored:
            self._readers = [None] * len(sources)
            room = WorkerRoom(files, workspace, sources, halt)
            self.nonfinite = room.nonfinite
            for number, stored in enumerate(self._stored):
                if stored is None and sources[number].spec.numel:
                    self._readers[number] = sources[number].open(room)
            room.prepare()
        self._remote = files.ahead_bytes > 0 and files.reads_ahead
        self._passed = files.passed
        self._ranged_bytes = sum([d.element_bytes for s, d in zip(sources, self._dtypes, strict=True) if s.ranged])
        self._wholes: list[torch.Tensor | None] | None = None
        self.first = 0
        self._next_read = self._begin = self._end = 0
        self._looked: list[tuple[int, int]] = [(0, 0)] * len(sources)
        """The elements of each source that were looked at last while they are mapped."""
        self._elems = max([s.spec.component_elems for s in sources])
        self._kept: list[int] | None = None
        """Offset of each source in the region of kept inputs."""
        if sum(_rounded(s.spec.nbytes) for s in sources) <= keep_bytes and Remembered not in map(type, sources):
            self._keep_all()

    def __len__(self) -> int:
        return len(self._sources)

    def origin(self, source: int) -> str:
        """Returns the name of a source's file or checkpoint, for messages."""
        return self._sources[source].origin

    def is_stored(self, source: int) -> bool:
        """Whether a source is a plain range of bytes."""
        return self._stored[source] is not None

    def stays(self, source: int) -> bool:
        """Whether what is read of a source is mapped or kept, and so stays valid."""
        return (self._mapped and self._stored[source] is not None) or self._kept is not None

    def dtype(self, source: int) -> DType:
        """Returns the dtype of a source's numbers."""
        return self._dtypes[source]

    def octets(self, source: int) -> memoryview | None:
        """Returns all bytes of a source, None if it is not mapped."""
        stored = self._stored[source] if self._mapped else None
        return None if stored is None else stored[0].view(stored[1], self._sources[source].spec.nbytes)

    def move_to(self, start: int, stop: int) -> None:
        """Announces the elements that are read next, and some after them. Gives earlier pages back if they are many."""
        start, stop = start + self.first, stop + self.first
        if not self._begin <= start <= stop <= self._end:
            self._announce(start, max(stop, min(start + self._workspace.announced_elems, self._elems)))
        if self._passed is not None:
            self._passed((stop - start) * self._ranged_bytes)

    def read(self, source: int, start: int, stop: int) -> torch.Tensor:
        """Returns elements ``start`` to ``stop`` of a source, in its own dtype. Valid until the next call but one."""
        import torch

        start, stop = start + self.first, stop + self.first
        if self._mapped:
            if self._wholes is None:
                self._wholes = self._mapped_wholes()
            whole = self._wholes[source]
            if whole is not None:
                begin, end = self._looked[source]
                if not begin <= start <= stop <= end:
                    self._look(source, start, stop)
                return whole[start:stop]
        dtype = self._dtypes[source]
        size, elems = dtype.element_bytes, stop - start
        if self._kept is not None:
            part = self._workspace.octets("kept", elems * size, self._kept[source] + start * size)
            return torch.frombuffer(part, dtype=dtype.torch)
        region = _REGIONS[self._next_read]
        self._next_read ^= 1
        part = self._workspace.octets(region, elems * size)
        made = self._read_bytes(source, start, stop, part)
        if made is not part:
            return torch.frombuffer(made, dtype=dtype.torch)
        return self._workspace.numbers(region, dtype.torch, elems)

    def raw(self, source: int, start: int, stop: int) -> memoryview:
        """Returns the bytes of elements ``start`` to ``stop`` of a source. Valid until the next call but one."""
        start, stop, size = start + self.first, stop + self.first, self._dtypes[source].element_bytes
        stored = self._stored[source] if self._mapped else None
        if stored is not None:
            begin, end = self._looked[source]
            if not begin <= start <= stop <= end:
                self._look(source, start, stop)
            return stored[0].view(stored[1] + start * size, (stop - start) * size)
        if self._kept is not None:
            return self._workspace.octets("kept", (stop - start) * size, self._kept[source] + start * size)
        region = _REGIONS[self._next_read]
        self._next_read ^= 1
        return self._read_bytes(source, start, stop, self._workspace.octets(region, (stop - start) * size))

    def _look(self, source: int, start: int, stop: int) -> None:
        """Counts mapped elements that a worker looks at. It looks at those of a chunk several times, and asks once."""
        begin, end = self._looked[source]
        self._looked[source] = (begin, stop) if start == end else (start, stop)
        self._workspace.asked_bytes += (stop - start) * self._dtypes[source].element_bytes

    def fill(self, source: int, start: int, stop: int, out: memoryview) -> None:
        """Reads as :meth:`read` does, but into ``out``."""
        self.read_into(source, start + self.first, stop + self.first, out)

    def place(self, source: int, start: int, stop: int) -> tuple[Input, int] | None:
        """Returns the file and the offset of elements that are read next, if they lie there together as they are. Counts
        them as read. Returns None where :meth:`fill` must be asked."""
        start, stop = start + self.first, stop + self.first
        stored, size = self._stored[source], self._dtypes[source].element_bytes
        if self._remote:
            return None
        if stored is not None:
            found = stored[0], stored[1] + start * size
        else:
            reader = self._readers[source] if self._readers else None
            known = None if reader is None else reader.place(start, stop)
            if known is None:
                return None
            file = self._files.get(known[0])
            found = file, known[1]
            if self._files.polite:
                self._workspace.read.add([(file, found[1], found[1] + (stop - start) * size)])
        self._workspace.asked_bytes += (stop - start) * size
        return found

    def read_into(self, source: int, start: int, stop: int, out: memoryview) -> None:
        """Reads the bytes of elements ``start`` to ``stop`` of a source into ``out``."""
        made = self._read_bytes(source, start, stop, out)
        if made is not out:
            out[:] = made

    def _read_bytes(self, source: int, start: int, stop: int, out: memoryview) -> memoryview:
        stored = self._stored[source]
        if stored is not None:
            begin = stored[1] + start * self._dtypes[source].element_bytes
            if self._remote:
                held = stored[0].held(begin, len(out))
                if held is not None:
                    self._workspace.asked_bytes += len(out)
                    return held
            self._workspace.asked_bytes += len(out)
            stored[0].read_into(out, begin)
            return out
        reader = self._readers[source] if self._readers else None
        if reader is None:
            return out
        parts = 2 if self._sources[source].spec.dtype.kind == "complex" else 1
        return reader.read(start // parts, stop // parts, out)

    def _mapped_wholes(self) -> list[torch.Tensor | None]:
        import torch

        return [
            None if stored is None else torch.frombuffer(stored[0].view(stored[1], s.spec.nbytes), dtype=dtype.torch)
            for stored, s, dtype in zip(self._stored, self._sources, self._dtypes, strict=True)
        ]

    def _keep_all(self) -> None:
        self._kept, cursor = [], 0
        self._announce(0, self._elems)
        if self._mapped and self._readers is None:
            return
        for number, source in enumerate(self._sources):
            self._kept.append(cursor)
            nbytes = source.spec.nbytes
            if nbytes and not (self._mapped and self._stored[number] is not None):
                part = self._workspace.octets("kept", nbytes, cursor)
                self.read_into(number, 0, source.spec.component_elems, part)
            cursor += _rounded(nbytes)

    def _announce(self, begin: int, end: int) -> None:
        self._begin, self._end = begin, end
        ranges = []
        for stored, dtype in zip(self._stored, self._dtypes, strict=True):
            if stored is not None:
                (file, base), size = stored, dtype.element_bytes
                ranges.append((file, base + begin * size, base + end * size))
        if ranges:
            self._workspace.mapped.add(ranges)


class _Counted:
    """A file whose bytes are counted as they are read."""

    __slots__ = ("_file", "_workspace")

    def __init__(self, workspace: Workspace, file: Input) -> None:
        self._workspace, self._file = workspace, file

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._workspace.asked_bytes += len(buffer)
        self._file.read_into(buffer, offset)


class WorkerRoom:
    """The room that a worker offers to the readers of one task: regions of its buffers, handed out in order."""

    def __init__(
        self, files: InputFiles, workspace: Workspace, sources: tuple[Source, ...], halt: Callable[[], None]
    ) -> None:
        self._files, self._workspace, self.halt = files, workspace, halt
        self._taken = self._tiles = 0
        self.nonfinite: dict[str, int] = {}
        self._kernels = workspace.kernels_of(sources)
        self._readers: dict[tuple[object, ...], Reader] = {}
        self._first: list[Callable[[], object]] = []
        self._sources = sources
        self._shares: dict[tuple[object, ...], tuple[memoryview, memoryview]] | None = None

    def file(self, path: BlobPath) -> File:
        return _Counted(self._workspace, self._files.get(path))

    def touched(self, path: BlobPath, offset: int, nbytes: int) -> None:
        if self._files.polite:
            self._workspace.read.add([(self._files.get(path), offset, offset + nbytes)])

    def take(self, nbytes: int) -> memoryview:
        part = self._workspace.octets("reader scratch", nbytes, self._taken)
        self._taken += region_bytes(nbytes)
        return part

    def met(self, origin: str, count: int) -> None:
        self.nonfinite[origin] = self.nonfinite.get(origin, 0) + count

    def tile(self) -> memoryview:
        nbytes = self._workspace.tile_bytes
        self._tiles += 1
        return self._workspace.octets("reader tiles", nbytes, (self._tiles - 1) * nbytes)

    def remembered(self, source: Source) -> tuple[memoryview, memoryview]:
        if self._shares is None:
            self._shares = self._shared_out()
        return self._shares[source.place]

    def _shared_out(self) -> dict[tuple[object, ...], tuple[memoryview, memoryview]]:
        """Returns the memory of each tensor that readers of this task remember."""
        from streammerge.planning.staying import graph, shares  # here, because most merges have no stages

        of, numbers = graph(self._sources)
        given = shares(of, self._workspace.remembered_bytes, self._workspace.chunk_elems)
        made, cursor = dict[tuple[object, ...], tuple[memoryview, memoryview]](), 0
        for place, number in numbers.items():
            parts = []
            for nbytes in given[number]:
                parts.append(self._workspace.octets("remembered", nbytes, cursor))
                cursor += region_bytes(nbytes)
            made[place] = parts[0], parts[1]
        return made

    def shared(self, nbytes: int) -> memoryview:
        return self._workspace.octets("reader shared", nbytes)

    def once(self, source: Source, make: Callable[[], T]) -> T:
        place = source.place
        if place not in self._kernels:
            self._kernels[place] = make()
        return self._kernels[place]  # type: ignore[no-any-return]

    def common(self, source: Source, make: Callable[[], Reader]) -> Reader:
        place = source.place
        if place not in self._readers:
            self._readers[place] = make()
        return self._readers[place]

    def first(self, make: Callable[[], object]) -> None:
        self._first.append(make)

    def prepare(self) -> None:
        while self._first:
            self._first.pop(0)()


def _rounded(nbytes: int) -> int:
    """Rounds up to the offset where the next tensor may begin: aligned for every dtype."""
    return -(-nbytes // 16) * 16
