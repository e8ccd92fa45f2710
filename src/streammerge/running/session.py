"""Makes an output in its staging folder. Takes over pieces of an earlier run, makes the missing pieces, writes headers and
side files, and syncs. Makes a file again, once, if its sync failed."""

from __future__ import annotations

import contextlib
import errno
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, SpaceError, UncheckedError, VerifyError, listed, printable
from streammerge.events import Hashed, Listener, Resumed, Spooled, Syncing, TaskDone, Told, quiet
from streammerge.kernels.agreed import AGREED
from streammerge.planning.digest import can_be_resumed, differences, plan_parts
from streammerge.planning.plain import needs_no_torch
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import ITSELF, written_like
from streammerge.planning.tasks import Piece, PieceDone, alike, pieces
from streammerge.running import process
from streammerge.running.choosing import executor_of
from streammerge.running.engine import modules_of, run_all, run_long
from streammerge.running.executors.base import Executor, Executors
from streammerge.running.finished import FinishedPieces, MeasuredTasks, other_sum, tensor_sums
from streammerge.running.job import Job, OutputPlace, lent, new_key
from streammerge.running.nonfinite import culprit
from streammerge.running.readback import check_structure
from streammerge.stores.base import Location, Output, Staging
from streammerge.stores.checksums import Checksum
from streammerge.stores.digests import COPY_BYTES
from streammerge.stores.journal import Finished, FinishedTable, Journal
from streammerge.tensors.spec import ranges
from streammerge.units import decimal_bytes

if TYPE_CHECKING:
    from streammerge.running.sealing import Sealing
    from streammerge.sources.deflated import PackedRecord

_SHOWN = 10
"""Tensors that are named where NaN or infinity is found."""


@dataclass(frozen=True, slots=True, eq=False)
class RunOptions:
    """The options of a run. None of them changes a byte of the output.

    ``overwrite``: replaces a finished output. ``resume``: continues an interrupted run of the same plan, and keeps the
    pieces when this run is interrupted. ``polite``: gives the inputs' page cache back behind the cursor. ``executor``: the
    same value that :func:`choose_executor` got for the plan. ``measures``: measures how far the output lies from its
    inputs, see :mod:`streammerge.running.measuring`.
    """

    overwrite: bool = False
    resume: bool = True
    polite: bool = False
    listener: Listener = quiet
    executor: str | Executors = "auto"
    measures: bool = False


def needs_torch(plan: Plan, measures: bool = False) -> bool:
    """Whether a run of the plan loads torch first. ``measures``: see :class:`RunOptions`."""
    return plan.torch_needed and (measures or not needs_no_torch(plan.tasks))


