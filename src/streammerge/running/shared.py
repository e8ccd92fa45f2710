"""Makes units of a plan on this machine, while others make other units. Leaves a receipt of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from streammerge.errors import StreammergeError, VerifyError, printable
from streammerge.events import Listener, RunFinished, RunStarted, Spooled, Suspended, TaskDone, Told, quiet
from streammerge.kernels.agreed import AGREED
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import MergeTask, Piece, PieceDone, batches
from streammerge.planning.units import Unit
from streammerge.running import process
from streammerge.running.choosing import executor_of
from streammerge.running.engine import SharedPasses, modules_of, run_all
from streammerge.running.execution import tell_and_prepare
from streammerge.running.executors.base import Executor, Executors
from streammerge.running.job import Bench, Job, OutputPlace, lent, new_key
from streammerge.running.nonfinite import culprit
from streammerge.running.sending import Sending
from streammerge.running.spooling import spooled_tasks
from streammerge.running.turning import Turning
from streammerge.running.unit_receipts import UnitInMaking
from streammerge.running.worker import MergeWork
from streammerge.sources.deflated import PackedRecord
from streammerge.stores import claims, descriptors, faults
from streammerge.stores.base import Joint, Location, Output
from streammerge.stores.claims import Claims, Fence, LeaseLost
from streammerge.stores.inputs import InputFiles
from streammerge.stores.space import space_checked
from streammerge.tensors.threads import one_torch_thread
from streammerge.units import binary_bytes, decimal_bytes

_SYNC_SECONDS = 2.0
"""The time between two syncs. Receipts are written after a sync."""


@dataclass(frozen=True, slots=True)
class SharedOptions:
    """How a machine makes units. None of these options changes a byte. ``lease_seconds``: see :class:`Claims`."""

    lease_seconds: float
    listener: Listener = quiet
    executor: str | Executors = "auto"
    polite: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class ShareResult:
    """The report of a machine that made units of a plan. Memory is as in :class:`Result`.

    ``made``: how many units this call has made. ``share``: how many units it was asked for. ``left``: how many units of the
    whole plan have no receipt yet. ``finished``: whether the output is there already.
    """

    out: Location
    made: int
    share: int
    left: int
    read_bytes: int
    written_bytes: int
    seconds: float
    peak_bytes: int
    startup_bytes: int
    memory_bytes: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    finished: bool = False

    def __repr__(self) -> str:
        return (
            f"<ShareResult {printable(self.out)}: {self.made} of {self.share} units made, {self.left} left in all, "
            f"{decimal_bytes(self.written_bytes)} written in {self.seconds:.1f} s, "
            f"peak memory {binary_bytes(self.peak_bytes)} of {binary_bytes(self.memory_bytes)}>"
        )


# ------------------------------------------------------------------------------------------------------ where bytes go


@dataclass(frozen=True, slots=True)
class _JointPlace(OutputPlace):
    """A file that other machines write to as well. Nothing is written when the lease is over."""

    joint: Joint
    name: str
    fence: Fence

    def opened(self) -> Output:
        return self.joint.open(self.name, self.size)

    def open(self, bench: Bench) -> _Fenced:
        return _Fenced(*bench.output(self), self.fence)


class _Fenced:
    __slots__ = ("_fence", "_file", "_own")

    def __init__(self, file: Output, own: bool, fence: Fence) -> None:
        self._file, self._own, self._fence = file, own, fence

    def write_full(self, data: Any, offset: int) -> None:
        self._fence.check()
        self._file.write_full(data, offset)

    def found(self) -> None:
        if self._own:
            self._file.check()


# ------------------------------------------------------------------------------------------------------------ the work


class Share:
    """Makes units of a plan. ``wanted``: those that this call is to make, or to see finished."""

    def __init__(
        self, plan: Plan, joint: Joint, units: Sequence[Unit], wanted: Sequence[Unit], options: SharedOptions
    ) -> None:
        self.plan, self.joint, self._options, self.listener = plan, joint, options, options.listener
        self._units, self._wanted = units, [*wanted]
        self._tasks = plan.tasks
        self.inputs = self._opened_inputs(plan, options)
        self._executors = executor_of(plan, options.executor)
        self._modules = modules_of(plan.tasks, plan.layout.receipt.kind, plan.torch_needed)
        self.files: list[Output] = []
        self.sending = Sending(plan, joint, units)
        self._held = process.Gauge()
        self.made = self.read_bytes = self.written_bytes = self.left = self.kept_bytes = 0
        self.startup_bytes = self.peak_bytes = 0
        self.finished = False

    @staticmethod
    def _opened_inputs(plan: Plan, options: SharedOptions) -> InputFiles:
        return plan.budget.opened(plan.identities, options.polite)

    def make(self) -> None:
        """Makes units until all wanted ones have receipts."""
        try:
            while self._round():
                pass
        finally:
            self.inputs.close()
            self.sending.drop()
            self._close_files()

    def _close_files(self) -> None:
        for file in self.files:
            file.close()
        self.files = []

    def _round(self) -> bool:
        """Makes units under one name. Returns whether the lease was lost, so that another round is needed."""
        in_threads = self.plan.executor == "threads"
        with Claims(self.joint, self._options.lease_seconds, shared=not in_threads) as claims_:
            if not self.files and not self.joint.whole_files:
                self.files = [self.joint.open(file.name, file.size) for file in self.plan.layout.files]
            executor = self._executors(self.plan.budget.workers)
            try:
                self._make_all(executor, _Keeping(self, claims_))
            except LeaseLost:
                self.sending.drop()
                self._close_files()  # one of them may be the published output by now
                said = "this machine was stopped for longer than its lease; "
                if not self.joint.exists() or self.joint.published():
                    self.finished, self.left = True, 0
                    self.listener(Told("note", said + "others have finished the output"))
                    return False
                self.listener(Told("note", said + "it claims its units again"))
                return True
            finally:
                executor.close()
                self.startup_bytes = max(self.startup_bytes, executor.startup_bytes)
                self.peak_bytes = max(self.peak_bytes, executor.peak_bytes)
        return False

    def _make_all(self, executor: Executor, keeping: _Keeping) -> None:
        claims_ = keeping.claims
        with keeping:
            while True:
                done = {*claims.names_in(self.joint.home / claims.UNITS)}
                left = [unit for unit in self._wanted if unit.name not in done]
                if not left:
                    break
                free = _Free(left, claims_, keeping)
                began = keeping.begun
                for unit in free.units(alone=True):
                    self._make_alone(unit, executor, keeping)
                    if self.joint.whole_files:
                        keeping.settle()  # so that the buffers of one unit are held at a time
                self._make_together(free.units(alone=False), executor, keeping)
                keeping.settle()
                if keeping.begun == began and free.waiting:
                    time.sleep(min(self._options.lease_seconds / 20, 1.0))
        done = {*claims.names_in(self.joint.home / claims.UNITS)}
        self.left = sum(unit.name not in done for unit in self._units)

    def _make_together(self, units: Iterator[Unit], executor: Executor, keeping: _Keeping) -> None:
        """Makes units whose tensors are made each by one worker. A unit is claimed when a worker is free for it."""
        first = next(units, None)
        if first is None:
            return
        tasks = self._tasks

        def wanted() -> Iterator[Piece]:
            for unit in _chained(first, units):
                yield from keeping.begin(unit, tasks)

        job = self._job(keeping.claims.fence)
        with (
            lent(job, self.inputs, self.files),
            closing(
                executor.run(MergeWork(job), self._ahead(executor, batches(wanted(), job.budget.out_bytes)))
            ) as results,
        ):
            for several in results:
                for done in several:
                    self._finished(done.piece(tasks), done, keeping)

    def _ahead(self, executor: Executor, units: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
        """Lets remote inputs be fetched before they are read."""
        if not self.plan.budget.ahead_bytes or executor.elsewhere:
            return units
        from streammerge.running.announcing import announced  # here, because most inputs are local

        return announced(units, self.inputs)

    def _make_alone(self, unit: Unit, executor: Executor, keeping: _Keeping) -> None:
        """Makes a unit by all workers: long tensors with shared passes, or by way of temporary files."""
        for _ in keeping.begin(unit, self._tasks):
            pass
        tasks: Sequence[MergeTask] = self._tasks[unit.start : unit.stop]
        job, whole = self._job(keeping.claims.fence), self.joint.whole_files
        files = self.sending.open(unit) or self.files
        inputs = self._opened_inputs(self.plan, self._options)  # its own, so that temporary files are closed before they go
        temporary: list[Output] = []

        def create(size: int) -> Output:
            made = self.joint.temporary(f"{keeping.claims.name}.{unit.name}.{len(temporary)}", size)
            temporary.append(made)
            return made

        def told(tensor: str, record: PackedRecord) -> None:
            self.read_bytes += record.compressed_bytes
            self.listener(Spooled(tensor, record.nbytes))

        try:
            tasks = spooled_tasks(tasks, tasks, inputs, create, told)
            turning = Turning(job, tasks, lambda piece: True, create)
            met: dict[int, dict[str, int]] = {}
            for number, done in turning.make(executor, inputs):
                met[number] = done.nonfinite
                self.read_bytes += done.read_bytes
                self.listener(Spooled(tasks[number].out.name, tasks[number].read_bytes))
            passes = self._exchange(unit, tasks[0], keeping.claims) if unit.exchanges else None
            with (
                lent(job, inputs, files),
                closing(run_all(job, executor, turning.tasks, unit.holds, inputs, whole, passes)) as results,
            ):
                for done in results:
                    found = done.nonfinite | met.pop(done.number, {})
                    own = done._replace(number=unit.start + done.number, nonfinite=found)
                    self._finished(own.piece(self._tasks), own, keeping)
        finally:
            inputs.close()
            for file in temporary:
                file.close()
                self.joint.remove(file.location)

    def _exchange(self, unit: Unit, task: MergeTask, claims_: Claims) -> SharedPasses:
        """Returns the passes of a tensor of which other machines make other parts."""
        from streammerge.running.exchanging import Exchange  # here, because few tensors are so long

        parts = [other for other in self._units if other.start == unit.start and other.exchanges]
        return Exchange(claims_, unit.start, task, parts, unit)

    def _finished(self, piece: Piece, done: PieceDone, keeping: _Keeping) -> None:
        self._refuse_nonfinite(piece, done)
        self.read_bytes += done.read_bytes
        self.written_bytes += piece.nbytes
        self.listener(TaskDone(piece.task.out.name, piece.read_bytes, piece.nbytes, self._held.now()))
        keeping.add(piece, done)

    def _refuse_nonfinite(self, piece: Piece, done: PieceDone) -> None:
        found = {name: count for name, count in done.nonfinite.items() if name != AGREED}
        if found and not self.plan.recipe.allow_nonfinite:
            self.inputs.check_unchanged()  # an input that is overwritten may show as NaN
            sources, get = piece.task.sources, self.inputs.get
            counts = ", ".join(
                f"{count} in {printable(name)}{culprit(sources, name, get)}" for name, count in sorted(found.items())
            )
            raise VerifyError(
                f"the merge holds NaN or infinite values, so there is no output; save the plan with `allow_nonfinite=True` "
                f"to write it all the same: {printable(piece.task.out.name)}: {counts}"
            )

    def _job(self, fence: Fence) -> Job:
        plan, joint = self.plan, self.joint
        places = tuple(
            _JointPlace(joint.target(file.name), file.size, joint, file.name, fence) for file in plan.layout.files
        )
        return Job(
            new_key(),
            plan.budget,
            plan.identities,
            self._options.polite,
            plan.io == "mmap",
            plan.layout.receipt.kind,
            places,
            self._modules,
            home=joint.home,
        )


def _chained(first: Unit, others: Iterator[Unit]) -> Iterator[Unit]:
    yield first
    yield from others


class _Free:
    """Claims units that are left, one after the other. ``waiting``: whether others have some of them."""

    def __init__(self, left: Sequence[Unit], claims_: Claims, keeping: _Keeping) -> None:
        self._left, self._claims, self._keeping = left, claims_, keeping
        self._owners = claims_.owners()
        self.waiting = False

    def units(self, alone: bool) -> Iterator[Unit]:
        """Yields units of one kind. Those come first whose passes several machines share, since all of these begin with
        them."""
        for unit in sorted(self._left, key=lambda unit: not unit.exchanges):
            if unit.alone == alone and not self._keeping.has(unit):
                if self._take(unit):
                    yield unit
                else:
                    self.waiting = True

    def _take(self, unit: Unit) -> bool:
        before = self._owners.get(unit.name, [])
        if before and not self._claims.dead(before[-1]):
            return False
        return self._claims.take(unit.name, before) and not self._claims.is_finished(unit.name)


class _Keeping:
    """Syncs what is finished and writes receipts, on a thread of its own. ``begun``: how many units were begun."""

    def __init__(self, share: Share, claims_: Claims) -> None:
        self._share, self.claims = share, claims_
        self._making: dict[int, UnitInMaking] = {}
        self._of_task: dict[int, list[UnitInMaking]] = {}
        self._finished: list[UnitInMaking] = []
        self.begun = 0
        self._had: set[int] = set()
        self._wake, self._stop = threading.Condition(), False
        self._writing = threading.Lock()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="streammerge-receipts", daemon=True)

    def __enter__(self) -> _Keeping:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join()
        if error is None:
            self.settle()
        elif not isinstance(error, LeaseLost):
            self._try_last()

    def has(self, unit: Unit) -> bool:
        return unit.number in self._had

    def begin(self, unit: Unit, tasks: Sequence[MergeTask]) -> Iterator[Piece]:
        """Notes that a unit is made now, and yields its pieces."""
        made = UnitInMaking(unit, tasks)
        with self._wake:
            self.begun += 1
            self._had.add(unit.number)
            if not made.left:
                self._finished.append(made)
                return
            for number in range(unit.start, unit.stop):
                self._of_task.setdefault(number, []).append(made)
        yield from unit.pieces(tasks)

    def add(self, piece: Piece, done: PieceDone) -> None:
        if self._failed is not None:
            raise self._failed
        with self._wake:
            several = self._of_task[piece.number]
            made = next(each for each in several if each.unit.holds(piece))
            self._share.sending.made(made.unit, piece, done)
            if made.add(piece, done):
                for number in range(made.unit.start, made.unit.stop):
                    self._of_task[number].remove(made)
                self._finished.append(made)

    def settle(self) -> None:
        """Writes the receipts of all finished units."""
        self._write()
        if self._failed is not None:
            raise self._failed

    def _try_last(self) -> None:
        """Writes the receipts of what was finished before an error. Nothing is lost but time if that fails too."""
        if self._failed is None:
            with suppress(OSError, StreammergeError):
                self._write()

    def _work(self) -> None:
        while True:
            with self._wake:
                if self._wake.wait_for(lambda: self._stop, _SYNC_SECONDS):
                    return
            try:
                self._write()
            except BaseException as error:  # noqa: BLE001 - carried to the thread that makes units
                self._failed = error
                return

    def _write(self) -> None:
        with self._writing:
            with self._wake:
                ready, self._finished = self._finished, []
            if not ready:
                return
            share, whole = self._share, self._share.joint.whole_files
            for number in sorted({file for made in ready for file, _, _ in made.places if not whole}):
                share.files[number].sync()
            receipts = [(made, made.receipt(share.plan)) for made in ready]
            for made, receipt in receipts:
                receipt.sent = share.sending.send(made.unit, receipt.sums, made.places)
            share.inputs.check_unchanged()
            for made, receipt in receipts:
                self.claims.fence.check()
                if receipt.is_long:
                    claims.keep_sums(share.joint.home, made.unit.name, receipt.sums.tobytes())
                first = claims.finish(share.joint.home, made.unit.name, receipt.data(), replaces=not whole)
                share.made += first
                share.kept_bytes += receipt.nbytes * first
                share.sending.end(made.unit, first)


def make_units(
    plan: Plan,
    joint: Joint,
    units: Sequence[Unit],
    wanted: Sequence[Unit],
    options: SharedOptions,
    resident_before: int,
) -> ShareResult:
    """Makes the ``wanted`` units of a plan, except those that other machines have made. Raises the errors of a merge.

    Returns when all wanted units have receipts. ``resident_before``: resident bytes before the inputs' headers were read.
    """
    headers = max(process.resident_bytes() - resident_before, 0)
    tell_and_prepare(plan, options.listener)
    startup, began = process.resident_bytes() - headers, time.perf_counter()
    part = sum(unit.cost for unit in wanted) / max(sum(unit.cost for unit in units), 1)
    asked = (int(plan.read_bytes * part), int(plan.write_bytes * part))
    options.listener(RunStarted(*asked, plan.memory_bytes, len(plan.tasks)))
    files = len(plan.identities) + len(plan.layout.files)
    with space_checked(joint.out, plan.disk_bytes), descriptors.room_for(files, plan.budget.workers):
        alone = one_torch_thread() if plan.torch_needed else nullcontext()
        with faults.survived(), process.collector_spared(), alone:
            share = Share(plan, joint, units, wanted, options)
            try:
                share.make()
            except BaseException:
                if share.kept_bytes:
                    options.listener(Suspended(share.kept_bytes, int(plan.layout.size * part)))
                raise
    seconds = time.perf_counter() - began
    options.listener(RunFinished(seconds))
    return ShareResult(
        joint.out,
        share.made,
        len(wanted),
        share.left,
        share.read_bytes,
        share.written_bytes,
        seconds,
        max(process.peak_resident_bytes() - startup, 0) + share.peak_bytes,
        startup + share.startup_bytes,
        plan.memory_bytes,
        tuple(plan.notes),
        tuple(plan.warnings),
        share.finished,
    )
