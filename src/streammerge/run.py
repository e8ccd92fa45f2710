"""Executing a plan: staging, tasks, seals, side files, commit. The output appears whole, or not at all."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge import memory
from streammerge.checksums import join
from streammerge.engine import Engine, MergeTask, Piece, PieceDone
from streammerge.errors import FormatError, RecipeError, VerifyError, listed, printable
from streammerge.events import Event, RunFinished, RunStarted, Staged, Syncing, TaskDone
from streammerge.executors.local import ThreadExecutor
from streammerge.formats.folder import foreign_files
from streammerge.formats.torch_zip import seal
from streammerge.output import side_bytes
from streammerge.planning import Plan
from streammerge.relatives import strangers
from streammerge.staging import stage, staged_layout
from streammerge.storage import InputFiles, OutputFile, Staging, identity
from streammerge.tensors import TensorEntry


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. Memory is resident bytes by the kernel's count: ``peak_bytes`` above ``startup_bytes``."""

    out: Path
    read_bytes: int
    written_bytes: int
    seconds: float
    peak_bytes: int
    startup_bytes: int
    memory_bytes: int
    plan: Plan
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def execute(plan: Plan, overwrite: bool, listener: Callable[[Event], None], resident_before: int) -> Result:
    """Runs a plan to its end. Raises what DESIGN names; then nothing was written under the output's name.

    ``resident_before``: what was resident before the inputs' headers were read, which count as the run's memory.
    """
    if plan.out is None:
        raise ValueError("a plan without an output cannot be run")
    out = plan.out.resolve() if plan.out.is_dir() else plan.out  # a link to a folder stays a link
    refuse_input_as_output(out, plan)
    refuse_to_lose_files(out, plan)
    headers = max(memory.resident_bytes() - resident_before, 0)
    if plan.torch_needed:
        prepare_torch()
    memory.reset_peak()
    startup, began = memory.resident_bytes() - headers, time.perf_counter()
    listener(RunStarted(plan.read_bytes, plan.write_bytes, plan.memory_bytes, len(plan.tasks)))
    staging = Staging(out, overwrite)
    try:
        written, warnings = _make(plan, staging, listener)
        listener(Syncing())
        staging.commit(plan.layout.as_folder)
    finally:
        staging.abort()
    seconds = time.perf_counter() - began
    listener(RunFinished(seconds))
    peak = max(memory.peak_resident_bytes() - startup, 0)
    return Result(
        out,
        plan.read_bytes,
        written,
        seconds,
        peak,
        startup,
        plan.memory_bytes,
        plan,
        tuple(plan.notes),
        (*plan.warnings, *warnings),
    )


def prepare_torch() -> None:
    """Imports torch, and has it say here, once, that a read-only buffer is read-only."""
    import warnings

    import torch

    torch.get_num_threads()  # settles the caller's own number before the workers, which have one each, ask for theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


def refuse_input_as_output(out: Path, plan: Plan) -> None:
    """FormatError when the output is one of the inputs, under any name, or a folder that holds one."""
    same = {known[:2] for known in plan.identities.values()}
    if out.is_file() and identity(out)[:2] in same:
        raise FormatError(f"{printable(out)} is one of the inputs; inputs are never written, choose another output")
    inputs = [Path(path).resolve() for path in plan.identities]
    if out.is_dir() and any(out.resolve() in path.parents for path in inputs):
        raise FormatError(f"{printable(out)} holds one of the inputs; inputs are never written, choose another output")


def refuse_to_lose_files(out: Path, plan: Plan) -> None:
    """RecipeError when a folder that is to be replaced holds what is no part of a checkpoint."""
    if out.is_dir():
        if not plan.layout.as_folder:
            raise RecipeError(f"{printable(out)} is a folder; remove it first, or choose another name")
        written = {file.name for file in plan.layout.files} | {name for _, name in plan.layout.side_files}
        foreign = foreign_files(out, written)
        if foreign:
            raise RecipeError(
                f"{printable(out)} also holds {listed(foreign)}, which replacing it would lose; move that away first"
            )


