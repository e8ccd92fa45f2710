"""What one worker computes in: its buffers, and the numbers of a task's inputs, mapped or read."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Generic, TypeVar

from streammerge.budget import Budget, slots
from streammerge.storage import InputFile, InputFiles, OutputFile
from streammerge.tensors import TensorEntry

if TYPE_CHECKING:
    import torch

_WRITEBACK_BYTES = 8 << 20

File = TypeVar("File")


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
        self.mapped: Spans[InputFile] = Spans(budget.kept_bytes)
        self.written: Spans[OutputFile] = Spans(_WRITEBACK_BYTES)
        self._slots = slots(budget)
        self._slot_bytes = budget.chunk_elems * budget.cost.compute
        total = max(sum(size for _, size in self._slots.values()), 1)
        self._arena = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._views: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._taken: dict[str, int] = {}

    def clear(self) -> None:
        """Forgets the names of the slots, for the next chunk."""
        self._taken.clear()

    def octets(self, region: str, nbytes: int, start: int = 0) -> memoryview:
        """The first bytes of a fixed region, from ``start``."""
        offset, size = self._slots[region]
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
        import torch

        view = self._views.get((offset, size, dtype))
        if view is None:
            view = torch.frombuffer(self._arena, dtype=dtype, count=size // dtype.itemsize, offset=offset)
            self._views[offset, size, dtype] = view
        if elems > len(view):
            raise ValueError(f"a buffer holds {len(view)} elements, {elems} were asked for")
        return view[:elems]


class Spans(Generic[File]):
    """Byte ranges by file, collected until they are worth a system call: one range for each file, gaps included, since a
    fault may map what lies between as well."""

    def __init__(self, enough_bytes: int) -> None:
        self._enough = enough_bytes
        self._spans: dict[File, tuple[int, int]] = {}

    def add(self, file: File, begin: int, end: int) -> list[tuple[File, int, int]]:
        """Takes a range in. Returns what came together before it, once that and this are enough, and starts over."""
        low, high = self._spans.get(file, (begin, begin))
        ripe = self.make_room(max(high, end) - min(low, begin) - (high - low))
        low, high = self._spans.get(file, (begin, begin))
        self._spans[file] = (min(low, begin), max(high, end))
        return ripe

    def make_room(self, nbytes: int) -> list[tuple[File, int, int]]:
        """Returns what came together, and starts over, where that and so many bytes more are enough."""
        if sum(high - low for low, high in self._spans.values()) + nbytes <= self._enough:
            return []
        ripe = [(file, *span) for file, span in self._spans.items()]
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
        self._next_read = 0
        self._kept: list[int] | None = None
        if sum(_rounded(s.nbytes) for s in sources) <= keep_bytes:
            self._keep_all()

    def __len__(self) -> int:
        return len(self._sources)

    def name(self, source: int) -> str:
        return self._sources[source][0].path

    def read(self, source: int, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a source, in its own dtype."""
        import torch

        file, base, _, dtype = self._sources[source]
        size, elems = dtype.element_bytes, stop - start
        offset, nbytes = base + start * size, elems * size
        if self._mapped:
            if self._kept is None:
                self._release(file, offset, nbytes)
            return torch.frombuffer(file.view(offset, nbytes), dtype=dtype.torch)
        if self._kept is not None:
            part = self._workspace.octets("kept", nbytes, self._kept[source] + start * size)
            return torch.frombuffer(part, dtype=dtype.torch)
        region = f"read{self._next_read}"
        self._next_read ^= 1
        file.read_into(self._workspace.octets(region, nbytes), offset)
        return self._workspace.get(region, dtype.torch, elems)

    def _keep_all(self) -> None:
        self._kept, cursor = [], 0
        for seen, begin, end in self._workspace.mapped.make_room(sum(nbytes for _, _, nbytes, _ in self._sources)):
            seen.release(begin, end - begin)
        for file, base, nbytes, _ in self._sources:
            self._kept.append(cursor)
            if not self._mapped:
                file.read_into(self._workspace.octets("kept", nbytes, cursor), base)
            cursor += _rounded(nbytes)

    def done(self) -> None:
        """All passes are over: what was kept may be given back."""
        if self._mapped and self._kept is not None:
            for file, base, nbytes, _ in self._sources:
                self._release(file, base, nbytes)

    def _release(self, file: InputFile, offset: int, nbytes: int) -> None:
        """Notes that these pages were touched, and gives back those touched before where they have become many."""
        for seen, begin, end in self._workspace.mapped.add(file, offset, offset + nbytes):
            seen.release(begin, end - begin)


def _rounded(nbytes: int) -> int:
    """Up to where the next tensor may begin: aligned for every dtype."""
    return -(-nbytes // 16) * 16
