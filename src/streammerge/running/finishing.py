"""Publishes an output that several machines have made: checks that all units are there, writes headers and side files,
syncs, and renames."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from streammerge.errors import LockedError, StreammergeError, UnfinishedError, listed, printable
from streammerge.events import Published, RunFinished, RunStarted, Syncing
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import place_of
from streammerge.planning.units import Unit, sums_of
from streammerge.running import process
from streammerge.running.execution import Result, refuse_input_as_output, refuse_to_lose_files, tell_and_prepare
from streammerge.running.finished import Part
from streammerge.running.readback import check_structure, receipt_of
from streammerge.running.session import Run, RunOptions
from streammerge.running.unit_receipts import UnitReceipt
from streammerge.stores import claims, descriptors
from streammerge.stores.base import Joint, Location, Sent, Staging
from streammerge.stores.claims import Claims
from streammerge.stores.space import space_checked

_FINISH = "finish"


class _AllUnits:
    """What the receipts of all units say. It stands in the place of :class:`FinishedPieces`: every piece is there."""

    def __init__(self, plan: Plan, units: Sequence[Unit], receipts: dict[str, UnitReceipt]) -> None:
        self._files = [file.name for file in plan.layout.files]
        self._parts: list[list[Part]] = [[] for _ in self._files]
        self._nonfinite: list[tuple[int, dict[str, int]]] = []
        self.unlisted = 0
        self.sent: dict[str, list[Sent]] = {}
        for unit in units:
            receipt = receipts[unit.name]
            places = [*sums_of(unit, plan.tasks)]
            for (file, offset, nbytes), value in zip(places, receipt.sums, strict=True):
                self._parts[file].append((offset, nbytes, value))
            if receipt.sent:
                start = min((offset for _, offset, _ in places), default=0)
                stop = max((offset + nbytes for _, offset, nbytes in places), default=0)
                name = self._files[place_of(plan.tasks, unit.start)[0]]
                self.sent.setdefault(name, []).append(Sent(start, stop, receipt.sent))
            self._nonfinite += receipt.nonfinite.items()
            self.unlisted += receipt.more

    def __contains__(self, key: object) -> bool:
        return True

    def by_file(self) -> Iterator[tuple[str, list[Part]]]:
        return ((name, sorted(parts)) for name, parts in zip(self._files, self._parts, strict=True))

    def nonfinite(self) -> Iterator[tuple[int, dict[str, int]]]:
        return iter(self._nonfinite)


class _Finishing(Run):
    """Makes what is around the tensors when all units are there."""

    def __init__(self, plan: Plan, staging: Staging, there: _AllUnits, options: RunOptions) -> None:
        super().__init__(plan, staging, options)
        self._there = there

    def prepare(self) -> None:
        """Opens the output's files, in which all tensors are."""
        for file in self.plan.layout.files:
            late = self.plan.layout.as_folder and not file.offsets
            self._outputs.append(self.staging.create(file.name, file.size, keep=True, late=late))
        self._done = self._there  # type: ignore[assignment]
        self.hashes = self._hashes()

    def finish(self) -> None:
        """Makes what is around the tensors, and waits until it is on the disk."""
        self._warn_of_strangers()
        self._refuse_nonfinite()
        self._write_around(self.hashes)
        self._inputs.check_unchanged()
        self._inputs.release()
        self.listener(Syncing())
        for output in self.staging.outputs.values():
            output.sync()
        check_structure(self._written, self.plan.layout)
        self._tell_nonfinite()
        if self._there.unlisted:
            self.warnings.append(f"{self._there.unlisted} more NaN or infinite values are not listed by tensor")


