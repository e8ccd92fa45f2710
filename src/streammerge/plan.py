"""Plan, then execute: a pure function of recipe, headers and budget. It prints, serialises, and is what is run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.align import Merged, align
from streammerge.bookkeeping import differing_facts
from streammerge.budget import Budget, Cost, fit
from streammerge.checkpoint import CheckpointIndex
from streammerge.dtypes import DType
from streammerge.engine import MergeTask
from streammerge.errors import RecipeError, printable
from streammerge.formats.base import Layout
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.output import Placed, plan_output, side_bytes
from streammerge.recipe import Recipe
from streammerge.select import held_bytes
from streammerge.storage import Identity
from streammerge.tensors import TensorEntry
from streammerge.units import binary_bytes, decimal_bytes

_EXAMPLE_OUT = "merged.safetensors"


@dataclass(slots=True)
class Plan:
    """All of a run: ``tasks`` in the order of reading, the ``layout`` of the output, and what it will cost.

    ``peak_bytes`` is projected memory above the start-up footprint; ``disk_bytes`` includes temporary files.
    """

    recipe: Recipe
    out: Path | None
    tasks: list[MergeTask]
    staged: list[TensorEntry]
    layout: Layout
    budget: Budget
    memory_bytes: int
    io: str
    identities: dict[str, Identity]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return self.budget.peak_bytes

    @property
    def read_bytes(self) -> int:
        return sum(task.read_bytes for task in self.tasks) + sum(entry.nbytes for entry in self.staged)

    @property
    def write_bytes(self) -> int:
        return self.layout.size + side_bytes(self.layout)

    @property
    def disk_bytes(self) -> int:
        return self.write_bytes + sum(entry.nbytes for entry in self.staged)

    @property
    def torch_needed(self) -> bool:
        return not all(task.verbatim for task in self.tasks) or any(e.strides is not None or e.lazy for e in self.staged)

    def counts(self) -> dict[str, int]:
        """How many output tensors each method makes."""
        return dict(Counter(task.method.name for task in self.tasks).most_common())

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able data, without the places of the bytes."""
        return {
            "inputs": list(self.recipe.models),
            "base": self.recipe.base,
            "out": None if self.out is None else str(self.out),
            "method": self.recipe.method.name,
            "parameters": self.recipe.values,
            "seed": self.recipe.seed,
            "tensors": self.counts(),
            "files": [{"name": file.name, "bytes": file.size} for file in self.layout.files],
            "side_files": [name for _, name in self.layout.side_files],
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "peak_bytes": self.peak_bytes,
            "workers": self.budget.workers,
            "chunk_elems": self.budget.chunk_elems,
            "io": self.io,
            "staged_tensors": [entry.spec.name for entry in self.staged],
            "notes": self.notes,
            "warnings": self.warnings,
            "tasks": [_task_json(task) for task in self.tasks],
        }

    def __str__(self) -> str:
        recipe, values = self.recipe, self.recipe.values
        lines = [f"{'convert' if recipe.method is COPY else recipe.method.name} -> {self.out or '(no output named)'}"]
        rows = [(path, _of_model(recipe, number)) for number, path in enumerate(recipe.models)]
        if recipe.based:
            rows.insert(0, (recipe.checkpoints[0], "base"))
        width = max(len(printable(path)) for path, _ in rows)
        lines += [f"  {printable(path):<{width}}  {said}".rstrip() for path, said in rows]
        shared = {n: v for n, v in values.items() if not recipe.method.parameters[n].per_model}
        if shared:
            lines.append("with     " + ", ".join(f"{name} {_shown(value)}" for name, value in shared.items()))
        made = ", ".join(
            f"{count} {_METHOD_WORDS.get(method, f'merged by {method}')}" for method, count in self.counts().items()
        )
        lines.append(f"tensors  {made}")
        files = self.layout.files
        named = printable(files[0].name) if len(files) == 1 else f"{len(files)} files"
        beside = f" and {len(self.layout.side_files)} side files" if self.layout.side_files else ""
        lines.append(f"output   {named}, {decimal_bytes(self.write_bytes)}{beside}")
        lines.append(f"disk     {decimal_bytes(self.disk_bytes)} needed, temporary files included")
        lines.append(f"read     {decimal_bytes(self.read_bytes)} from {len(self.identities)} files")
        if self.staged:
            size = sum(entry.nbytes for entry in self.staged)
            lines.append(
                f"staged   {len(self.staged)} tensors that cannot be mapped, {decimal_bytes(size)} of temporary files"
            )
        budget = self.budget
        lines.append(
            f"memory   {binary_bytes(self.peak_bytes)} projected of {binary_bytes(self.memory_bytes)}, above start-up "
            f"({budget.workers} workers, chunks of {budget.chunk_elems} elements, {self.io})"
        )
        lines += [f"note     {note}" for note in self.notes]
        lines += [f"warning  {warning}" for warning in self.warnings]
        return "\n".join(lines)