def _make(plan: Plan, staging: Staging, listener: Callable[[Event], None]) -> tuple[int, list[str]]:
    inputs = InputFiles(plan.identities)
    tasks = plan.tasks
    if plan.staged:
        tasks = _staged(plan, staging, inputs, listener)
    warnings = strangers(tasks, inputs, plan.owners) if len(plan.recipe.entries) > 1 else []
    outputs = [staging.create(file.name, file.size) for file in plan.layout.files]
    sealed = any(file.sealed for file in plan.layout.files)
    for file, output in zip(plan.layout.files, outputs, strict=True):
        for literal in file.literals:
            output.write_full(literal.data, literal.offset)
    engine = Engine(plan.budget, inputs, outputs, plan.io, sealed)
    record, held = _Record(), memory.Gauge()
    executor = ThreadExecutor[Piece, PieceDone](plan.budget.workers)
    # Closed, not left to the garbage collector: after Ctrl-C no worker may outlive the files it writes.
    with closing(engine.run_all(tasks, executor)) as results:
        for done in results:
            record.add(done)
            listener(TaskDone(done.piece.task.out.name, done.read_bytes, done.written_bytes, held.now()))
    warnings += record.check_finite(plan.recipe.allow_nonfinite)
    if sealed:
        _seal(plan, tasks, outputs, record)
    for source, name in plan.layout.side_files:
        staging.copy_side_file(source, name)
    inputs.check_unchanged()
    return plan.layout.size + side_bytes(plan.layout), warnings


def _staged(plan: Plan, staging: Staging, inputs: InputFiles, listener: Callable[[Event], None]) -> list[MergeTask]:
    """The tasks, with entries that can be mapped in place of those that could not."""
    _, size = staged_layout(plan.staged)
    target = staging.temporary("staged", size)

    def told(entry: TensorEntry) -> None:
        listener(Staged(entry.spec.name, entry.nbytes))

    made = stage(plan.staged, inputs, target, told)
    return [replace(t, sources=tuple(s if s.mappable else made[s.place] for s in t.sources)) for t in plan.tasks]


class _Record:
    """What the pieces reported: checksums by tensor place, and numbers that are not finite."""

    def __init__(self) -> None:
        self.checksums: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.nonfinite: dict[str, dict[str, int]] = {}

    def add(self, done: PieceDone) -> None:
        task = done.piece.task
        for file, offset, nbytes, crc in done.checksums:
            self.checksums[file].append((offset, nbytes, crc))
        for source, count in done.nonfinite.items():
            counts = self.nonfinite.setdefault(task.out.name, {})
            counts[source] = counts.get(source, 0) + count

    def checksums_of(self, file: int, starts: list[int]) -> dict[int, list[tuple[int, int, int]]]:
        """The checksums of a file's chunks by the tensor they belong to: the last that starts before them."""
        found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for part in self.checksums[file]:
            found[starts[bisect_right(starts, part[0]) - 1]].append(part)
        return found

    def check_finite(self, allowed: bool) -> list[str]:
        """Warnings about NaN and infinity; VerifyError unless they are allowed."""
        rows = [
            f"{printable(name)}: "
            + ", ".join(f"{count} in {printable(source)}" for source, count in sorted(counts.items()))
            for name, counts in sorted(self.nonfinite.items())
        ]
        if rows and not allowed:
            more = f"\n  and {len(rows) - 10} more tensors" if len(rows) > 10 else ""
            raise VerifyError(
                "the merge holds NaN or infinite values, so nothing was written; "
                "pass --allow-nonfinite to write it all the same:\n  " + "\n  ".join(rows[:10]) + more
            )
        return [f"NaN or infinite values: {row}" for row in rows]


def _seal(plan: Plan, tasks: list[MergeTask], outputs: list[OutputFile], record: _Record) -> None:
    """Puts the checksums, known now, into the headers of zip archives."""
    for number, (file, output) in enumerate(zip(plan.layout.files, outputs, strict=True)):
        if file.sealed:
            parts = record.checksums_of(number, sorted(file.offsets.values()))
            checksums = {name: join(parts.get(offset, [])) for name, offset in file.offsets.items()}
            for literal in seal(file, checksums):
                output.write_full(literal.data, literal.offset)


def default_workers() -> int:
    """CPUs that this process may use."""
    import os

    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1)