def finish_units(
    plan: Plan, joint: Joint, units: Sequence[Unit], lease_seconds: float, options: RunOptions, resident_before: int
) -> Result:
    """Publishes the output if every unit has a receipt. Nothing is lost on an error: it can be called again.

    Raises UnfinishedError if units are missing, LockedError if another machine finishes the output, and the errors of a
    merge.
    """
    out, headers = joint.out, max(process.resident_bytes() - resident_before, 0)
    if joint.published() or was_finished(plan, out):
        joint.clear()
        options.listener(Published())
        return _result(plan, out, time.perf_counter(), resident_before)
    refuse_input_as_output(out, plan)
    refuse_to_lose_files(out, plan)
    out.check_writable(options.overwrite)
    there = _AllUnits(plan, units, _receipts(plan, joint, units, lease_seconds))
    tell_and_prepare(plan, options.listener, computes=False)
    startup, began = process.resident_bytes() - headers, time.perf_counter()
    options.listener(RunStarted(0, plan.write_bytes, plan.memory_bytes, len(plan.tasks)))
    files = len(plan.identities) + len(plan.layout.files) + len(plan.layout.side_files)
    with (
        Claims(joint, lease_seconds) as claims_,
        space_checked(out, plan.disk_bytes),
        descriptors.room_for(files, plan.budget.workers),
    ):
        _claim(claims_, out)
        staging = joint.stage(options.overwrite, there.sent)
        keep = True
        try:
            made = _Finishing(plan, staging, there, options)
            made.make()
            refuse_to_lose_files(out, plan)
            claims_.fence.check()
            staging.commit(plan.layout.as_folder)
            keep = False
        finally:
            if keep and staging.published:
                keep = False
            staging.abort(keep)
    joint.clear()  # once more: this machine has shown that it lives until now
    options.listener(Published())
    options.listener(RunFinished(time.perf_counter() - began))
    return _result(plan, out, began, startup, made)


def _result(plan: Plan, out: Location, began: float, startup: int, made: Run | None = None) -> Result:
    return Result(
        out,
        made.read_bytes if made else 0,
        plan.write_bytes,
        time.perf_counter() - began,
        max(process.peak_resident_bytes() - startup, 0) + (made.peak_bytes if made else 0),
        startup + (made.startup_bytes if made else 0),
        plan.memory_bytes,
        plan,
        (*plan.notes, *(made.notes if made else ()), *(made.staging.notes if made else ())),
        (*plan.warnings, *(made.warnings if made else ())),
    )


def _claim(claims_: Claims, out: Location) -> None:
    """Makes this machine the one that publishes the output. Waits to see whether another one that began is alive."""
    before = claims_.owners().get(_FINISH, [])
    if before and not claims_.wait_until_dead(before[-1]):
        raise LockedError(f"{printable(out)} is being finished by {claims_.describe(before[-1])}; wait for it")
    if not claims_.take(_FINISH, before):
        raise LockedError(f"{printable(out)} is being finished by another machine; wait for it")


def _receipts(plan: Plan, joint: Joint, units: Sequence[Unit], lease_seconds: float) -> dict[str, UnitReceipt]:
    """Returns the receipt of each unit. Raises UnfinishedError if some are missing or damaged."""
    found: dict[str, UnitReceipt] = {}
    counts = {unit.name: sum(1 for _ in sums_of(unit, plan.tasks)) for unit in units}
    for name, data in claims.finished(joint.home):
        sums = partial(claims.kept_sums, joint.home, name)
        receipt = UnitReceipt.read(data, counts[name], sums) if name in counts else None
        if receipt is not None:
            found[name] = receipt
    missing = [unit.number for unit in units if unit.name not in found]
    if missing:
        raise UnfinishedError(_missing(missing, len(units), joint, lease_seconds), tuple(missing))
    return found


def _missing(missing: list[int], count: int, joint: Joint, lease_seconds: float) -> str:
    """Returns which units are missing, and who has claimed one of them."""
    said = f"{len(missing)} of {count} units have no receipt yet: {spans(missing)}"
    claims_ = Claims(joint, lease_seconds)
    owners = claims_.owners()
    claimed = [owners[str(number)][-1] for number in missing if str(number) in owners]
    alive = next((claim for claim in claimed if not claims_.dead(claim)), None)
    return said if alive is None else f"{said} (unit {alive.partition('.')[0]} was claimed by {claims_.describe(alive)})"


def spans(numbers: Sequence[int], most: int = 8) -> str:
    """Returns ``1, 4 to 6, 9`` for numbers in their order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return listed([str(a) if a == b else f"{a} to {b}" for a, b in runs], most)


def was_finished(plan: Plan, out: Location) -> bool:
    """Whether the output is there, and was made by this plan."""
    try:
        return out.exists() and receipt_of(out).blank() == plan.layout.receipt.blank()
    except StreammergeError:
        return False
