"""What one worker computes in: its buffers, and the numbers of a task's sources, mapped or read."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.planning.budget import Budget, slots
from streammerge.sources.base import BlobPath, Reader, Source, region_bytes
from streammerge.sources.stored import Stored
from streammerge.stores.base import Input
from streammerge.stores.inputs import InputFiles
from streammerge.units import PAGE_BYTES

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_MOST_VIEWS = 64
_REGIONS = ("read0", "read1")


def prepare_torch() -> None:
    """Imports torch, and has it say here, once, that a read-only buffer is read-only."""
    import warnings

    import torch

    torch.get_num_threads()  # settles the caller's own number before the workers, which have one each, ask for theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


class Workspace:
    """A worker's buffers, cut from one anonymous map: allocated once, page-aligned, given back as a whole.

    The slots that methods name are taken one after the other; the budget counts how many they may be at once.
    """

    def __init__(self, budget: Budget) -> None:
        self.touched = Spans(budget.kept_bytes * 3 // 4)
        self.noted_elems = budget.window_bytes // 4 // max(budget.cost.mapped, 1)  # what is not noted yet is the rest
        self.tile_bytes = budget.tile_bytes
        self._slots = slots(budget)
        self._slot_bytes = budget.chunk_elems * budget.cost.compute
        total = max(offset + size for offset, size in self._slots.values())
        self._arena = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._views: dict[tuple[int, torch.dtype, int], torch.Tensor] = {}
        self._taken: dict[str, int] = {}
        self._known: tuple[tuple[Source, ...], dict[int, Any]] = ((), {})

    def kernels_of(self, sources: tuple[Source, ...]) -> dict[int, Any]:
        """What readers of these sources compute once; what those of another task had computed is forgotten."""
        if self._known[0] is not sources:
            self._known = (sources, {})
        return self._known[1]

    def clear(self) -> None:
        """Forgets the names of the slots, for the next chunk."""
        self._taken.clear()

    def octets(self, region: str, nbytes: int | None = None, start: int = 0) -> memoryview:
        """So many bytes of a fixed region, from ``start``; all of it where none is said."""
        offset, size = self._slots[region]
        nbytes = size if nbytes is None else nbytes
        if start + nbytes > size:
            raise ValueError(f"buffer {region} has {size} bytes, {start + nbytes} were asked for")
        return memoryview(self._arena)[offset + start : offset + start + nbytes]

    def get(self, slot: str, dtype: torch.dtype, elems: int) -> torch.Tensor:
        """Numbers in a fixed region, or in the slot that has or now takes that name."""
        if slot in self._slots:
            return self._view(*self._slots[slot], dtype, elems)
        offset, size = self._slots["slots"]
        place = self._taken.setdefault(slot, len(self._taken)) * self._slot_bytes
        if place + self._slot_bytes > size:
            raise ValueError(f"there is no room for the buffer {slot!r} beside {', '.join(self._taken)}")
        return self._view(offset + place, self._slot_bytes, dtype, elems)

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
    """What a worker writes: bytes of one file in their order, collected in its buffer, written when that is full.

    Page for page they lie in the buffer as they will in the file, so that they can go to the disk without a copy.
    """

    def __init__(self, write: Callable[[memoryview, int], object], workspace: Workspace, offset: int) -> None:
        self._write, self._buffer = write, workspace.octets("out")
        self._start, self._held = offset, 0

    def room(self, nbytes: int) -> memoryview:
        """Where the next bytes are to be put, at most ``Budget.out_bytes`` of them."""
        if self._held + nbytes > len(self._buffer) - PAGE_BYTES:
            self.flush()
        self._held += nbytes
        return self.last(nbytes)

    def last(self, nbytes: int) -> memoryview:
        """The last bytes, not written yet."""
        end = self._start % PAGE_BYTES + self._held
        return self._buffer[end - nbytes : end]

    def take_back(self, nbytes: int) -> None:
        """Forgets the last bytes, not written yet."""
        self._held -= nbytes

    def flush(self) -> None:
        if self._held:
            self._write(self.last(self._held), self._start)
            self._start, self._held = self._start + self._held, 0


class Spans:
    """Byte ranges by file, collected until they are worth a system call: one range for each file, gaps included, since a
    fault may map what lies between as well.

    A file that nobody else holds any more is forgotten: its map is gone, and its pages with it.
    """

    def __init__(self, enough_bytes: int) -> None:
        self._enough = enough_bytes
        self._spans: dict[int, tuple[weakref.ref[Input], int, int]] = {}

    def add(self, file: Input, begin: int, end: int) -> list[tuple[Input, int, int]]:
        """Takes a range in. Returns what came together, once that is enough, and starts over."""
        known = self._spans.get(id(file))
        if known is not None and known[0]() is file:
            begin, end = min(known[1], begin), max(known[2], end)
        self._spans[id(file)] = weakref.ref(file), begin, end
        return self.make_room(0)

    def make_room(self, nbytes: int) -> list[tuple[Input, int, int]]:
        """Returns what came together, and starts over, where that and so many bytes more are enough."""
        if sum(high - low for _, low, high in self._spans.values()) + nbytes <= self._enough:
            return []
        ripe = [(file, low, high) for known, low, high in self._spans.values() if (file := known()) is not None]
        self._spans = {}
        return ripe


class Inputs:
    """The raw numbers of a task's sources, for one worker. Elements are counted as arithmetic sees them.

    Stored sources are mapped where that is asked for, and their pages are given back behind the cursor; all others are
    read. Inputs of up to ``keep_bytes`` together are kept for all passes: mapped pages stay, and what is read is read once.
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
        self._sources, self._workspace, self._mapped = sources, workspace, mapped
        self._dtypes = [s.spec.dtype.component for s in sources]
        self._stored = [(files.get(s.path), s.offset) if s.__class__ is Stored else None for s in sources]
        self._readers: list[Reader | None] | None = None
        if None in self._stored:
            self._readers = [None] * len(sources)
            room = WorkerRoom(files, workspace, sources, halt)
            for number, stored in enumerate(self._stored):
                if stored is None and sources[number].spec.numel:
                    self._readers[number] = sources[number].open(room)
        self._wholes: list[torch.Tensor | None] | None = None
        self._next_read = self._begin = self._end = 0
        self._kept: list[int] | None = None
        """Where each source lies among what is kept."""
        if sum(_rounded(s.spec.nbytes) for s in sources) <= keep_bytes:
            self._keep_all()

    def __len__(self) -> int:
        return len(self._sources)

    def origin(self, source: int) -> str:
        """Where the numbers of a source come from, as messages say it."""
        return self._sources[source].origin

    def move_to(self, start: int, stop: int) -> None:
        """Says which elements are read next; pages of those before are given back once they are many."""
        if self._kept is None:
            if start != self._end or stop - self._begin > self._workspace.noted_elems:
                self._note()
                self._begin = start
            self._end = stop

    def read(self, source: int, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a source, in its own dtype; valid until the next but one call."""
        import torch

        if self._mapped:
            if self._wholes is None:
                self._wholes = self._mapped_wholes()
            whole = self._wholes[source]
            if whole is not None:
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
        return self._workspace.get(region, dtype.torch, elems)

    def read_into(self, source: int, start: int, stop: int, out: memoryview) -> None:
        """Puts the bytes of elements ``start`` to ``stop`` of a source into ``out``."""
        made = self._read_bytes(source, start, stop, out)
        if made is not out:
            out[:] = made

    def done(self) -> None:
        """All is read: what was touched may be given back."""
        self._note()

    def _read_bytes(self, source: int, start: int, stop: int, out: memoryview) -> memoryview:
        stored = self._stored[source]
        if stored is not None:
            stored[0].read_into(out, stored[1] + start * self._dtypes[source].element_bytes)
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
        self._end = max([s.spec.component_elems for s in self._sources])
        for seen, begin, end in self._workspace.touched.make_room(sum(s.spec.nbytes for s in self._sources)):
            seen.release(begin, end - begin)
        if self._mapped and self._readers is None:
            return
        for number, source in enumerate(self._sources):
            self._kept.append(cursor)
            nbytes = source.spec.nbytes
            if nbytes and not (self._mapped and self._stored[number] is not None):
                part = self._workspace.octets("kept", nbytes, cursor)
                self.read_into(number, 0, source.spec.component_elems, part)
            cursor += _rounded(nbytes)

    def _note(self) -> None:
        """Adds what was read since to what may be given back, and gives that back where it has become much."""
        if self._begin == self._end:
            return
        for stored, dtype in zip(self._stored, self._dtypes, strict=True):
            if stored is not None:
                (file, base), size = stored, dtype.element_bytes
                for seen, low, high in self._workspace.touched.add(
                    file, base + self._begin * size, base + self._end * size
                ):
                    seen.release(low, high - low)


class WorkerRoom:
    """What a worker offers to the readers of one task: regions of its buffers, in the order in which they are asked for."""

    def __init__(
        self, files: InputFiles, workspace: Workspace, sources: tuple[Source, ...], halt: Callable[[], None]
    ) -> None:
        self._files, self._workspace, self.halt = files, workspace, halt
        self._taken = self._tiles = 0
        self._kernels = workspace.kernels_of(sources)

    def file(self, path: BlobPath) -> Input:
        return self._files.get(path)

    def touched(self, path: BlobPath, offset: int, nbytes: int) -> None:
        for file, low, high in self._workspace.touched.add(self.file(path), offset, offset + nbytes):
            file.release(low, high - low)

    def take(self, nbytes: int) -> memoryview:
        part = self._workspace.octets("reader scratch", nbytes, self._taken)
        self._taken += region_bytes(nbytes)
        return part

    def tile(self) -> memoryview:
        nbytes = self._workspace.tile_bytes
        self._tiles += 1
        return self._workspace.octets("reader tiles", nbytes, (self._tiles - 1) * nbytes)

    def shared(self, nbytes: int) -> memoryview:
        return self._workspace.octets("reader shared", nbytes)

    def once(self, source: Source, make: Callable[[], T]) -> T:
        if id(source) not in self._kernels:
            self._kernels[id(source)] = make()
        return self._kernels[id(source)]  # type: ignore[no-any-return]


def _rounded(nbytes: int) -> int:
    """Up to where the next tensor may begin: aligned for every dtype."""
    return -(-nbytes // 16) * 16
