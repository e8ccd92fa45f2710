"""Whether an output is what its receipt says: its structure, its checksums, and its values, computed once more."""

from __future__ import annotations

import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint import open_checkpoint
from streammerge.checksums import CRC32, Checksum
from streammerge.choices import RECEIPT_FILE, RECEIPT_KEY
from streammerge.dtypes import DType
from streammerge.engine import Engine
from streammerge.errors import ChangedError, FormatError, RecipeError, VerifyError, listed, printable
from streammerge.executors.local import ThreadExecutor
from streammerge.formats import sniff, torch_zip
from streammerge.formats.base import LayoutFile
from streammerge.formats.folder import inside
from streammerge.methods.registry import INTEGERS
from streammerge.planning import Plan, budget_of
from streammerge.receipt import ITSELF, Receipt, escaped, read_receipt
from streammerge.staging import staged_tasks
from streammerge.storage import faults
from streammerge.storage.files import (
    COPY_BYTES,
    InputFile,
    InputFiles,
    OutputFile,
    digest_outside,
    file_size,
    outside,
    read_full,
)
from streammerge.storage.journal import Key
from streammerge.structure import check_by_library
from streammerge.tasks import MergeTask, Piece, pieces
from streammerge.tensors import ranges
from streammerge.workspace import prepare_torch

if TYPE_CHECKING:
    import torch

_RANGE_BYTES = 64 << 20
_MOST_RECEIPT_BYTES = 256 << 20
_ROUNDING = 2.0**-21
"""How far float32 may be from the exact number, as a share of it, after a few operations."""
_COMPARED_ELEMS = 1 << 14
_LOADED = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".index.json", ".py")
"""Endings of what a loader might take for a part of the model."""


@dataclass(slots=True)
class Verified:
    """What was found right. ``sampled_tensors`` were computed again, ``sampled_elems`` numbers of them: ``equal_elems`` are
    the float64 result rounded once, ``repeated_elems`` lie in parts where float64 may decide otherwise (which of two
    near-equal numbers is the larger), and which are bit for bit what the merge computes; the rest is the float64 result but
    for rounding. ``notes``: what was not verified, and why.
    """

    out: Path
    tensors: int = 0
    files: int = 0
    checked_bytes: int = 0
    digest: str = ""
    sampled_tensors: int = 0
    sampled_elems: int = 0
    equal_elems: int = 0
    repeated_elems: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def recomputed(self) -> bool:
        return self.sampled_elems > 0


