"""Reads two checkpoints once, side by side, and returns what differs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

from streammerge.checkpoints.agreement import agreed
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.diffing.numbers import Adding
from streammerge.diffing.pairs import Comparison, plan_comparison
from streammerge.diffing.result import Diff, TensorDiff
from streammerge.diffing.sums import Sums
from streammerge.errors import RecipeError
from streammerge.events import Listener, Preparing, RunFinished, RunStarted, Spooled, TaskDone, Told
from streammerge.kernels.chunk import Look, Step
from streammerge.kernels.pass_results import PassResults
from streammerge.methods.registry import LINEAR
from streammerge.options.resources import Resources
from streammerge.options.selecting import Selecting
from streammerge.planning.tasks import MergeTask, Piece, as_one_piece, batches, pieces, stretches
from streammerge.recipe.arguments import recipe_of
from streammerge.recipe.hub_names import hub_place
from streammerge.requests.inputs import Held, opened
from streammerge.running import process
from streammerge.running.choosing import choose_executor, default_workers
from streammerge.running.computing import bind, failures
from streammerge.running.engine import modules_of, sweep_on_all
from streammerge.running.executors.base import Executor, Executors, Host
from streammerge.running.executors.registry import find_executor
from streammerge.running.job import Job, lent, new_key
from streammerge.running.spooling import spooled_tasks
from streammerge.running.worker import Worker, sweep_of
from streammerge.running.workspace import prepare_torch
from streammerge.sources.deflated import PackedRecord
from streammerge.stores import descriptors, faults
from streammerge.stores.checksums import CRC32
from streammerge.stores.inputs import InputFiles
from streammerge.stores.scratch import scratch
from streammerge.tensors.threads import one_torch_thread
from streammerge.units import parse_bytes

Names = tuple[str, str, str | None]
"""The names of A, B and their base, as a recipe has them."""


def compare(
    names: Names, held: Held, selecting: Selecting, resources: Resources, executor: str | Executors, listener: Listener
) -> Diff:
    """Compares two checkpoints. Raises the errors of :func:`streammerge.diff`."""
    before = process.resident_bytes()
    with process.collector_paused():
        indexes = _opened(names, held, selecting)
        memory_bytes, workers = parse_bytes(resources.memory), resources.workers or default_workers()
        comparison = plan_comparison(*indexes, memory_bytes, workers, resources.io)
    choose_executor(comparison, executor)
    headers = max(process.resident_bytes() - before, 0)
    for note in comparison.notes:
        listener(Told("note", note))
    for warning in comparison.warnings:
        listener(Told("warning", warning))
    if comparison.tasks:
        listener(Preparing("torch"))
        with process.collector_paused():
            prepare_torch()
    process.reset_peak()
    startup, began = process.resident_bytes() - headers, time.perf_counter()
    listener(RunStarted(comparison.read_bytes, 0, memory_bytes, len(comparison.tasks)))
    run = _Run(comparison, find_executor(comparison.executor if isinstance(executor, str) else executor), listener)
    run.make()
    seconds = time.perf_counter() - began
    listener(RunFinished(seconds))
    tensors = (
        TensorDiff(
            pair.name,
            pair.other,
            pair.a,
            pair.b,
            Sums() if pair.task is None else run.found.get(pair.task, Sums()),
            pair.task is not None,
            pair.task is not None and comparison.tasks[pair.task].based,
        )
        for pair in comparison.pairs
    )
    return Diff(
        names[0],
        names[1],
        names[2],
        tuple(tensors),
        tuple(comparison.only_a),
        tuple(comparison.only_b),
        tuple(comparison.ties),
        comparison.extras,
        tuple(comparison.notes),
        tuple(comparison.warnings),
        run.read_bytes,
        seconds,
        max(process.peak_resident_bytes() - startup, 0) + run.peak_bytes,
        startup + run.startup_bytes,
        memory_bytes,
    )


def _opened(
    names: Names, held: Held, selecting: Selecting
) -> tuple[CheckpointIndex, CheckpointIndex, CheckpointIndex | None]:
    """Returns the indexes of A, B and the base, with the state dicts that a merge of A and B would take."""
    a, b, base = (each if each is None or each in held else hub_place(each) for each in names)
    if a is None or b is None:
        raise RecipeError("a comparison needs two checkpoints")
    recipe = recipe_of([a, b], LINEAR, None, None, {}, selecting.overrides)
    indexes = {each: opened(each.path, each.state_dict, recipe.ema, held) for each in recipe.checkpoints}
    for index in list(indexes.values())[1:]:
        index.share(next(iter(indexes.values())))
    indexes = agreed(recipe, indexes)
    both = [next(index for known, index in indexes.items() if known.same(recipe.of(each))) for each in recipe.entries]
    return both[0], both[1], opened(base, recipe.state_dict, recipe.ema, held) if base is not None else None


@dataclass(frozen=True, slots=True)
class CompareWork:
    """Compares batches of whole tensors."""

    job: Job

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    def open(self, host: Host) -> CompareWorker:
        return CompareWorker(self.job, host)


class CompareWorker(Worker):
    def run(self, batch: list[Piece]) -> list[tuple[int, Sums]]:
        """Returns the number and the sums of each task."""
        self.one_torch_thread()
        made = list[tuple[int, Sums]]()
        for stretch in stretches(batch, self.job.budget.kept_bytes):
            source = self.source(as_one_piece(stretch).task, keep=True)
            for piece in stretch:
                with failures(piece.task, piece.start, piece.stop):
                    found: Sums = bind(piece.task, sweep_of(self, piece.task, source))  # type: ignore[assignment]
                made.append((piece.number, found))
                source.first += piece.stop
        self.bench.inputs.check_whole()
        return made


class _Run:
    """Runs the tasks of a comparison. ``found``: the sums of each task by its number."""

    def __init__(self, comparison: Comparison, executors: Executors, listener: Listener) -> None:
        self.comparison, self.listener = comparison, listener
        self.found: dict[int, Sums] = {}
        self.read_bytes = self.startup_bytes = self.peak_bytes = 0
        self._executors = executors

    def make(self) -> None:
        """Compares all tensors. Raises ChangedError if an input changes meanwhile."""
        comparison = self.comparison
        inputs = comparison.budget.opened(comparison.identities)
        if not comparison.tasks:
            return
        with (
            descriptors.room_for(len(comparison.identities), comparison.budget.workers),
            closing(inputs),
            scratch() as create,
            faults.survived(),
            process.collector_spared(),
            one_torch_thread() if comparison.tasks else nullcontext(),
        ):
            tasks = spooled_tasks(comparison.tasks, comparison.tasks, inputs, create, self._spooled)
            executor = self._executors(comparison.budget.workers)
            with closing(executor):
                self._make(tasks, inputs, executor)
            self.startup_bytes, self.peak_bytes = executor.startup_bytes, executor.peak_bytes
            inputs.check_unchanged()

    def _make(self, tasks: Sequence[MergeTask], inputs: InputFiles, executor: Executor) -> None:
        comparison, gauge = self.comparison, process.Gauge()
        modules = modules_of(tasks, CRC32, torch_needed=True)

        def read(task: MergeTask, nbytes: int) -> None:
            self.read_bytes += nbytes
            self.listener(TaskDone(task.out.name, nbytes, 0, gauge.now()))

        job = Job(new_key(), comparison.budget, comparison.identities, False, comparison.io == "mmap", CRC32, (), modules)
        with lent(job, inputs), closing(_sums(job, executor, tasks, read)) as results:
            self.found.update(results)

    def _spooled(self, tensor: str, record: PackedRecord) -> None:
        self.read_bytes += record.nbytes
        self.listener(Spooled(tensor, record.nbytes))


def _sums(
    job: Job, executor: Executor, tasks: Sequence[MergeTask], read: Callable[[MergeTask, int], None]
) -> Generator[tuple[int, Sums], None, None]:
    """Yields the number and the sums of each task. One worker compares a short tensor; all workers share a long one.

    ``read`` is called with the bytes of each tensor, or piece of a long one, that is compared.
    """
    short = (piece for number, task in enumerate(tasks) if not task.spread for piece in pieces(task, number))
    with closing(executor.run(CompareWork(job), batches(short, job.budget.out_bytes))) as results:
        for made in results:
            for number, sums in made:
                read(tasks[number], tasks[number].read_bytes)
                yield number, sums
    for number, task in enumerate(tasks):
        if task.spread:
            record = PassResults()
            sweep = _watched(sweep_on_all(job, executor, number, task, record), task, number, read)
            with failures(task, 0, task.elems):
                found: Sums = bind(task, sweep, record)  # type: ignore[assignment]
            yield number, found


def _watched(
    sweep: Callable[..., Iterator[Any]], task: MergeTask, number: int, read: Callable[[MergeTask, int], None]
) -> Callable[..., Iterator[Any]]:
    """Returns the same sweep, which calls ``read`` for each piece of the last pass."""

    def watched(look: Look, step: Step[Any], start: int, stop: int, sparse: int = 0) -> Iterator[Any]:
        parts = pieces(task, number)
        for answer in sweep(look, step, start, stop, sparse):
            if isinstance(step, Adding):
                read(task, next(parts).read_bytes)
            yield answer

    return watched
