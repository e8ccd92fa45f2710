"""Executes a plan: refuses to lose the user's files, makes the output and commits it. The output appears whole or not at
all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from streammerge.errors import FormatError, RecipeError, StreammergeError, UncheckedError, listed, printable
from streammerge.events import Listener, Preparing, Published, RunFinished, RunStarted, Suspended, Told
from streammerge.formats.records import CARD_FILE, RECEIPT_FILE
from streammerge.planning.plan import Plan
from streammerge.running import process
from streammerge.running.finished import MeasuredTasks
from streammerge.running.readback import receipt_of
from streammerge.running.session import Run, RunOptions, needs_torch
from streammerge.running.workspace import prepare_torch
from streammerge.stores import descriptors, faults
from streammerge.stores.base import Location, Staging
from streammerge.stores.space import space_checked
from streammerge.tensors.threads import one_torch_thread
from streammerge.units import binary_bytes, counted, decimal_bytes


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """The report of a run. ``read_bytes``: what was asked of stores for tensors, in all passes and by all workers. Memory
    is resident bytes as the kernel counts them, worker processes included. ``peak_bytes``: the most memory above
    ``startup_bytes``. ``measured``: of each task, if it was asked for. ``nonfinite``: the count of NaN and infinity in each
    task that has any. ``receipt_digest``: of the output's receipt, "" if this is not known."""

    out: Location
    read_bytes: int
    written_bytes: int
    seconds: float
    peak_bytes: int
    startup_bytes: int
    memory_bytes: int
    plan: Plan
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    measured: MeasuredTasks | None = None
    nonfinite: Mapping[int, int] = field(default_factory=dict)
    receipt_digest: str = ""

    def __repr__(self) -> str:
        return (
            f"<Result {printable(self.out)}: {counted(len(self.plan.tasks), 'tensor')}, "
            f"{decimal_bytes(self.written_bytes)} written in {self.seconds:.1f} s, "
            f"peak memory {binary_bytes(self.peak_bytes)} of {binary_bytes(self.memory_bytes)}>"
        )

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        speed = (self.read_bytes + self.written_bytes) / max(self.seconds, 1e-9)
        facts = [
            ("output", f"{counted(len(self.plan.tasks), 'tensor')}, {decimal_bytes(self.written_bytes)}"),
            ("read", decimal_bytes(self.read_bytes)),
            ("time", f"{self.seconds:.1f} s ({decimal_bytes(speed)}/s)"),
            ("memory", f"{binary_bytes(self.peak_bytes)} of {binary_bytes(self.memory_bytes)}, above start-up"),
            *(("note", note) for note in self.notes),
            *(("warning", warning) for warning in self.warnings),
        ]
        return table(printable(self.out), facts)


def tell_and_prepare(plan: Plan, listener: Listener, computes: bool = True) -> None:
    """Tells the notes and warnings of a plan, and loads torch if the plan needs it and the caller ``computes``. The peak of
    memory counts from here."""
    for note in plan.notes:
        listener(Told("note", note))
    for warning in plan.warnings:
        listener(Told("warning", warning))
    if computes and plan.torch_needed:
        listener(Preparing("torch"))
        with process.collector_paused():  # saves a tenth of torch's import, which makes 100,000 lasting objects
            prepare_torch()
    process.reset_peak()


def execute(plan: Plan, options: RunOptions, resident_before: int) -> Result:
    """Runs a plan to its end. On an error, nothing was written under the output's name.

    ``resident_before``: resident bytes before the inputs' headers were read, because the headers count as the run's memory.
    Raises the errors that :func:`streammerge.merge` names.
    """
    if plan.out is None:
        raise ValueError("a plan without an output cannot be run")
    out = plan.out.resolve() if plan.out.is_folder() else plan.out  # a link to a folder stays a link
    refuse_input_as_output(out, plan)
    refuse_to_lose_files(out, plan)
    refuse_unreadable(plan)
    headers = max(process.resident_bytes() - resident_before, 0)
    tell_and_prepare(plan, options.listener, needs_torch(plan, options.measures))
    late = process.late_bytes()
    startup, began = process.resident_bytes() - headers, time.perf_counter()
    options.listener(RunStarted(plan.read_bytes, plan.write_bytes, plan.memory_bytes, len(plan.tasks)))
    files = len(plan.identities) + len(plan.layout.files) + len(plan.layout.side_files)
    with space_checked(out, plan.disk_bytes), descriptors.room_for(files, plan.budget.workers):
        made = _produce(plan, out.stage(options.overwrite), options)
    seconds = time.perf_counter() - began
    startup += process.late_bytes() - late
    options.listener(RunFinished(seconds))
    return Result(
        out,
        made.read_bytes,
        plan.write_bytes,
        seconds,
        max(process.peak_resident_bytes() - startup, 0) + made.peak_bytes,
        startup + made.startup_bytes,
        plan.memory_bytes,
        plan,
        (*plan.notes, *made.notes, *made.staging.notes),
        (*plan.warnings, *made.warnings),
        made.measured,
        made.nonfinite,
        made.receipt_digest,
    )


def _produce(plan: Plan, staging: Staging, options: RunOptions) -> Run:
    """Makes and commits the output. On an error, keeps nothing, or only what the next run can continue from."""
    with started(plan, staging, options) as run:
        made = run()
        alone = one_torch_thread() if made.torch_needed else nullcontext()
        with faults.survived(), process.collector_spared(), alone:
            made.make()
        publish(made, options)
    return made