# ------------------------------------------------------------------------------------------- structure and checksums


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of a file, and the checksum that they must have."""

    what: str
    path: Path
    offset: int
    nbytes: int
    checksum: int


def receipt_of(out: Path) -> Receipt:
    """The receipt of an output. Raises VerifyError when it has none, or it is damaged."""
    if not out.exists():
        raise RecipeError(f"{printable(out)} does not exist")
    if out.is_dir():
        path = out / RECEIPT_FILE
        if not path.is_file() or file_size(path) > _MOST_RECEIPT_BYTES:
            raise _without(out)
        text = read_full(path, 0, file_size(path)).decode("utf-8", "replace")
    else:
        container = _read(out)
        if RECEIPT_KEY not in container.metadata:
            raise _without(out)
        text = container.metadata[RECEIPT_KEY]
    return read_receipt(text, out)


def _without(out: Path) -> VerifyError:
    return VerifyError(
        f"{printable(out)} has no receipt, so it cannot be verified; streammerge writes one into each output"
    )


def _read(path: Path) -> Any:
    try:
        return sniff.read(path)
    except FormatError as error:
        raise VerifyError(f"it cannot be read: {error}") from error


def check_files(out: Path, receipt: Receipt, workers: int) -> Verified:
    """Structure and checksums of every file. Raises VerifyError that names all that is wrong."""
    if out.is_dir() == (ITSELF in receipt.checksums):
        raise VerifyError(f"{printable(out)}: its receipt is that of another kind of output")
    parts: list[_Part] = []
    wrong: list[str] = []
    tensors = 0
    for name in receipt.checksums:
        try:
            path = out if name == ITSELF else inside(out, name)
        except FormatError as error:
            wrong.append(str(error))
            continue
        if name == ITSELF or name.endswith(".safetensors"):
            tensors += _tensor_file(path, receipt.sums(name), receipt, parts, wrong)
        else:
            parts.append(_Part(printable(name), path, 0, file_size(path), receipt.sums(name)[0]))
    notes = []
    if out.is_dir():
        _read(out)  # the index and its shards fit each other
        extra = sorted({p.name for p in out.iterdir()} - {RECEIPT_FILE, *receipt.checksums})
        wrong += [f"{printable(name)} does not belong to it" for name in extra if name.endswith(_LOADED)]
        beside = [name for name in extra if not name.endswith(_LOADED)]
        notes += [f"{listed(beside)} came later, and nobody knows what is in it"] if beside else []
    wrong += _wrong_parts(parts, receipt.kind, workers)
    if wrong:
        raise VerifyError(f"{printable(out)} is not as it was written: {listed(wrong, 10)}")
    checked = sum(part.nbytes for part in parts)
    return Verified(out, tensors, len(receipt.checksums), checked, receipt.digest, notes=notes)


def _tensor_file(path: Path, sums: list[int], receipt: Receipt, parts: list[_Part], wrong: list[str]) -> int:
    """The parts of a file of tensors; how many tensors it has."""
    container = _read(path)
    (spans,) = container.tensor_spans().values()
    if (receipt.kind is CRC32) != container.pickled:
        raise VerifyError(f"{printable(path.name)}: its receipt is that of another kind of file")
    if len(sums) != len(spans) + 1:
        wrong.append(f"{printable(path.name)} has {len(spans)} tensors, {len(sums) - 1} were written")
        return len(spans)
    if container.pickled:
        named = {store.offset: f"storage {printable(key)}" for key, store in container.storages.items()}
    else:
        named = {r.entry.offset: f"tensor {printable(n)}" for n, r in container.tree.items() if r.entry.nbytes}
        check_by_library(path, set(container.tree))
    rest = _rest(path, spans, receipt)
    if receipt.kind.update(rest) != sums[-1]:
        wrong.append(f"the header of {printable(path.name)}")
    parts += [_Part(named.get(a, f"byte {a}"), path, a, n, s) for (a, n), s in zip(spans, sums, strict=False)]
    return len(spans) if container.pickled else len(container.tree)


def _rest(path: Path, spans: list[tuple[int, int]], receipt: Receipt) -> bytes:
    """What is around a file's tensors, its receipt blank as it was when it was planned."""
    rest, final, blank = b"".join(outside(str(path), spans)), receipt.text(), receipt.blank().text()
    if receipt.kind is CRC32:
        return torch_zip.with_blank_receipt(rest, final.encode(), blank.encode())
    return rest.replace(escaped(final), escaped(blank), 1)


def _wrong_parts(parts: list[_Part], kind: Checksum, workers: int) -> list[str]:
    """What of these does not have its checksum."""
    cut = [(part, start, stop) for part in parts for start, stop in ranges(part.nbytes, _RANGE_BYTES)]
    found: dict[_Part, list[tuple[int, int, int]]] = {part: [] for part in parts}
    files = InputFiles({})

    def summed(item: tuple[_Part, int, int]) -> tuple[_Part, tuple[int, int, int]]:
        part, begin, end = item
        file, value = files.get(str(part.path)), 0
        buffer = memoryview(bytearray(min(end - begin, COPY_BYTES)))
        for start, stop in ranges(end - begin, COPY_BYTES):
            file.read_into(buffer[: stop - start], part.offset + begin + start)
            value = kind.update(buffer[: stop - start], value)
        return part, (begin, end - begin, value)

    executor = ThreadExecutor(workers)
    with closing(executor.run(cut, summed)) as results:
        for part, piece in results:
            found[part].append(piece)
    return [part.what for part, each in found.items() if kind.join(each) != part.checksum]


# ------------------------------------------------------------------------------------------------------------ values


def check_inputs(plan: Plan, receipt: Receipt) -> None:
    """ChangedError when an input is not the file that was merged, as far as the receipt can tell."""
    if set(plan.input_files) != set(receipt.inputs):
        raise ChangedError(f"the inputs are others: {listed(sorted(set(plan.input_files) ^ set(receipt.inputs)))}")
    for name, (path, spans) in plan.input_files.items():
        was = receipt.inputs[name]
        same = file_size(path) == was["bytes"] and digest_outside(path, spans) == was["header_sha256"]
        if not same or ("sha256" in was and digest_outside(path, []) != was["sha256"]):
            raise ChangedError(f"{printable(path)} is not the file that was merged")


