"""Makes the outputs of many points, in as few reads of the inputs as the memory allows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from streammerge.errors import BudgetError, RecipeError, StreammergeError, printable
from streammerge.events import Event, Listener, Preparing, RunFinished, RunStarted, Suspended, TaskDone, Told
from streammerge.planning.plan import Plan
from streammerge.requests.merging import Request
from streammerge.running import process
from streammerge.running.execution import publish, refuse_input_as_output, refuse_to_lose_files, started
from streammerge.running.readback import receipt_of
from streammerge.running.session import Run, RunOptions
from streammerge.running.together import Together, bookkeeping_bytes
from streammerge.running.workspace import prepare_torch
from streammerge.stores import descriptors, faults
from streammerge.stores.space import space_checked
from streammerge.sweeps.points import Point
from streammerge.sweeps.results import Made
from streammerge.tensors.threads import one_torch_thread
from streammerge.units import decimal_bytes, parse_bytes


@dataclass(slots=True)
class Tally:
    """What all runs of a sweep have read and written, the memory, and what was said."""

    reads: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0
    startup_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Maker:
    """Makes outputs of points.

    ``given``: the arguments that all merges share. ``inputs``: of all points. ``place``: point -> the name of its output.
    ``listener``: is told of all runs as of one.
    """

    given: Mapping[str, Any]
    inputs: Sequence[Any]
    place: Callable[[Point], str]
    options: RunOptions
    tally: Tally = field(default_factory=Tally)

    def plan_of(self, point: Point, memory: object = None) -> tuple[Request, Plan]:
        """Returns the plan of one merge. Raises the errors of :func:`streammerge.plan`."""
        inputs = list(self.inputs if point.inputs is None else point.inputs)
        recipe = self.given.get("recipe")
        asked = {**self.given, "inputs": inputs, "out": self.place(point), "recipe": recipe}
        asked |= point.arguments if recipe is None else {"weights": None, "parameters": None}
        if memory is not None:
            asked["memory"] = memory
        request = Request.of(asked)
        plan = (request if recipe is None else replace(request, vary=point.varied)).plan()
        return request, plan

    def make(self, points: Sequence[Point], earlier: Mapping[str, Made], done: Callable[[list[Made]], None]) -> list[Made]:
        """Makes the outputs that are not there. ``earlier``: what an earlier run has made. ``done`` is called with what is
        there whenever outputs were published. Raises the errors of :func:`streammerge.merge`."""
        made: list[Made] = []
        rest = list(points)
        while rest:
            group, outputs, rest = self._group(rest, earlier)
            made += outputs
            if group:
                self._run(group)
            done(made)
        return made

    def _group(self, points: Sequence[Point], earlier: Mapping[str, Made]) -> tuple[list[Plan], list[Made], list[Point]]:
        """Returns plans that one read makes, the outputs of the points that were looked at, and the other points."""
        before, plans, outputs = process.resident_bytes(), list[Plan](), list[Made]()
        memory_bytes = parse_bytes(self.given.get("memory", "512MiB"))
        most, memory = len(points), None
        for number, point in enumerate(points):
            if len(plans) == most:
                return plans, outputs, list(points[number:])
            request, plan = self.plan_of(point, memory)
            if request.out is None:
                raise RecipeError("a sweep needs a folder for its outputs; pass `out`")
            output = Made(point.name, point.settings, str(request.out), identity_of(plan))
            known = earlier.get(point.name)
            if known is not None and known.identity == output.identity:
                output.score = known.score
            outputs.append(output)
            if (
                known is not None
                and known.identity == output.identity
                and known.state == "removed"
                and known.score is not None
            ):
                output.state = "removed"
                continue
            if self._is_there(plan, output):
                output.state = "there"
                continue
            if not plans and len(points) > 1:
                beside = bookkeeping_bytes(plan)
                most = max(min(most, 1 + memory_bytes // 4 // max(beside, 1)), 1)
                memory = memory_bytes - (most - 1) * beside
                plan = self.plan_of(point, memory)[1] if most > 1 else plan
            plans.append(plan)
        fitting = self._fitting(plans)
        if fitting < len(plans):
            wanted = {str(plan.out) for plan in plans[:fitting]} | {each.out for each in outputs if each.state != "made"}
            late = {str(plan.out) for plan in plans[fitting:]}
            left = [p for p, each in zip(points, outputs, strict=False) if each.out in late]
            outputs = [each for each in outputs if each.out in wanted]
            return plans[:fitting], outputs, left + list(points[len(wanted) + len(late) :])
        self.tally.peak_bytes = max(self.tally.peak_bytes, process.resident_bytes() - before)
        return plans, outputs, list(points[len(outputs) :])

    def _fitting(self, plans: list[Plan]) -> int:
        """Returns how many of the plans the memory allows at once."""
        count = len(plans)
        while count > 1:
            try:
                together = Together(plans[:count])
                if together.tasks:
                    together.budget(self._memory_bytes, plans[0].budget.workers)
            except BudgetError:
                count = -(-count // 2)
            else:
                return count
        return count

    @property
    def _memory_bytes(self) -> int:
        return parse_bytes(self.given.get("memory", "512MiB"))

    def _is_there(self, plan: Plan, output: Made) -> bool:
        """Whether an earlier run has made this very output. Raises RecipeError for anything else in its place."""
        if plan.out is None or not plan.out.exists():
            return False
        try:
            receipt = receipt_of(plan.out)
        except StreammergeError:
            receipt = None
        if receipt is not None and _digest(receipt.blank().text()) == output.identity:
            return True
        if not self.options.overwrite:
            raise RecipeError(
                f"{printable(plan.out)} exists already, and is not what this sweep would make; pass `overwrite=True` to "
                "replace it, or choose another folder"
            )
        return False

    def _run(self, plans: Sequence[Plan]) -> None:
        """Makes and publishes these outputs together."""
        tell, options = self.options.listener, self.options
        for plan in plans:
            if plan.out is not None:
                refuse_input_as_output(plan.out, plan)
                refuse_to_lose_files(plan.out, plan)
        for kind, texts in (("note", [p.notes for p in plans]), ("warning", [p.warnings for p in plans])):
            for text in dict.fromkeys(text for each in texts for text in each):
                self._told(kind, text)
        computes = any(plan.torch_needed for plan in plans)
        if computes:
            tell(Preparing("torch"))
            with process.collector_paused():
                prepare_torch()
        process.reset_peak()
        startup, began = process.resident_bytes(), time.perf_counter()
        together = Together(plans) if len(plans) > 1 else None
        once, in_turn = together.read_bytes if together else 0, 0
        written = sum(plan.write_bytes for plan in plans)
        reading = once + sum(plan.read_bytes for plan in plans) - once * len(plans)
        tell(RunStarted(reading, written, plans[0].memory_bytes, sum(len(plan.tasks) for plan in plans)))
        places = [plan.out for plan in plans if plan.out is not None]
        files = len(plans[0].identities) + sum(len(p.layout.files) + len(p.layout.side_files) for p in plans)
        needed = sum(plan.disk_bytes for plan in plans)
        alone = one_torch_thread() if computes else nullcontext()
        inner = replace(options, listener=_quieter(tell))
        with (
            space_checked(places[0], needed),
            descriptors.room_for(files, plans[0].budget.workers),
            faults.survived(),
            process.collector_spared(),
            alone,
            ExitStack() as stack,
        ):
            runs = list[Run]()
            for plan, place in zip(plans, places, strict=True):
                begin = stack.enter_context(started(plan, place.stage(options.overwrite), inner))
                runs.append(begin())
                stack.callback(runs[-1].close)
            for run in runs:
                if run is not runs[0] and runs[0].hashes.keys() == _hashed(run):
                    run.hashes, run.related = runs[0].hashes, True
                run.prepare()
            if together is not None:
                workers = plans[0].budget.workers
                asked = (self._memory_bytes, workers, options.executor, options.polite, tell)
                self.tally.read_bytes += together.make(runs, *asked)
                self.tally.reads += 1
                in_turn = together.make_long(runs, options.executor)
            for run in runs:
                run.finish()
                publish(run, inner)
                run.close()
        alone_too = sum(run.read_bytes > 0 for run in runs)
        self.tally.reads += alone_too if together is None else 0
        if together is not None and alone_too:
            how = ", one after the other while a tensor is in the system's cache" if in_turn else ""
            self._told("note", f"{alone_too} outputs read some tensors again, whose passes all workers share{how}")
        self.tally.read_bytes += sum(run.read_bytes for run in runs)
        self.tally.written_bytes += written
        self.tally.startup_bytes = startup
        more = max(run.peak_bytes for run in runs)
        self.tally.peak_bytes = max(self.tally.peak_bytes, process.peak_resident_bytes() - startup + more)
        for run in runs:
            for note in (*run.notes, *run.staging.notes):
                self._told("note", f"{printable(run.plan.out)}: {note}")
            for warning in run.warnings:
                self._told("warning", warning)
        tell(RunFinished(time.perf_counter() - began))

    def _told(self, kind: str, text: str) -> None:
        known = self.tally.notes if kind == "note" else self.tally.warnings
        if text not in known:
            known.append(text)
            self.options.listener(Told("note" if kind == "note" else "warning", text))


def _hashed(run: Run) -> set[str]:
    return {name for name, said in run.plan.layout.receipt.inputs.items() if "sha256" in said}


def _quieter(tell: Listener) -> Listener:
    """Passes on what single runs tell beside the common one."""

    def told(event: Event) -> None:
        if isinstance(event, TaskDone | Suspended):
            tell(event)

    return told


def identity_of(plan: Plan) -> str:
    """Returns a digest that is equal for two outputs if recipe and inputs are."""
    return _digest(plan.layout.receipt.blank().text())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sizes_of(plans: Sequence[Plan]) -> str:
    """Returns what planned outputs read and write, in words."""
    together = Together(plans)
    read = together.read_bytes + sum(p.read_bytes for p in plans) - together.read_bytes * len(plans)
    return f"read {decimal_bytes(read)}, write {decimal_bytes(sum(p.write_bytes for p in plans))}"


def every_plan(maker: Maker, points: Sequence[Point]) -> Iterator[Plan]:
    """Yields the plan of each point."""
    for point in points:
        yield maker.plan_of(point)[1]