_METHOD_WORDS = {"copy": "copied", "integers": "of integers (equal, or by policy)"}


def _task_json(task: MergeTask) -> dict[str, Any]:
    return {
        "tensor": task.out.name,
        "dtype": task.out.dtype.value,
        "shape": list(task.out.shape),
        "method": task.method.name,
        "inputs": len(task.sources),
        "bytes": task.out.nbytes,
    }


def build_plan(
    recipe: Recipe,
    indexes: list[CheckpointIndex],
    out: str | None,
    *,
    memory_bytes: int,
    workers: int,
    io: str = "mmap",
) -> Plan:
    """The plan of a merge or conversion. Nothing is written and no tensor is read.

    Raises MismatchError when the inputs disagree, BudgetError when ``memory_bytes`` are too few, RecipeError.
    """
    if out is not None and not Path(out).name:
        raise RecipeError(f"{printable(out)} is not a name for an output")
    alignment = align(recipe, indexes)
    alignment.warnings += differing_facts([index.extras for index in indexes], recipe.checkpoints)
    output = plan_output(out or _EXAMPLE_OUT, recipe, indexes, alignment.merged)
    tasks = [_task(placed, recipe.seed) for placed in output.placed]
    # In the order in which the first input has them on the disk, its pages are read once and in sequence.
    tasks.sort(key=lambda task: (task.method is not INTEGERS, task.sources[0].path, task.sources[0].offset))
    staged = list({s.place: s for task in tasks for s in task.sources if not s.mappable}.values())
    tensors = sum(len(task.sources) + 1 for task in tasks)
    budget = fit(memory_bytes, workers, tensors, _cost(tasks, io), bool(staged))
    identities = {path: known for index in indexes for path, known in index.identities().items()}
    notes = [*(note for index in indexes for note in index.notes), *alignment.notes, *output.notes, *_weight_notes(recipe)]
    return Plan(
        recipe,
        None if out is None else Path(out),
        tasks,
        staged,
        output.layout,
        budget,
        memory_bytes,
        io,
        identities,
        list(dict.fromkeys(notes)),
        alignment.warnings,
    )


def _of_model(recipe: Recipe, number: int) -> str:
    """One model's own parameters, its weight as the share that it has in a weighted mean."""
    values = recipe.values
    own = {name: values[name][number] for name, p in recipe.method.parameters.items() if p.per_model and values[name]}
    if recipe.method.name == "linear" and values["normalize"]:
        own["weight"] /= sum(values["weight"]) or 1.0
    return ", ".join(f"{name} {_shown(value)}" for name, value in own.items())


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value).lower())


def _weight_notes(recipe: Recipe) -> list[str]:
    if recipe.method.name != "linear" or not recipe.values["normalize"]:
        return []
    total = sum(recipe.values["weight"])
    if recipe.weights is not None and abs(total - 1) > 1e-9:
        return [f"the weights sum to {total:.6g} and are divided by it (--no-normalize uses them as given)"]
    return []


def _task(placed: Placed, seed: int) -> MergeTask:
    m: Merged | None = placed.merged
    if m is None:
        if placed.source is None:
            raise ValueError(f"{placed.spec.name} has no source")
        return MergeTask(placed.spec, COPY, (placed.source,), placed.file, placed.offset)
    return MergeTask(placed.spec, m.method, m.sources, placed.file, placed.offset, m.parameters, m.compute, m.based, seed)


def _cost(tasks: list[MergeTask], io: str) -> Cost:
    """What a chunk needs, of each kind the most that any task does; nothing where everything is copied verbatim."""
    compute = buffers = out = read = inputs = mapped = passes = spread = 0
    row = 1
    for task in tasks:
        if task.verbatim:
            continue
        method, dtypes = task.method, [s.spec.dtype.component for s in task.sources]
        widest = max(d.element_bytes for d in dtypes)
        out = max(out, task.out.dtype.component.element_bytes)
        read = max(read, widest if io == "pread" else 0)
        mapped = max(mapped, widest if io == "mmap" else 0)
        if io == "mmap" or method.passes:
            inputs = max(inputs, len(dtypes))
        if method is COPY:
            continue
        wide = method.passes or task.compute == "float64" or method is INTEGERS
        compute = max(compute, 8 if wide else 4)
        narrow = any(d not in (DType.BF16, DType.F32, DType.F64) for d in dtypes)  # widened by way of float32
        buffers = max(buffers, method.buffers + method.buffers_per_model * len(dtypes) + task.based + (wide and narrow))
        searches = method.searches * len(dtypes)
        rows_bytes = 8 * task.row * method.row_buffers
        passes = max(passes, rows_bytes + held_bytes(min(task.elems, task.piece_elems), searches))
        spread = max(spread, rows_bytes + held_bytes(task.elems, searches) if task.spread else 0)
        row = max(row, task.row)
    return Cost(compute, buffers, out, read, inputs, mapped, row, passes, spread)