def recompute(verified: Verified, plan: Plan, receipt: Receipt, share: float, seed: int) -> None:
    """Computes a sample of the output's pieces again, in float64. Raises VerifyError when they are others.

    A number is right when it is the float64 result but for rounding. A piece with others, which methods that choose
    among numbers may have, or sums that cancel, must be bit for bit what the merge computes.
    """
    places, skipped = _places(plan, verified.out, receipt)
    every = [(n, piece.start) for n, (task, _, _) in enumerate(places) for piece in pieces(task, n)]
    chosen = set(random.Random(seed).sample(every, math.ceil(len(every) * share)))
    if skipped:
        verified.notes.append(f"not computed again, for their places are not known: {listed(skipped)}")
    if not chosen:
        return
    sampled = {number: places[number] for number in sorted({number for number, _ in chosen})}
    prepare_torch()
    with tempfile.TemporaryDirectory(prefix="streammerge-") as folder, faults.survived():
        check = _Recomputation(plan, sampled, chosen, Path(folder))
        wrong = check.repeated(check.in_float64())
    verified.sampled_tensors = len(sampled)
    verified.sampled_elems, verified.equal_elems = check.elems, check.equal
    verified.repeated_elems = check.repeated_elems
    if wrong:
        raise VerifyError(
            f"{printable(verified.out)} does not hold what its recipe makes of these inputs: {listed(wrong)}; "
            "it was made of others, or is wrong"
        )


def _places(plan: Plan, out: Path, receipt: Receipt) -> tuple[list[tuple[MergeTask, str, int]], list[str]]:
    """Each task, with where its bytes lie: file and offset. And the names of those for which that is not known.

    Where all that is around the tensors is what is planned now, so are their places. Another version of streammerge may
    lay out otherwise; then names, dtypes and shapes must do.
    """
    paths = [out / file.name if out.is_dir() else out for file in plan.layout.files]
    if all(_as_planned(path, file, receipt) for path, file in zip(paths, plan.layout.files, strict=True)):
        return [(task, str(paths[task.file]), task.offset) for task in plan.tasks], []
    index, found, skipped = open_checkpoint(out), list[tuple[MergeTask, str, int]](), list[str]()
    for task in plan.tasks:
        entry = index.entries.get(task.out.name)
        if entry is not None and entry.mappable and entry.spec == task.out:
            found.append((task, entry.path, entry.offset))
        else:
            skipped.append(task.out.name)
    planned = {task.out.name for task in plan.tasks}
    return found, skipped + [name for name in index.entries if name not in planned]


def _as_planned(path: Path, file: LayoutFile, receipt: Receipt) -> bool:
    if not path.is_file() or file_size(path) != file.size:
        return False
    if not file.offsets:
        return True
    (spans,) = _read(path).tensor_spans().values()
    sums = receipt.sums(file.name if file.name in receipt.checksums else ITSELF)
    sealed = dict(zip((offset for offset, _ in spans), sums, strict=False))
    literals = torch_zip.seal(file, sealed, file.receipt) if file.sealed else file.literals
    return _rest(path, spans, receipt) == b"".join(literal.data for literal in literals)