class Run:
    """Makes one output. ``journal``: the pieces that would be kept if the run ended now.

    ``untouched``: whether the files of an earlier run are still unchanged.
    """

    def __init__(self, plan: Plan, staging: Staging, options: RunOptions) -> None:
        self.plan, self.staging, self.listener = plan, staging, options.listener
        self.resume = options.resume and can_be_resumed(plan)
        self._discard = not options.resume
        self.untouched = True
        self.read_bytes = 0
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._tasks = plan.tasks
        self._turned_nonfinite: dict[int, dict[str, int]] = {}
        self._turned_measured: dict[int, bytes] = {}
        self.receipt_digest = ""
        self._done = FinishedPieces(plan.tasks, [file.name for file in plan.layout.files])
        self._inputs = plan.budget.opened(plan.identities, options.polite)
        self._outputs: list[Output] = []
        self._kind: Checksum = plan.layout.receipt.kind
        self._polite, self._executors = options.polite, executor_of(plan, options.executor)
        clients = {module for path in plan.identities for module in path.store.modules}
        self.torch_needed = needs_torch(plan, options.measures)
        plain = ("numpy", "streammerge.running.plain") if plan.torch_needed and not self.torch_needed else ()
        self._modules = (*modules_of(plan.tasks, self._kind, self.torch_needed), *plain, *sorted(clients))
        self._used: Executor | None = None
        self._sealing: Sealing | None = None
        staging.as_folder = plan.layout.as_folder
        self.startup_bytes = self.peak_bytes = 0
        self.hashes: dict[str, str] = {}
        self._measures = options.measures
        self.related = False
        """Whether it is known already how the inputs are related, as when several outputs are made of them."""
        self._begun = False
        self.journal = Journal(staging.journal_file, plan_parts(plan), lambda: staging.outputs, self.resume)

    def make(self) -> None:
        """Makes the whole output and waits until it is on the disk. Raises the errors of :func:`execute`."""
        try:
            self.prepare()
            self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers and closes the inputs."""
        self._end_workers()
        self._inputs.close()

    @property
    def _executor(self) -> Executor:
        if self._used is None:
            self._used = self._executors(self.plan.budget.workers)
        return self._used

    def _end_workers(self) -> None:
        """Ends the workers, because their mapped files and buffers are not needed now. Updates ``startup_bytes``, and
        ``peak_bytes``, the memory of worker processes above it."""
        used, self._used = self._used, None
        if used is not None:
            used.close()
            self.startup_bytes = max(self.startup_bytes, used.startup_bytes)
            self.peak_bytes = max(self.peak_bytes, used.peak_bytes)

    def prepare(self) -> None:
        """Opens the output's files, and takes over what an earlier run of this plan has left."""
        self._take_up()
        self.hashes = self.hashes or self._hashes()

    def finish(self) -> None:
        """Makes what is missing, and waits until the output is on the disk."""
        self._spool()
        self._turn()
        if not self.related:
            self._warn_of_strangers()
        broken = self._attempt(self.hashes)
        if broken:
            self._forget(broken)
            again = self._attempt(self.hashes)
            if again:
                raise OSError(errno.EIO, f"the disk failed to store {listed(sorted(again))}, twice; nothing was written")
            self.warnings.append(f"the disk failed to store {listed(sorted(broken))} at first; it was written again")
        self._check()
        if self._in_parts:
            self.journal.write_down(self._done)
        self._tell_nonfinite()

    def _warn_of_strangers(self) -> None:
        """Warns of inputs that seem to come from another training."""
        if len(self.plan.recipe.entries) > 1:
            from streammerge.running.relatives import strangers  # here, because a single model has no strangers

            self.warnings += strangers(self.plan.tasks, self._inputs, self.plan.owners)
            for warning in self.warnings:
                self.listener(Told("warning", warning))

    def _tell_nonfinite(self) -> None:
        self.warnings += [f"NaN or infinite values: {row}" for row in self._nonfinite()]
        self.notes += [f"NaN or infinite values that every input has are kept: {row}" for row in self._agreed()]

    def _attempt(self, hashes: dict[str, str]) -> set[str]:
        """Makes what is missing, and syncs. Returns the names of the files whose sync failed."""
        if not self._begun:
            self.journal.begin(self._done)
        self._begun = False
        self._make_pieces()
        self._end_workers()
        self._refuse_nonfinite()
        self._write_around(hashes)
        self._inputs.check_unchanged()
        self._inputs.release()
        self.listener(Syncing())
        return self.journal.finish()

    def _check(self) -> None:
        """Checks the output, which is already on the disk, a last time. Keeps all of it if the check itself fails."""
        try:
            check_structure(self._written, self.plan.layout)
        except UncheckedError as error:
            with contextlib.suppress(OSError, SpaceError):  # the files stay even if the journal is incomplete
                self.journal.begin(self._done)
            raise UncheckedError(
                f"the last check of {printable(self.staging.out)} could not be made ({error}); {self._where_it_is_kept()}"
            ) from error

    def _seal(self) -> None:
        """Gives outputs that are sent in parts what is known from the start."""
        if self._in_parts:
            from streammerge.running.sealing import Sealing  # here, because most outputs are local

            self._sealing = Sealing(self.plan.layout, self._tasks, self._outputs, self._done)

    @property
    def _in_parts(self) -> bool:
        return any(file.in_parts for file in self._outputs)

    @property
    def _written(self) -> Location:
        """The folder of what was written. What was sent in parts cannot be read yet: then the same bytes as planned."""
        if not self._in_parts:
            return self.staging.content
        from streammerge.planning.unwritten import Unwritten  # here, because most outputs are local

        planned = Unwritten("output")
        planned.add(self.plan.layout)
        return planned.folder

    def _where_it_is_kept(self) -> str:
        if self.resume:
            return f"what was made is kept in {printable(self.staging.home)}, and the same command goes on from there"
        layout, made = self.plan.layout, self.staging.content
        place = made if layout.as_folder else made / layout.files[0].name
        return f"what was made is kept as {printable(place)}; move it away, because the next run would overwrite it"

    def _forget(self, broken: set[str]) -> None:
        """Creates the files again whose sync failed, because after that error no byte of them can be trusted."""
        self._done.forget(broken)
        for number, file in enumerate(self.plan.layout.files):
            if file.name in broken:
                self._outputs[number] = self.staging.create(file.name, file.size)
        self._seal()

    # ----------------------------------------------------------------------------------------------------- earlier run

    def _take_up(self) -> None:
        """Opens the output's files. Takes over the pieces of an earlier run of this plan whose checksums are right."""
        vouched = self._earlier_pieces()
        self.untouched = False
        if vouched is None:
            self.staging.clear()
        else:
            self.journal.take_over(vouched)
        for file in self.plan.layout.files:
            late = self.plan.layout.as_folder and not file.offsets
            self._outputs.append(self.staging.create(file.name, file.size, vouched is not None, late))
        kept = {f.name for f, output in zip(self.plan.layout.files, self._outputs, strict=True) if output.kept}
        claims = FinishedPieces(self._tasks, [file.name for file in self.plan.layout.files])
        for each in vouched or ():
            if each.file in kept and claims.fits(each):
                claims.add(each)
        del vouched  # before the checks, because it may be large
        self._seal()
        if not claims:
            return
        saved_bytes = self._compare(claims)
        kept_bytes = self._done.nbytes
        self.listener(Resumed(kept_bytes, saved_bytes))
        there_of_all = f"{decimal_bytes(kept_bytes)} of {decimal_bytes(self.plan.layout.size)}"
        note = f"continued an interrupted run: {there_of_all} were there"
        self.notes.append(note)
        self.listener(Told("note", note))

    def _compare(self, claims: FinishedPieces) -> int:
        """Takes over the claimed pieces whose checksums are right. Returns the bytes that need not be read for them."""
        from streammerge.running.reading import ChecksumWork, neighbours  # here, because most runs continue none

        saved_bytes = 0
        for key, file, place in claims.places():
            if self._outputs[file].in_parts and self._outputs[file].holds(*place):  # the store has compared it
                self._done.add(claims.get(key))
                saved_bytes += self._done.piece(key).read_bytes
        parts = (
            (key, self._outputs[file].location, *place)
            for key, file, place in claims.places()
            if not self._outputs[file].in_parts
        )
        with closing(self._executor.run(ChecksumWork(self._kind, self._modules), neighbours(parts))) as results:
            for keys, sums in results:
                for key, value in zip(keys, sums, strict=True):
                    claim = claims.get(key)
                    if claim.checksum == value:
                        self._done.add(claim)
                        saved_bytes += self._done.piece(key).read_bytes
        return saved_bytes

    def _earlier_pieces(self) -> FinishedTable | None:
        """Returns the pieces of an interrupted run of the same plan, None to start from the beginning.

        Raises RecipeError when there are pieces of another plan, unless the caller asked to discard them.
        """
        if self._discard or (earlier := self.journal.earlier()) is None:
            return None
        if earlier.plan is None:
            self.notes.append("an interrupted run was not continued: its journal is damaged")
            return None
        other = differences(earlier.plan, self.journal.plan)
        if not other:
            return earlier.pieces if self.resume else None
        if not earlier.count:
            return None
        out = printable(self.staging.out)
        left = decimal_bytes(earlier.nbytes) if earlier.pieces else f"{earlier.count} finished pieces"
        raise RecipeError(
            f"an interrupted run into {out} left {left}, and this run differs from it: {other}; "
            "repeat that run to continue it, discard what it left with `resume=False`, or choose another output"
        )

    # ------------------------------------------------------------------------------------------------------- inputs

    def _hashes(self) -> dict[str, str]:
        """Returns the SHA-256 of each input file if the receipt has room for it."""
        wanted = {
            name: self.plan.input_files[name][0] for name, i in self.plan.layout.receipt.inputs.items() if "sha256" in i
        }
        made: dict[str, str] = {}
        if not wanted:
            return made
        from streammerge.running.reading import HashWork, largest_first  # here, because most receipts have no hashes

        with closing(self._executor.run(HashWork(self._modules), largest_first(wanted.items()))) as results:
            for name, digest in results:
                made[name] = digest
                self.listener(Hashed(name, self.plan.identities[wanted[name]].size))
        return made

    def _spool(self) -> None:
        """Unpacks the packed records that are still needed, and lets the tasks read the unpacked bytes."""
        if not self.plan.spooled:
            return
        from streammerge.running.spooling import spooled_tasks

        tasks = enumerate(self._tasks)
        missing = [task for number, task in tasks if any(map(self._wanted, pieces(task, number)))]

        def told(tensor: str, record: PackedRecord) -> None:
            self.read_bytes += record.compressed_bytes
            self.listener(Spooled(tensor, record.nbytes))

        def create(size: int) -> Output:
            return self.staging.temporary("spooled", size)

        self._tasks = spooled_tasks(self._tasks, missing, self._inputs, create, told)

    def _turn(self) -> None:
        """Makes tensors that are made turned, and lets their tasks copy them."""
        if not any(task.to_turn for task, _ in alike(self._tasks)):
            return
        from streammerge.running.turning import Turning

        turning = Turning(self._job(), self._tasks, self._wanted, lambda size: self.staging.temporary("turned", size))
        for number, done in turning.make(self._executor, self._inputs):
            task = self._tasks[number]
            self._turned_nonfinite[number] = done.nonfinite
            self.read_bytes += done.read_bytes
            self.listener(Spooled(task.out.name, task.read_bytes))
        self._tasks, self._turned_measured = turning.tasks, turning.measured

    # ------------------------------------------------------------------------------------------------------- output

    def _wanted(self, piece: Piece) -> bool:
        return piece.key not in self._done

    def begin(self) -> list[Output]:
        """Lets pieces be made elsewhere, before :meth:`finish`. Returns the open files that they are written to."""
        if not self._begun:
            self.journal.begin(self._done)
        self._begun = True
        return self._outputs

    def lacks(self, key: tuple[int, int]) -> bool:
        """Whether the piece that begins there is still to be made. ``key``: see :attr:`Piece.key`."""
        return key not in self._done

    def take(self, piece: Piece, done: PieceDone) -> Finished:
        """Writes down a piece that was made."""
        self._outputs[piece.task.file].synced = False  # another process may have written to it
        finished = self._finished(piece, done)
        self._done.add(finished)
        self.journal.add(finished)
        if self._sealing is not None:
            self._sealing.made(piece.task.file)
        if finished.nonfinite and finished.nonfinite.keys() - {AGREED}:
            self._refuse_nonfinite()  # now, and not after hours of work that would then be dropped
        return finished

    def make_long(self, number: int) -> None:
        """Makes one long tensor (:attr:`MergeTask.spread`) before :meth:`finish`. Ends the workers then, so that another
        run can have their memory."""
        job = self._job()
        with (
            lent(job, self._inputs, self._outputs),
            closing(run_long(job, self._executor, self._tasks, number, self._wanted, self._inputs)) as results,
        ):
            self._take_all(results)
        self._inputs.halted_by(lambda: None)
        self._end_workers()

    def _make_pieces(self) -> None:
        # Closes the generator explicitly, because after Ctrl-C no worker may outlive the files that it writes.
        job = self._job()
        with (
            lent(job, self._inputs, self._outputs),
            closing(run_all(job, self._executor, self._tasks, self._wanted, self._inputs, self._in_parts)) as results,
        ):
            self._take_all(results)
        self._inputs.halted_by(lambda: None)  # the workers have ended, and side files are still to be read

    def _take_all(self, results: Iterable[PieceDone]) -> None:
        held = process.Gauge()
        for done in results:
            piece = done.piece(self._tasks)
            finished = self.take(piece, done)
            self.read_bytes += done.read_bytes
            self.listener(TaskDone(piece.task.out.name, piece.read_bytes, finished.nbytes, held.now()))

    def _job(self) -> Job:
        plan = self.plan
        places = tuple(OutputPlace(file.location, file.size) for file in self._outputs)
        mapped = plan.io == "mmap"
        return Job(
            new_key(),
            plan.budget,
            plan.identities,
            self._polite,
            mapped,
            self._kind,
            places,
            self._modules,
            self._measures,
            self.staging.home,
        )

    def _finished(self, piece: Piece, done: PieceDone) -> Finished:
        file = self.plan.layout.files[piece.task.file].name
        found = done.nonfinite if piece.start else done.nonfinite | self._turned_nonfinite.get(piece.number, {})
        measured = done.measured if piece.start else done.measured or self._turned_measured.get(piece.number, b"")
        return Finished(*piece.key, file, piece.offset, piece.nbytes, done.checksum, found, measured.hex())

    @property
    def measured(self) -> MeasuredTasks:
        """What was measured of the pieces of each task, by this run and by the one that it continues."""
        return self._done.measured

    @property
    def nonfinite(self) -> dict[int, int]:
        """How many NaN and infinite numbers each task has that has any, those included that every input has."""
        found: dict[int, int] = {}
        for number, counts in self._done.nonfinite():
            found[number] = found.get(number, 0) + sum(counts.values())
        return found

    def _nonfinite(self) -> list[str]:
        """Returns the places of NaN and infinity, one line for each tensor."""
        found: dict[str, dict[str, int]] = {}
        traced: dict[tuple[str, str], str] = {}
        for task, nonfinite in self._done.nonfinite():
            for source, count in nonfinite.items():
                if source == AGREED:
                    continue
                counts = found.setdefault(self._tasks[task].out.name, {})
                counts[source] = counts.get(source, 0) + count
                place = self._tasks[task].out.name, source
                if len(traced) < _SHOWN and place not in traced:
                    traced[place] = culprit(self._tasks[task].sources, source, self._inputs.get)
        return [
            f"{printable(name)}: "
            + ", ".join(
                f"{count} in {printable(source)}{traced.get((name, source), '')}"
                for source, count in sorted(counts.items())
            )
            for name, counts in sorted(found.items())
        ]

    def _agreed(self) -> list[str]:
        """Returns which tensors have NaN or infinity that every input has, in one line at most."""
        found: dict[str, int] = {}
        for task, nonfinite in self._done.nonfinite():
            if count := nonfinite.get(AGREED):
                name = self._tasks[task].out.name
                found[name] = found.get(name, 0) + count
        return [listed([f"{name} ({count})" for name, count in sorted(found.items())])] if found else []

    def _refuse_nonfinite(self) -> None:
        rows = [] if self.plan.recipe.allow_nonfinite else self._nonfinite()
        if rows:
            self._inputs.check_unchanged()  # an input that is overwritten may show as NaN
            more = f"\n  and {len(rows) - _SHOWN} more tensors" if len(rows) > _SHOWN else ""
            raise VerifyError(
                "the merge holds NaN or infinite values, so nothing was written; "
                "pass `allow_nonfinite=True` to write it all the same:\n  " + "\n  ".join(rows[:_SHOWN]) + more
            )

    def _write_around(self, hashes: dict[str, str]) -> None:
        """Writes headers, indexes, side files, and the receipt with the checksums of all of them."""
        layout = self.plan.layout
        single = not layout.as_folder
        starts: dict[str, dict[int, int]] = {}
        sums: dict[str, Sequence[int]] = {}
        for file, (name, parts) in zip(layout.files, self._done.by_file(), strict=True):
            own = tensor_sums(file, parts, self._kind)
            sums[ITSELF if single else name] = array("I", [*own.values(), other_sum(file, own, self._kind)])
            starts[name] = own if file.seal is not None else {}
        sums |= {name: [self._copy_side_file(source, name)] for source, name in layout.side_files}
        receipt = layout.receipt.filled(sums, hashes)
        self.receipt_digest = receipt.digest
        for file, output in zip(layout.files, self._outputs, strict=True):
            final = written_like(receipt, file.receipt) if file.receipt else b""
            for literal in file.around(starts[file.name], final):
                output.write_full(literal.data, literal.offset)

    def _copy_side_file(self, source: Location, name: str) -> int:
        value: int = 0
        file = self._inputs.get(source)
        copied = self.staging.copies(source, self.plan.identities[source], name)
        output = None if copied else self.staging.create(name, file.size)
        for start, stop in ranges(file.size, COPY_BYTES):
            data = bytearray(stop - start)
            file.read_into(memoryview(data), start)
            if output is not None:
                output.write_full(data, start)
            value = self._kind.update(data, value)
        return value
