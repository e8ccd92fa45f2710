"""Makes an adapter: workers compute the factors into temporary files, then the output is written, whole or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.errors import BudgetError, FormatError, MismatchError, RecipeError, listed, printable
from streammerge.events import (
    Event,
    Preparing,
    Published,
    Resumed,
    RunFinished,
    RunStarted,
    Spooled,
    Suspended,
    Syncing,
    TaskDone,
    Told,
)
from streammerge.factoring.computing import Room, broken, distance, factors_of, stored
from streammerge.factoring.documents import CONFIG, START, WEIGHTS, Document
from streammerge.factoring.layers import COMPARE, STACK, Layer, LayerReport, share
from streammerge.factoring.recording import NUMBERS_BYTES, SUM, Numbers, Record, identity
from streammerge.factoring.single import SingleFile
from streammerge.factoring.writing import COPY_BYTES, Piece, from_file, from_number, write_file, write_folder
from streammerge.formats.file_names import files_below, foreign_files
from streammerge.formats.records import RECEIPT_FILE, RECIPE_FILE
from streammerge.planning.budget import PER_TASK_BYTES, PER_WORKER_BYTES, RUN_BYTES, SPOOLING_BYTES
from streammerge.planning.digest import differences
from streammerge.running import process
from streammerge.running.execution import made_before, may_pass
from streammerge.running.executors.base import Host
from streammerge.running.executors.threads import ThreadExecutor
from streammerge.running.spooling import spooled_tasks
from streammerge.running.workspace import prepare_torch
from streammerge.sources.base import Source
from streammerge.stores import descriptors, faults
from streammerge.stores.base import Location, Output, Staging, Status
from streammerge.stores.inputs import InputFiles
from streammerge.stores.journal import Finished, Journal
from streammerge.stores.space import space_checked
from streammerge.tensors.spec import ranges
from streammerge.tensors.threads import one_torch_thread
from streammerge.units import binary_bytes, counted, decimal_bytes

if TYPE_CHECKING:
    import torch

_SHOWN_LAYERS = 12


@dataclass(slots=True)
class Making:
    """An adapter that is to be made. No tensor is read before :func:`make`.

    ``layers``: the tensors with factors or comparisons, in the order of the output. ``wholes``: the module that a compared
    tensor is stored with -> all its tensors by their names in the base, as they are stored whole; without a module here
    a tensor is not represented. ``absent``: tensors that are not represented, and why. ``files``: all inputs.
    ``folders``: folders of inputs. ``says``: what the output is made of, for messages. ``record``: how it can be made
    again; None for one that cannot tell. ``file``: how the adapter is one file; None for a folder in PEFT's form.
    """

    layers: list[Layer]
    document: Document
    files: dict[Location, Status]
    folders: list[Location]
    says: str
    wholes: dict[str, dict[str, Source]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    record: Record | None = None
    file: SingleFile | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs of the layers."""
        return sum(source.nbytes for layer in self.layers for source in layer.sources)

    @property
    def most_bytes(self) -> int:
        """The most bytes that the factors have. Their ranks are known when they are made."""
        return sum(layer.most_bytes() for layer in self.layers)

    def needed_bytes(self, workers: int) -> int:
        """Returns the memory that so many workers need."""
        largest = max((layer.needed_bytes() for layer in self.layers), default=0)
        return self._fixed_bytes() + workers * (PER_WORKER_BYTES + largest)

    def _fixed_bytes(self) -> int:
        return RUN_BYTES + SPOOLING_BYTES + PER_TASK_BYTES * (len(self.layers) + len(self.absent))

    def workers_within(self, memory: int, wanted: int) -> int:
        """Returns the number of workers that a budget has room for. Raises BudgetError."""
        fixed = self._fixed_bytes()
        largest = max(self.layers, key=Layer.needed_bytes, default=None)
        each = PER_WORKER_BYTES + (largest.needed_bytes() if largest else 0)
        if largest is not None and fixed + each > memory:
            raise BudgetError(
                f"{printable(largest.name)} of shape {list(largest.shape)} needs {binary_bytes(fixed + each)} to be "
                f"decomposed, and the budget is {binary_bytes(memory)}; give more `memory`, or a smaller `rank`"
            )
        return max(min(wanted, (memory - fixed) // each, len(self.layers)), 1)


@dataclass(frozen=True, slots=True, repr=False)
class AdapterResult:
    """The report of an adapter that was made.

    ``error``: the norm of all that the adapter lacks, as a share of the norm of all updates. ``layers``: the same for each
    tensor. Memory and bytes are as in :class:`~streammerge.running.execution.Result`.
    """

    out: Location
    read_bytes: int
    written_bytes: int
    seconds: float
    peak_bytes: int
    startup_bytes: int
    memory_bytes: int
    error: float
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The highest rank."""
        return max((each.rank for each in self.layers), default=0)

    def __repr__(self) -> str:
        return f"<AdapterResult {printable(self.out)}: {self._held()}>"

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        facts = [
            ("adapter", f"{self._held()}, {decimal_bytes(self.written_bytes)}"),
            ("read", f"{decimal_bytes(self.read_bytes)} in {self.seconds:.1f} s"),
            ("memory", f"{binary_bytes(self.peak_bytes)} of {binary_bytes(self.memory_bytes)}, above start-up"),
            *(("note", note) for note in self.notes),
            *(("warning", warning) for warning in self.warnings),
        ]
        worst = sorted(self.layers, key=lambda each: -each.error)[:_SHOWN_LAYERS]
        rows = [(printable(each.name), f"{each.error:.3g}", str(each.rank)) for each in worst]
        more = (
            f"the {len(worst)} of {len(self.layers)} layers with the largest errors"
            if len(self.layers) > len(worst)
            else ""
        )
        return table(printable(self.out), facts, ("layer", "error", "rank"), rows, more)

    def _held(self) -> str:
        made = sum(each.stored == "factors" for each in self.layers)
        return f"{counted(made, 'module')}, rank {self.rank}, error {self.error:.3g}"


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of one layer. ``place``: the temporary file with its factors, and ``checksum`` that of the file."""

    number: int
    rank: int
    total: float
    rest: float
    read_bytes: int
    place: Output
    checksum: int

    @property
    def factor_bytes(self) -> int:
        return self.place.size - NUMBERS_BYTES


@dataclass(frozen=True, slots=True)
class _Work:
    """``create``: makes a temporary file for a layer, of a size in bytes."""

    layers: Sequence[Layer]
    files: InputFiles
    create: Callable[[int, int], Output]

    @property
    def modules(self) -> tuple[str, ...]:
        return ("torch",)

    def open(self, host: Host) -> _Worker:
        return _Worker(self, host)


class _Worker:
    def __init__(self, work: _Work, host: Host) -> None:
        self._work, self._host = work, host

    def run(self, number: int) -> _Outcome:
        layer, room = self._work.layers[number], Room(self._work.files, self._host)
        try:
            if layer.way == COMPARE:
                return self._kept(number, Numbers(0, distance(layer, room), 0.0), (), room)
            factors = factors_of(layer, room)
            numbers = Numbers(factors.rank, factors.total, factors.rest)
            made = stored(layer, factors) if factors.rank else ()
            if not all(bool(each.isfinite().all()) for each in made):
                raise MismatchError(
                    f"{printable(layer.name)} has factors that are too large for {layer.wanted.dtype.torch_name}; pass "
                    "`dtype`, like float32"
                )
            return self._kept(number, numbers, made, room)
        except ValueError as error:
            raise MismatchError(
                f"{broken(layer, room)}, so {printable(layer.name)} has no factors; repair that file, or leave it out (in "
                "an extraction, `exclude` the module)"
            ) from error
        finally:
            room.forget()

    def _kept(self, number: int, numbers: Numbers, factors: Sequence[torch.Tensor], room: Room) -> _Outcome:
        """Writes a layer's temporary file."""
        place = self._work.create(number, sum(each.nbytes for each in factors) + NUMBERS_BYTES)
        value = offset = 0
        for part in (*map(_bytes_of, factors), numbers.packed()):
            place.write_full(part, offset)
            value, offset = SUM.update(part, value), offset + len(part)
        return _Outcome(number, *numbers, room.read_bytes, place, value)

    def close(self) -> None:
        """Nothing is kept between layers."""


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def make(
    made: Making,
    out: Location,
    *,
    memory_bytes: int,
    workers: int,
    overwrite: bool,
    polite: bool,
    listener: Callable[[Event], None],
    resident_before: int,
    resume: bool = True,
) -> AdapterResult:
    """Makes the adapter in the folder ``out``. On an error, nothing is there. ``resume``: goes on from the layers that an
    interrupted run of the same adapter has left, and leaves its own. Raises the errors of a merge."""
    refuse_output(made, out)
    count = made.workers_within(memory_bytes, workers)
    headers = max(process.resident_bytes() - resident_before, 0)
    for note in made.notes:
        listener(Told("note", note))
    for warning in made.warnings:
        listener(Told("warning", warning))
    listener(Preparing("torch"))
    with process.collector_paused():
        prepare_torch()
    process.reset_peak()
    startup, began = process.resident_bytes() - headers, time.perf_counter()
    most = made.most_bytes
    listener(RunStarted(made.read_bytes, most, memory_bytes, len(made.layers)))
    staging = out.stage(overwrite)
    staging.as_folder = made.file is None
    run = _Run(made, staging, count, polite, listener, resume)
    keep = False
    try:
        with (
            space_checked(out, most),
            descriptors.room_for(len(made.files) + 2, count),
            faults.survived(),
            process.collector_spared(),
            one_torch_thread(),
        ):
            run.make()
        refuse_output(made, out)
        listener(Syncing())
        staging.commit(as_folder=made.file is None)
        listener(Published())
    except BaseException as error:
        keep = run.untouched or (resume and may_pass(error))
        run.journal.stop(last=keep and not run.untouched)
        if staging.published:
            keep = False
            listener(Published())
        elif keep and not run.untouched:
            keep = staging.resumable and run.journal.kept_bytes > 0
            if keep:
                listener(Suspended(run.journal.kept_bytes, most))
        raise
    finally:
        staging.abort(keep)
    seconds = time.perf_counter() - began
    listener(RunFinished(seconds))
    return AdapterResult(
        out,
        run.read_bytes,
        run.written_bytes,
        seconds,
        max(process.peak_resident_bytes() - startup, 0),
        startup,
        memory_bytes,
        run.error,
        tuple(run.reports),
        (*made.notes, *run.notes, *staging.notes),
        (*made.warnings, *run.warnings),
    )


@dataclass(frozen=True, slots=True)
class _Whole:
    """The tensors of a module that may be stored whole."""

    sources: tuple[Source, ...]


class _Run:
    """One run. Afterwards ``reports``, ``error``, ``read_bytes`` and ``written_bytes`` say what was done. ``untouched``:
    whether what an earlier run has left is as it was."""

    def __init__(
        self,
        made: Making,
        staging: Staging,
        workers: int,
        polite: bool,
        listener: Callable[[Event], None],
        resume: bool,
    ) -> None:
        self._resume, self.untouched = resume, True
        parts = identity(made.layers, made.files, made.record)
        self.journal = Journal(staging.journal_file, parts, lambda: staging.temporaries, resume)
        self.notes: list[str] = []
        self._made, self._staging, self._workers, self._listener = made, staging, workers, listener
        self._files = InputFiles(made.files, polite, streams=workers)
        self._layers: Sequence[Layer] = made.layers
        self._wholes: dict[str, dict[str, Source]] = {}
        self.reports: list[LayerReport] = []
        self.warnings: list[str] = []
        self.read_bytes = self.written_bytes = 0
        self.error = 0.0

    def make(self) -> None:
        lock = threading.Lock()

        def create(number: int, size: int) -> Output:
            with lock:
                return self._staging.temporary(_file_name(number), size)

        outcomes = self._take_up()

        with closing(self._files):
            modules = list(self._made.wholes)
            wholes = [_Whole(tuple(self._made.wholes[module].values())) for module in modules]
            tasks: list[Layer | _Whole] = [*self._layers, *wholes]
            unpacked = spooled_tasks(
                tasks,
                tasks,
                self._files,
                lambda size: self._staging.temporary("spooled", size),
                lambda name, record: self._listener(Spooled(name, record.compressed_bytes)),
            )
            self._layers = [task for task in unpacked if isinstance(task, Layer)]
            self._wholes = {
                module: dict(zip(self._made.wholes[module], task.sources, strict=True))
                for module, task in zip(modules, unpacked[len(self._layers) :], strict=True)
            }
            executor = ThreadExecutor(self._workers)
            work = _Work(self._layers, self._files, create)
            missing = [number for number in range(len(self._layers)) if number not in outcomes]
            with closing(executor), closing(executor.run(work, missing)) as results:
                for done in results:
                    outcomes[done.number] = done
                    self.journal.add(_piece(done))
                    self.read_bytes += done.read_bytes
                    self._tell(self._layers[done.number].name, done.read_bytes, done.factor_bytes)
            self._write(outcomes)
            self._files.check_unchanged()
            self.journal.stop()

    def _take_up(self) -> dict[int, _Outcome]:
        """Returns the layers that an interrupted run of the same adapter has left, if their checksums are right. Begins the
        journal.

        Raises RecipeError when something else was left, unless the caller asked to discard it.
        """
        earlier = self.journal.earlier() if self._resume else None
        found: dict[int, _Outcome] = {}
        if earlier is not None and earlier.plan is not None:
            other = differences(earlier.plan, self.journal.plan)
            if other and earlier.count:
                out = printable(self._staging.out)
                raise RecipeError(
                    f"an interrupted run into {out} left {decimal_bytes(earlier.nbytes)}, and this run differs from it: "
                    f"{other}; repeat that run to continue it, discard what it left with `resume=False`, or choose another "
                    "output"
                )
            pieces = () if other else earlier.pieces
            found = {done.number: done for piece in pieces if (done := self._kept(piece)) is not None}
        self.untouched = False
        if not found:
            self._staging.clear()
        self.journal.begin([_piece(done) for done in found.values()])
        if found:
            kept = sum(done.place.size for done in found.values())
            self._listener(Resumed(kept, sum(self._layer_bytes(number) for number in found)))
            self.notes.append(f"continued an interrupted run: {len(found)} of {len(self._layers)} tensors were there")
            self._listener(Told("note", self.notes[-1]))
        return found

    def _layer_bytes(self, number: int) -> int:
        return sum(source.nbytes for source in self._layers[number].sources)

    def _kept(self, piece: Finished) -> _Outcome | None:
        """Returns the layer that a piece tells of, None if its file is not what was written."""
        number = piece.task
        if number >= len(self._layers) or piece.file != _file_name(number) or piece.nbytes < NUMBERS_BYTES:
            return None
        file = self._staging.temporary(piece.file, piece.nbytes, keep=True)
        if not file.kept:
            return None
        read, value, data = from_file(file, 0), 0, memoryview(b"")
        for start, stop in ranges(piece.nbytes, COPY_BYTES):
            value = SUM.update(read(start, stop), value)
        if value != piece.checksum:
            return None
        data = read(piece.nbytes - NUMBERS_BYTES, piece.nbytes)
        return _Outcome(number, *Numbers.behind(bytes(data)), 0, file, value)

    def _tell(self, name: str, read: int, written: int) -> None:
        self._listener(TaskDone(name, read, written, process.resident_bytes()))

    def _write(self, outcomes: Mapping[int, _Outcome]) -> None:
        ranks = {self._layers[n].module: outcomes[n].rank for n in sorted(outcomes) if outcomes[n].rank}
        changed = [n for n in sorted(outcomes) if self._layers[n].way == COMPARE and outcomes[n].total]
        biases, wholes = dict[str, Source](), dict[str, dict[str, Source]]()
        stored: set[str] = set()
        for number in changed:
            layer = self._layers[number]
            if layer.module not in self._wholes:
                continue
            if layer.module not in ranks:
                wholes[layer.module] = self._wholes[layer.module]
            elif layer.name.endswith(".bias"):
                biases[f"{layer.module}.base_layer.bias"] = self._wholes[layer.module][layer.name]
            else:
                continue
            stored.add(layer.name)
        self._report(outcomes, stored)
        untied = [name for name in (*ranks, *wholes) if name in self._made.document.tied and not self._ties(name)]
        if untied:
            self.warnings.append(
                f"the base's head has the weights of {printable(untied[0])}, and PEFT updates the embeddings only; it "
                "knows this tie for modules called embed_tokens"
            )
        if not ranks and not wholes:
            self._refuse_nothing(bool(changed))
        pieces = list(self._pieces(outcomes, biases, wholes))
        file, record = self._made.file, self._made.record
        if file is not None:
            by_tensor = {self._layers[n].name: outcomes[n].rank for n in sorted(outcomes)}
            metadata = file.metadata(self._layers, by_tensor)
            self.written_bytes = write_file(self._staging, pieces, metadata, record, self.reports)
            return
        text = self._made.document.text(ranks, list(wholes), bool(biases)).encode()
        self.written_bytes = write_folder(self._staging, pieces, text, record, self.reports)

    def _ties(self, module: str) -> bool:
        return self._made.document.ties([module])

    def _pieces(
        self,
        outcomes: Mapping[int, _Outcome],
        biases: Mapping[str, Source],
        wholes: Mapping[str, Mapping[str, Source]],
    ) -> Iterator[Piece]:
        """Yields the tensors of the file, each with a function that reads a range of its bytes."""
        for number in sorted(outcomes):
            place = outcomes[number].place
            if outcomes[number].rank:
                down, up = self._layers[number].specs(outcomes[number].rank)
                yield down, from_file(place, 0)
                yield up, from_file(place, down.nbytes)
                if (alpha := self._layers[number].stored_alpha()) is not None:
                    yield alpha[0], from_number(*alpha)
        whole = {name: source for module in wholes.values() for name, source in module.items()}
        for name, source in (*biases.items(), *whole.items()):
            yield source.spec.named(START + name), self._from_source(source)

    def _from_source(self, source: Source) -> Callable[[int, int], memoryview]:
        room, size = Room(self._files, Host(lambda: False)), source.spec.dtype.element_bytes
        reader = source.open(room)

        def read(start: int, stop: int) -> memoryview:
            buffer = memoryview(bytearray(stop - start))
            self.read_bytes += stop - start
            return reader.read(start // size, stop // size, buffer)

        return read

    def _report(self, outcomes: Mapping[int, _Outcome], stored: set[str]) -> None:
        total = lacking = 0.0
        for number in sorted(outcomes):
            layer, done = self._layers[number], outcomes[number]
            total += done.total
            if layer.way == STACK:
                how, rest = "factors", 0.0
            elif not done.total:
                how, rest = "equal", 0.0
            elif done.rank:
                how, rest = "factors", done.rest
            elif layer.name in stored:
                how, rest = "whole", 0.0
            else:
                how, rest = "absent" if layer.way == COMPARE else "equal", done.total
            lacking += rest
            self.reports.append(
                LayerReport(layer.name, layer.shape, how, done.rank, done.total**0.5, share(rest, done.total))
            )
        self.error = share(lacking, total)
        lost = [each.name for each in self.reports if each.stored == "absent"]
        if lost:
            self.warnings.append(
                f"{counted(len(lost), 'changed tensor')} ({listed(lost, 3)}) have no place in a product of factors, so the "
                "adapter lacks their updates; `save_modules=True` stores their modules whole"
            )

    def _refuse_nothing(self, changed: bool) -> None:
        if changed:
            raise MismatchError(
                f"{self._made.says}: only tensors that have no factors differ, so there is no adapter of factors; "
                "`save_modules=True` stores modules whole"
            )
        raise MismatchError(f"{self._made.says}: no tensor differs, so there is no adapter to make")


def _file_name(number: int) -> str:
    return f"factors/{number}"


def _piece(done: _Outcome) -> Finished:
    """Returns a layer as the journal writes it down."""
    return Finished(done.number, 0, _file_name(done.number), 0, done.place.size, done.checksum)


def refuse_output(made: Making, out: Location) -> None:
    """Raises RecipeError or FormatError for an output that is of another kind, or would lose a file."""
    _refuse_kind(made, out)
    resolved = out.resolve()
    inputs = [path.resolve() for path in made.files]
    written = [path for _, path in files_below(out) if path.is_file()] if out.is_folder() else []
    written += [out] if out.is_file() else []
    same = {status.place for status in made.files.values()}
    if (
        resolved in inputs
        or any(resolved in path.parents for path in inputs)
        or any(path.status().place in same for path in written)
    ):
        raise FormatError(
            f"{printable(out)} is or holds one of the inputs; inputs are never written, choose another output"
        )
    folders = {folder.resolve() for folder in made.folders if folder.is_folder()}
    if folders & {resolved, *resolved.parents}:
        raise FormatError(
            f"{printable(out)} lies in the folder of an input; inputs are never written, choose another output"
        )
    if out.is_folder():
        ours = {CONFIG, WEIGHTS, RECIPE_FILE, RECEIPT_FILE} | made_before(out)
        foreign = [] if out.store.keeps_history else foreign_files(out, ours)
        if foreign:
            raise RecipeError(
                f"{printable(out)} also holds {listed(foreign)}, which replacing it would lose; move that away first"
            )


def _refuse_kind(made: Making, out: Location) -> None:
    """Raises RecipeError for a file in place of a folder, or the other way round."""
    if made.file is not None:
        if out.suffix.lower() != ".safetensors":
            raise RecipeError(f"{printable(out)}: an adapter as one file is written as .safetensors; give it this ending")
        return
    if is_file_name(out):
        raise RecipeError(
            f"{printable(out)}: an adapter is a folder with its configuration; give the name of a folder, like "
            f"{printable(out.with_name(out.stem))}/"
        )
    if out.exists() and not out.is_folder():
        raise RecipeError(
            f"{printable(out)} is a file, and a folder is to be there; remove it first, or choose another name"
        )


def is_file_name(out: Location) -> bool:
    """Whether an output is named like a file of weights."""
    return out.suffix.lower() in _ENDINGS and not out.is_folder() and not out.ends_in_slash


_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