class _Recomputation:
    """Tasks run again by the engine, which is given comparisons where a merge gives it output files."""

    def __init__(self, plan: Plan, places: dict[int, tuple[MergeTask, str, int]], chosen: set[Key], folder: Path) -> None:
        self.plan, self.places = plan, list(places.values())
        self.keys = {(at, start) for at, number in enumerate(places) for n, start in chosen if n == number}
        self.elems = self.equal = self.repeated_elems = 0
        self._inputs, self._output = InputFiles(plan.identities), InputFiles({})
        self._executor = ThreadExecutor(plan.budget.workers)
        tasks = [task for task, _, _ in self.places]
        self._tasks = staged_tasks(
            tasks, tasks, self._inputs, lambda size: OutputFile(folder / "staged", size), lambda entry: None
        )

    def in_float64(self) -> set[Key]:
        """Compares with float64 results; the pieces that must be repeated exactly."""
        wide, comparisons, exact = [], list[_Comparison](), set[Key]()
        for at, (task, (_, path, offset)) in enumerate(zip(self._tasks, self.places, strict=True)):
            dtype = task.out.dtype.component
            if task.verbatim or task.method is INTEGERS or dtype.kind != "float":
                exact |= {key for key in self.keys if key[0] == at}
            out = replace(task.out, dtype=DType.C128 if task.out.dtype.kind == "complex" else DType.F64)
            wide.append(replace(task, out=out, compute="float64", file=at, offset=0))
            comparisons.append(_Comparison(self._output.get(path), offset, dtype, task.piece_elems))
        for piece in self._run(wide, comparisons, self.keys - exact):
            elems, equal, far = comparisons[piece.number].counts[piece.start]
            if far:
                exact.add(piece.key)
            else:
                self.elems += elems
                self.equal += equal
        return exact

    def repeated(self, keys: set[Key]) -> list[str]:
        """Repeats these pieces as the merge made them; names of tensors that are not so to the bit."""
        tasks, repetitions = [], []
        for at, (task, (_, path, offset)) in enumerate(zip(self._tasks, self.places, strict=True)):
            tasks.append(replace(task, file=at, offset=0))
            repetitions.append(_Repetition(self._output.get(path), offset))
        for piece in self._run(tasks, repetitions, keys):
            self.elems += piece.stop - piece.start
            if piece.task.verbatim or piece.task.method is INTEGERS:
                self.equal += piece.stop - piece.start
            else:
                self.repeated_elems += piece.stop - piece.start
        return [task.out.name for task, each in zip(self._tasks, repetitions, strict=True) if each.differs]

    def _run(self, tasks: list[MergeTask], outputs: list[Any], keys: set[Key]) -> Iterator[Piece]:
        if not keys:
            return
        plan = self.plan
        budget = budget_of(tasks, plan.memory_bytes, plan.budget.workers, plan.io, staged=False)
        engine = Engine(budget, self._inputs, outputs, plan.io, CRC32, self._executor)
        with closing(engine.run_all(tasks, lambda piece: piece.key in keys)) as results:
            for done in results:
                yield done.piece(tasks)


class _Repetition:
    """Takes the bytes of a tensor as an output file would, and compares them with those that are there."""

    def __init__(self, file: InputFile, offset: int) -> None:
        self._file, self._offset = file, offset
        self.differs = False

    def write_full(self, data: Any, offset: int) -> None:
        there = bytearray(len(data))
        self._file.read_into(memoryview(there), self._offset + offset)
        if there != data:
            self.differs = True


class _Comparison:
    """Takes float64 numbers as an output file would take bytes, and compares them with those of the output's dtype.

    ``counts``: first element of a piece -> how many numbers it has, how many of them are the float64 result rounded
    once, and how many are further from it than rounding explains.
    """

    def __init__(self, file: InputFile, offset: int, dtype: DType, piece_elems: int) -> None:
        self._file, self._offset, self._dtype, self._piece_elems = file, offset, dtype, piece_elems
        self.counts: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0])

    def write_full(self, data: Any, offset: int) -> None:
        import torch

        size, exact = self._dtype.element_bytes, torch.frombuffer(data, dtype=torch.float64)
        first = offset // 8
        counts = self.counts[first // self._piece_elems * self._piece_elems]  # a piece is one worker's
        for start, stop in ranges(len(exact), _COMPARED_ELEMS):  # a few at a time, for the budget knows nothing of this
            raw = bytearray((stop - start) * size)
            self._file.read_into(memoryview(raw), self._offset + (first + start) * size)
            equal, far = _compared(torch.frombuffer(raw, dtype=self._dtype.torch), exact[start:stop])
            for number, more in enumerate((stop - start, equal, far)):
                counts[number] += more


def _compared(there: torch.Tensor, exact: torch.Tensor) -> tuple[int, int]:
    """How many numbers are the exact ones, rounded once; and how many are further from them than rounding explains."""
    import torch

    rounded, wide = exact.to(there.dtype).double(), there.double()
    equal = (rounded == wide) | (rounded.isnan() & wide.isnan())
    if bool(equal.all()):
        return len(there), 0
    near = (wide - exact).abs() <= max(torch.finfo(there.dtype).eps, _ROUNDING) * exact.abs()
    near &= exact.isfinite() & wide.isfinite()
    return int(equal.sum()), int((~(equal | near)).sum())
