"""What one worker computes in: its buffers, and the numbers of a task's inputs, mapped or read."""

from __future__ import annotations

import mmap
import weakref
from typing import TYPE_CHECKING

from streammerge.planning.budget import Budget, slots
from streammerge.stores.base import Input, Output
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import TensorEntry
from streammerge.units import PAGE_BYTES

if TYPE_CHECKING:
    import torch

_MOST_VIEWS = 64


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
        self._slots = slots(budget)
        self._slot_bytes = budget.chunk_elems * budget.cost.compute
        total = max(offset + size for offset, size in self._slots.values())
        self._arena = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._views: dict[tuple[int, torch.dtype, int], torch.Tensor] = {}
        self._taken: dict[str, int] = {}

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

    def __init__(self, output: Output, workspace: Workspace, offset: int) -> None:
        self._output, self._buffer = output, workspace.octets("out")
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
            self._output.write_full(self.last(self._held), self._start)
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


class Source:
    """The raw numbers of a task's inputs, for one worker.

    Mapped pages are given back behind the cursor. Inputs of up to ``keep_bytes`` together are kept for all passes:
    their pages stay, or, where reading is by pread, they are read into memory once.
    """

    def __init__(
        self, inputs: InputFiles, sources: tuple[TensorEntry, ...], workspace: Workspace, mapped: bool, keep_bytes: int
    ) -> None:
        self._sources = [(inputs.get(s.path), s.offset, s.nbytes, s.spec.dtype.component) for s in sources]
        self._workspace, self._mapped = workspace, mapped
        self._wholes: list[torch.Tensor] | None = None
        self._next_read = self._begin = self._end = 0
        self._kept: list[int] | None = None
        """Where each source lies among what is kept."""
        if sum(_rounded(s.nbytes) for s in sources) <= keep_bytes:
            self._keep_all()

    def __len__(self) -> int:
        return len(self._sources)

    def name(self, source: int) -> str:
        return str(self._sources[source][0].location)

    def move_to(self, start: int, stop: int) -> None:
        """Says which elements are read next; pages of those before are given back once they are many."""
        if self._kept is None:
            if start != self._end or stop - self._begin > self._workspace.noted_elems:
                self._note()
                self._begin = start
            self._end = stop

    def read(self, source: int, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a source, in its own dtype."""
        import torch

        if self._mapped:
            if self._wholes is None:
                self._wholes = [torch.frombuffer(f.view(at, n), dtype=d.torch) for f, at, n, d in self._sources]
            return self._wholes[source][start:stop]
        file, base, _, dtype = self._sources[source]
        size, elems = dtype.element_bytes, stop - start
        if self._kept is not None:
            part = self._workspace.octets("kept", elems * size, self._kept[source] + start * size)
            return torch.frombuffer(part, dtype=dtype.torch)
        region = f"read{self._next_read}"
        self._next_read ^= 1
        file.read_into(self._workspace.octets(region, elems * size), base + start * size)
        return self._workspace.get(region, dtype.torch, elems)

    def done(self) -> None:
        """All is read: what was touched may be given back."""
        self._note()

    def _keep_all(self) -> None:
        self._kept, cursor = [], 0
        for seen, begin, end in self._workspace.touched.make_room(sum(nbytes for _, _, nbytes, _ in self._sources)):
            seen.release(begin, end - begin)
        for file, base, nbytes, _ in self._sources:
            self._kept.append(cursor)
            if not self._mapped:
                file.read_into(self._workspace.octets("kept", nbytes, cursor), base)
            cursor += _rounded(nbytes)
        self._end = max(nbytes // dtype.element_bytes for _, _, nbytes, dtype in self._sources)

    def _note(self) -> None:
        """Adds what was read since to what may be given back, and gives that back where it has become much."""
        if self._begin == self._end:
            return
        for file, base, _, dtype in self._sources:
            size = dtype.element_bytes
            for seen, low, high in self._workspace.touched.add(file, base + self._begin * size, base + self._end * size):
                seen.release(low, high - low)


def _rounded(nbytes: int) -> int:
    """Up to where the next tensor may begin: aligned for every dtype."""
    return -(-nbytes // 16) * 16