def publish(made: Run, options: RunOptions) -> None:
    """Commits an output that is made."""
    refuse_to_lose_files(made.staging.out, made.plan)  # once more: much time has passed
    made.staging.commit(made.plan.layout.as_folder)
    options.listener(Published())


@contextmanager
def started(plan: Plan, staging: Staging, options: RunOptions) -> Iterator[Callable[[], Run]]:
    """Yields a function that begins the run, to be called once. When the block ends with an error, keeps nothing, or only
    what the next run can continue from."""
    made: Run | None = None
    keep = False

    def run() -> Run:
        nonlocal made
        made = Run(plan, staging, options)
        return made

    try:
        yield run
    except BaseException as error:
        earlier = made is None or made.untouched  # the files are those of an earlier run
        # Before the wait for the journal, in which a second Ctrl-C may come.
        keep = earlier or isinstance(error, UncheckedError) or (options.resume and may_pass(error))
        if made is not None:
            made.journal.stop(last=keep and not earlier)
        if staging.published:
            keep = False
            options.listener(Published())
        elif made is not None and keep and not earlier:
            keep = isinstance(error, UncheckedError) or (staging.resumable and made.journal.kept_bytes > 0)
            if keep and made.resume:
                options.listener(Suspended(made.journal.kept_bytes, plan.layout.size))
        raise
    finally:
        staging.abort(keep)


def may_pass(error: BaseException) -> bool:
    """Whether the same run may succeed another time: it was interrupted, the machine failed, or another file took the
    output's place during the run."""
    return (
        not isinstance(error, StreammergeError)
        or isinstance(error, RecipeError | OSError)
        or isinstance(error.__cause__, OSError)
    )


def input_as_output(out: Location, what: str) -> FormatError:
    """The error of an output that ``what`` ("is" or "holds") an input."""
    return FormatError(f"{printable(out)} {what} one of the inputs; inputs are never written, choose another output")


def refuse_input_as_output(out: Location, plan: Plan) -> None:
    """Raises FormatError when the output is an input under any name, holds an input, or lies in the folder of an input."""
    same = {known.place for known in plan.identities.values()}
    written = [out] if out.is_file() else _files_in(out) if out.is_folder() else []
    inputs = [path.resolve() for path in plan.identities]
    holds = out.is_folder() and any(out.resolve() in path.parents for path in inputs)
    if holds or any(path.status().place in same for path in written):
        what = "holds" if out.is_folder() else "is"
        raise input_as_output(out, what)
    folders = {owner.resolve() for owner in dict.fromkeys(plan.owners.values()) if owner.is_folder()}
    if folders & {*out.resolve().parents}:
        raise FormatError(
            f"{printable(out)} lies in the folder of an input; inputs are never written, choose another output"
        )


def _files_in(folder: Location) -> list[Location]:
    from streammerge.formats.file_names import files_below  # here, because most outputs are new

    return [path for _, path in files_below(folder) if path.is_file()]


def refuse_to_lose_files(out: Location, plan: Plan) -> None:
    """Raises RecipeError when the output would replace a folder with foreign files, a folder by a file, or a file by a
    folder."""
    if out.is_folder():
        if not plan.layout.as_folder:
            raise RecipeError(f"{printable(out)} is a folder; remove it first, or choose another name")
        written = {file.name for file in plan.layout.files} | {name for _, name in plan.layout.side_files}
        written.discard(CARD_FILE)  # a card that no merge made is somebody's own text
        from streammerge.formats.file_names import foreign_files  # here, because most outputs are new

        foreign = [] if out.store.keeps_history else foreign_files(out, written | made_before(out))
        if foreign:
            raise RecipeError(
                f"{printable(out)} also holds {listed(foreign)}, which replacing it would lose; move that away first"
            )
    elif plan.layout.as_folder and out.exists():
        raise RecipeError(
            f"{printable(out)} is a file, and a folder is to be there; remove it first, or choose another name"
        )


def refuse_unreadable(plan: Plan) -> None:
    """Raises FormatError when a file of this machine that is to be copied may not be read."""
    for source, _ in plan.layout.side_files:
        if source.local_path is not None:
            source.stream().close()


def refuse_beside(option: str, place: Location, plan: Plan, *, inside: bool = False) -> None:
    """Raises RecipeError when a file that ``option`` names would take the place of an input or of the output.

    ``inside``: whether it may lie in the output's folder.
    """
    taken = {path.resolve() for path in plan.identities}
    taken |= {owner.resolve() for owner in dict.fromkeys(plan.owners.values()) if owner.is_folder()}
    out = {plan.out.resolve()} if plan.out else set[Location]()
    same = {known.place for known in plan.identities.values()}
    linked = place.is_file() and place.status().place in same
    own = place.resolve()
    above = {*own.parents}
    in_output = own in out or any(own in path.parents for path in out) or bool(out & above and not inside)
    if linked or in_output or taken & {own, *above}:
        raise RecipeError(f"`{option}` {printable(place)} is, or lies in, an input or the output; choose another name")


def made_before(out: Location) -> set[str]:
    """Returns the file names of an earlier output in that folder, from its receipt."""
    try:
        return {RECEIPT_FILE, *receipt_of(out).checksums}
    except StreammergeError:
        return set()
