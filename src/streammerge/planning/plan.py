"""The plan of a run: a pure function of recipe, headers and budget. It can be printed, serialised and executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.agreement import differing_keys
from streammerge.checkpoints.config import config_folder
from streammerge.errors import BudgetError, RecipeError, listed, printable
from streammerge.kernels.ranking import held_bytes
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.planning.aligned import Way
from streammerge.planning.alignment import Alignment, align
from streammerge.planning.announced import disagreements
from streammerge.planning.budget import BEST_TILE_BYTES, Budget, Cost, fit
from streammerge.planning.conservation import Account, is_alarming, unused_text, used_text
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.container import plan_output
from streammerge.planning.outputs.layout import Layout, Placed, PlacedTensors
from streammerge.planning.receipt import InputSpans
from streammerge.planning.tasks import MergeTask, Tasks, alike, copy_of_turned, objects, turned_places, turned_task, where
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe
from streammerge.recipe.summary import recipe_lines, rule_lines, stage_lines, weight_notes
from streammerge.sources.base import BlobPath, Needs, Source
from streammerge.sources.stored import Stored
from streammerge.stores import descriptors
from streammerge.stores.base import Location, Status
from streammerge.stores.locations import parse
from streammerge.tensors.dtypes import DType
from streammerge.units import binary_bytes, counted, decimal_bytes

if TYPE_CHECKING:
    from streammerge.planning.vocabularies import Tokenized
    from streammerge.sources.deflated import PackedKey

_EXAMPLE_OUT = "merged.safetensors"
_MOST_TILES = 6
"""Sizes of tiles that are tried."""


@dataclass(slots=True, repr=False, eq=False)
class Plan:
    """The whole run: ``tasks`` in the order of reading, the ``layout`` of the output, and the costs.

    ``expressions``: the sources that are not plain byte ranges, each once. ``spooled``: the packed records that are
    inflated first, with the name of a tensor in each. ``peak_bytes``: projected memory above the start-up footprint.
    ``disk_bytes``: includes temporary files. ``taken``: the number of tensors of each rule of the recipe. ``owners``: file
    -> its checkpoint. ``input_files``: name of an input file in the receipt -> its location, and the ranges of its tensors.
    ``pickle_bytes``: memory for pickles while they are read and written. ``executor``: the kind of workers.
    ``dispositions``: what becomes of each thing in the inputs. ``accounts``: what becomes of each tensor of each
    checkpoint. ``disagreements``: what a configuration says, and its tensors do not.
    """

    recipe: Recipe
    out: Location | None
    tasks: Sequence[MergeTask]
    expressions: list[Source]
    spooled: dict[PackedKey, str]
    layout: Layout
    budget: Budget
    memory_bytes: int
    io: str
    identities: dict[Location, Status]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    owners: dict[Location, Location] = field(default_factory=dict)
    input_files: dict[str, InputSpans] = field(default_factory=dict)
    pickle_bytes: int = 0
    executor: str = "threads"
    dispositions: Dispositions = field(default_factory=Dispositions)
    accounts: Sequence[Account] = ()
    disagreements: Sequence[str] = ()

    @property
    def peak_bytes(self) -> int:
        return self.budget.peak_bytes

    @property
    def read_bytes(self) -> int:
        return sum(task.read_bytes * count for task, count in alike(self.tasks)) + self.spooled_bytes + self.turned_bytes

    @property
    def write_bytes(self) -> int:
        return self.layout.size + sum(self.identities[source].size for source, _ in self.layout.side_files)

    @property
    def disk_bytes(self) -> int:
        sizes = [file.size for file in self.layout.files]
        sizes += [self.identities[source].size for source, _ in self.layout.side_files]
        written = sum(sizes) if self.out is None else self.out.store.needed_disk_bytes(sizes)
        return written + self.spooled_bytes + self.turned_bytes + self.spilled_bytes

    @property
    def spooled_bytes(self) -> int:
        """Size of the temporary file of packed records."""
        return sum(record.nbytes for _, record in self.spooled)

    @property
    def turned_bytes(self) -> int:
        """Size of the temporary file of tensors that are made with their first axis last."""
        return turned_places(self.tasks[number] for number in where(self.tasks, lambda task: task.to_turn))[1]

    @property
    def spilled_bytes(self) -> int:
        """Size of the temporary files in which methods spill, one for each worker."""
        return self.budget.workers * max((task.spilled_bytes for task, _ in alike(self.tasks)), default=0)

    @property
    def torch_needed(self) -> bool:
        return not all(task.verbatim for task, _ in alike(self.tasks)) or any(
            source.needs().computes for source in self.expressions
        )

    def counts(self) -> dict[str, int]:
        """Returns the number of output tensors that each method makes."""
        counts = Counter[str]()
        for task, count in alike(self.tasks):
            counts[task.method.name] += count
        return dict(counts.most_common())

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as data for JSON, without the places of the bytes."""
        from streammerge.sources.deflated import records

        return {
            "inputs": list(self.recipe.inputs),
            "base": self.recipe.base_model,
            "out": None if self.out is None else str(self.out),
            "method": self.recipe.merge_method.name,
            "recipe": self.recipe.to_dict(),
            "rules": [
                {"match": list(map(str, rule.match)), "action": rule.action, "tensors": count}
                for rule, count in zip(self.recipe.rules, self.taken, strict=True)
            ],
            "tensors": self.counts(),
            "dispositions": self.dispositions.record(),
            "accounts": [each.record() for each in self.accounts],
            "files": [{"name": file.name, "bytes": file.size} for file in self.layout.files],
            "side_files": [name for _, name in self.layout.side_files],
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "peak_bytes": self.peak_bytes,
            "workers": self.budget.workers,
            "executor": self.executor,
            "chunk_elems": self.budget.chunk_elems,
            "io": self.io,
            "spooled_tensors": [each.spec.name for each in self.expressions if any(records(each))],
            "notes": self.notes,
            "warnings": self.warnings,
            "tasks": [_task_json(task) for task in self.tasks],
        }

    def __repr__(self) -> str:
        return (
            f"<Plan {self.recipe.merge_method.name} of {counted(len(self.recipe.inputs), 'model')} -> "
            f"{printable(self.out) if self.out else '(no output named)'}: {counted(len(self.tasks), 'tensor')}, "
            f"{decimal_bytes(self.write_bytes)}, peak memory {binary_bytes(self.peak_bytes)} projected>"
        )

    def __str__(self) -> str:
        facts = (f"{label:<8} {text}" for label, text in self._facts())
        return "\n".join([self._title(), *self._recipe_lines(), *facts])

    def _repr_html_(self) -> str:
        from streammerge.notebook import table

        return table(
            self._title(), [("recipe", "\n".join(line.removeprefix("  ") for line in self._recipe_lines())), *self._facts()]
        )

    def _title(self) -> str:
        what = "convert" if self.recipe.merge_method is COPY else self.recipe.merge_method.name
        return f"{what} -> {printable(self.out) if self.out else '(no output named)'}"

    def _recipe_lines(self) -> list[str]:
        return [*recipe_lines(self.recipe), *stage_lines(self.recipe), *rule_lines(self.recipe, self.taken)]

    def _facts(self) -> list[tuple[str, str]]:
        """Returns (label, text) of the output, the budget, and what is not merged."""
        made = ", ".join(
            f"{count} {_METHOD_WORDS.get(method, f'merged by {method}')}" for method, count in self.counts().items()
        )
        facts = [("tensors", made), ("used", used_text(self.accounts))]
        files = self.layout.files
        named = printable(files[0].name) if len(files) == 1 else f"{len(files)} files"
        beside = f" and {len(self.layout.side_files)} side files" if self.layout.side_files else ""
        facts.append(("output", f"{named}, {decimal_bytes(self.write_bytes)}{beside}"))
        facts.append(("disk", f"{decimal_bytes(self.disk_bytes)} needed, temporary files included"))
        facts.append(("read", f"{decimal_bytes(self.read_bytes)} from {len(self.owners)} files"))
        if self.spooled:
            size = decimal_bytes(self.spooled_bytes)
            facts.append(("spooled", f"{len(self.spooled)} packed records, unpacked into {size} of temporary files"))
        if self.turned_bytes:
            size = decimal_bytes(self.turned_bytes)
            facts.append(("turned", f"{size} of matrices are made by columns, in a temporary file"))
        if self.spilled_bytes:
            size = decimal_bytes(self.spilled_bytes)
            facts.append(("spilled", f"{size} of vectors and sums are looked at again, in temporary files"))
        budget, processes = self.budget, " in processes" if self.executor == "processes" else ""
        memory = f"{binary_bytes(self.peak_bytes)} projected of {binary_bytes(self.memory_bytes)}, above start-up "
        memory += f"({budget.workers} workers{processes}, chunks of {budget.chunk_elems} elements, {self.io})"
        facts.append(("memory", memory))
        facts += self.dispositions.facts()
        told = set(self.dispositions.notes())
        facts += [("note", note) for note in self.notes if note not in told]
        return facts + [("warning", warning) for warning in self.warnings]


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
    indexes: Indexes,
    out: Location | None,
    *,
    memory_bytes: int,
    workers: int,
    io: str = "mmap",
    hashed: bool = False,
) -> Plan:
    """Returns the plan of a merge or conversion. Nothing is written and no tensor is read.

    ``indexes``: the indexes of the recipe's checkpoints, the first one first. Raises MismatchError when the checkpoints do
    not fit each other, BudgetError when ``memory_bytes`` is too small, RecipeError for an invalid recipe.
    """
    if out is not None and not out.name:
        raise RecipeError(f"{printable(out)} is not a name for an output")
    recipe, alignment = aligned(recipe, indexes)
    noise = _noise(recipe, indexes)
    if recipe.quantise is not None:
        from streammerge.planning.like_base import like_base  # here, because most outputs are not quantised

        indexes = like_base(recipe, indexes, alignment)
    opened, tokens = indexes.values(), alignment.tokenized
    origins = [origin for index in opened for origin in index.origins()]
    output = plan_output(out or parse(_EXAMPLE_OUT), recipe, indexes, alignment, hashed)
    in_order = out is not None and out.store.sends_parts
    tasks = all_tasks(output.placed, recipe.seed, in_order)
    expressions: list[Source] = []
    spooled: dict[PackedKey, str] = {}
    if not all(_is_stored(source) for task in objects(tasks) for source in task.sources):
        from streammerge.planning.repeated import remembered
        from streammerge.sources.deflated import records

        tasks = remembered(tasks)
        found = {s.place: s for task in objects(tasks) for s in task.sources if not _is_stored(s)}
        expressions = list(found.values())
        for source in expressions:
            for record in records(source):
                spooled.setdefault(record, source.spec.name)
    held = [index.container.held_bytes for index in {id(index): index for index in (*opened, *origins)}.values()]
    # Reading a pickle takes two copies of it beside its tree. They are freed before the output's pickle is written.
    reading = max(2 * max(held), *(index.container.reading_bytes for index in opened))
    pickle_bytes = sum(held) + max(reading, output.layout.pickle_bytes) + (tokens.held_bytes if tokens else 0)
    sent = out.store.output_buffers(max([file.size for file in output.layout.files], default=0)) if out else (0, 0)
    budget, io = budget_of(tasks, memory_bytes, workers, io, bool(spooled), pickle_bytes + sent[0], sent[1])
    identities = {path: known for index in opened for path, known in index.identities().items()}
    identities |= {source: source.status() for source, _ in output.layout.side_files}
    identities |= {file: file.status() for file in (tokens.read if tokens else ())}
    notes = [*(note for index in opened for note in index.notes), *alignment.notes, *output.notes]
    notes += [*output.dispositions.notes(), *weight_notes(recipe), *noise]
    if out is not None and recipe.output.max_shard_size is not None and not output.layout.as_folder:
        notes.append(
            "`max_shard_size` is without effect, because the output is one file; a name that ends in / is a folder"
        )
    warnings = [*(warning for index in opened for warning in index.warnings), *alignment.warnings]
    if recipe.merge_method is not COPY and is_alarming(output.accounts):
        warnings.append(unused_text(output.accounts))
    disagreeing = disagreements(indexes, alignment.merged, output.layout)
    notes += disagreeing
    return Plan(
        recipe,
        out,
        tasks,
        expressions,
        spooled,
        output.layout,
        budget,
        memory_bytes,
        io,
        identities,
        list(dict.fromkeys(notes)),
        list(dict.fromkeys(warnings)),
        alignment.taken,
        {file: index.path for index in origins for file in index.files},
        output.inputs,
        pickle_bytes,
        dispositions=output.dispositions,
        accounts=output.accounts,
        disagreements=disagreeing,
    )


def _noise(recipe: Recipe, indexes: Indexes) -> list[str]:
    """Returns a note about differences from the base that quantisation makes."""
    coarse = [index for index in indexes.values() if index.quantised]
    if not recipe.based or not coarse:
        return []
    return [
        f"{printable(coarse[0].path)} is quantised, so its difference from the other models is mostly the rounding to the "
        f"grid of its codes, which is often larger than what training changed; {recipe.merge_method.name} takes it for "
        "training, so merge the weights that it was made from if there are any"
    ]


def aligned(recipe: Recipe, indexes: Indexes) -> tuple[Recipe, Alignment]:
    """Returns the tensors of a merge, with what headers tell about its models; and the recipe as it travels, which says
    what is done with mixed dtypes. Raises as :func:`build_plan` does."""
    tokens: Tokenized | None = None
    if recipe.tokens is not None:
        from streammerge.planning.vocabularies import tokenized

        tokens = tokenized(recipe, indexes)
    tied: list[str] = []
    cut: list[str] = []
    if tokens is None and recipe.unsafe_truncate_embeddings:
        from streammerge.planning.vocabularies import truncated

        alignment = align(recipe, truncated(recipe, indexes, tied, cut))
        alignment.notes[:0] = tied
    else:
        alignment = align(recipe, tokens.indexes if tokens else indexes)
    if alignment.mixed and recipe.mixed_dtypes is None:  # said in the recipe that travels, which may be read again
        recipe = replace(recipe, mixed_dtypes="promote" if recipe.promotes else "first")
    if recipe.promotes:
        alignment.notes += [
            f"{len(names)} tensors ({listed(names, 2)}) have several dtypes in the inputs and are written as "
            f'{dtype.torch_name}, as in mergekit; `dtype`, or `mixed_dtypes="first"`, says otherwise'
            for dtype, names in alignment.mixed.items()
        ]
    if recipe.merge_method.passes or recipe.merge_method.row:
        from streammerge.planning.experts import stacked

        if names := stacked(indexes[recipe.checkpoints[0]].entries):
            alignment.notes.append(
                f"{recipe.merge_method.name} looks at whole tensors; {counted(len(names), 'tensor')} ({listed(names, 2)}) "
                "with all experts of a layer count as one tensor each, as in mergekit"
            )
    alignment.warnings[:0] = recipe.ignored
    alignment.warnings += cut
    alignment.warnings += _differences(recipe, indexes)
    alignment.notes += differing_keys(indexes.values())
    if tokens is not None:
        alignment.tokenized = tokens
        alignment.notes += tokens.notes
        alignment.warnings += tokens.warnings
    return recipe, alignment


def _differences(recipe: Recipe, indexes: Indexes) -> list[str]:
    """Returns warnings about what the inputs say beside their tensors and do not agree on."""
    opened, said = indexes.values(), list[str]()
    if any(index.extras is not None for index in opened):
        from streammerge.planning.outputs.bookkeeping import differing_facts

        said += differing_facts([i.extras for i in opened], [str(i.path) for i in opened])
    if any(key.startswith("modelspec.") for index in opened for key in index.metadata):
        from streammerge.planning.outputs.bookkeeping import SPEC_FACTS, differing_facts

        said += differing_facts([i.metadata for i in opened], [str(i.path) for i in opened], SPEC_FACTS)
    if any(config_folder(index.path) for index in opened):
        from streammerge.checkpoints.config_differences import differing_configs

        said += differing_configs(opened)
    homes = [config_folder(index.path) or index.path.parent for index in opened if not index.in_memory]
    if any(home != homes[0] for home in homes):
        from streammerge.planning.tokenizers import differing_vocabularies

        said += differing_vocabularies(recipe, indexes)
    return said


def _is_stored(source: Source) -> bool:
    return source.__class__ is Stored


def budget_of(
    tasks: Sequence[MergeTask],
    memory_bytes: int,
    workers: int,
    io: str,
    spooled: bool = False,
    pickle_bytes: int = 0,
    beside_bytes: int = 0,
    planned: Sequence[MergeTask] = (),
) -> tuple[Budget, str]:
    """Returns the budget of these tasks within ``memory_bytes``, and the way to read the inputs.

    Inputs are read by pread if they cannot be mapped, or if the memory or the file limit has no room for the mapped files.
    ``beside_bytes``: what each worker holds besides its buffers. ``planned``: further tasks that are in memory. Raises
    BudgetError if the memory is too little.
    """
    if io == "mmap" and not _can_map(tasks, workers):
        io = "pread"
    held = [_held(tasks), _held(planned)]
    tensors, objects_, columns, rows, together, parts = (sum(counts) for counts in zip(*held, strict=True))
    remote = any(path.store.reads_ahead for path in _files_of(tasks)[0].values())
    more = (spooled, pickle_bytes, beside_bytes, objects_, columns, rows, together, parts, remote)
    try:
        found = fit(memory_bytes, workers, tensors, _cost(tasks, io), *more)
    except BudgetError:
        if io != "mmap":
            raise
        io, found = "pread", fit(memory_bytes, workers, tensors, _cost(tasks, "pread"), *more)
    for tile in _longer_tiles(tasks):
        try:
            wide = fit(memory_bytes, workers, tensors, _cost(tasks, io, tile), *more, tile_bytes=tile)
        except BudgetError:
            continue
        if 2 * wide.workers >= found.workers:
            return wide, io
    return found, io


def _longer_tiles(tasks: Sequence[MergeTask]) -> list[int]:
    """Returns the sizes of tiles, the longest first, that hold a tensor that passes read several times through merges."""
    nested = [task for task in objects(tasks) if task.out.nbytes > BEST_TILE_BYTES and task.nested]
    if not nested:
        return []
    from streammerge.planning.repeated import remembered_bytes  # here, because most merges have no stages

    sizes = {remembered_bytes(task) for task in nested}
    return sorted((size for size in sizes if size > BEST_TILE_BYTES), reverse=True)[:_MOST_TILES]


def _held(tasks: Sequence[MergeTask]) -> tuple[int, int, int, int, int, int]:
    """Returns what takes memory for each tensor: the sources of tasks that are objects, these tasks, the sources of tasks
    that are rows, these tasks, the most rows in one file, and the pieces of long tensors."""
    own = list(objects(tasks))
    rows = len(tasks) - len(own)
    columns = rows * max([len(task.sources) for task, _ in alike(tasks)], default=0) if rows else 0
    together = tasks.most_in_one_file() if rows and isinstance(tasks, Tasks) else 0
    counts = ((-(-task.elems // task.piece_elems), count) for task, count in alike(tasks))
    parts = sum(several * count for several, count in counts if several > 1)
    return sum(len(task.sources) for task in own), len(own), columns, rows, together, parts


def _can_map(tasks: Sequence[MergeTask], workers: int) -> bool:
    """Whether the stores can map files, and as many files as the workers read at one time."""
    seen, most = _files_of(tasks)
    if most * workers > descriptors.mapped_at_once(workers):
        return False
    return all(path.store.mappable for path in seen.values())


def _files_of(tasks: Sequence[MergeTask]) -> tuple[dict[int, Location], int]:
    """Returns the files that the tasks read, and the most of them that one task reads."""
    most, seen = 0, dict[int, Location]()  # by identity, since this looks at every tensor
    if isinstance(tasks, Tasks) and tasks.views:
        seen |= {id(path): path for table in tasks.views.tables for path in table.paths}
    for task, _ in alike(tasks):
        files = 0
        for source in task.sources:
            if source.__class__ is Stored:
                path: Location = source.path
                seen[id(path)] = path
                files += 1
            else:
                paths = {blob.path for blob in source.blobs}
                seen |= {id(path): path for path in paths}
                files += len(paths)
        most = max(most, files)
    return seen, most


def all_tasks(placed: Iterable[Placed | PlacedTensors], seed: int, in_order: bool = False) -> Tasks:
    """Returns the tasks of an output, sorted by the place in the first input, so that its pages are read once and in
    sequence. ``in_order``: sorted by the place in the output instead, which is sent in that order."""
    tasks = Tasks(seed)
    for each in placed:
        if isinstance(each, Placed):
            for task in _tasks_of(each, seed):
                tasks.add(task)
            continue
        merged, file, starts = each.merged, each.file, each.starts
        tasks.views = merged.views
        ways = [made for made in merged.made if isinstance(made, Way)]
        if len(ways) == len(merged):
            tasks.extend(ways, merged.rows, file, starts)
            continue
        for at, made in enumerate(merged.made):
            if isinstance(made, Way):
                tasks.extend([made], merged.rows[at : at + 1], file, starts[at : at + 1])
            else:
                for task in _tasks_of(Placed(made.spec, made, file, starts[at]), seed):
                    tasks.add(task)
    if in_order:
        tasks.sort(lambda number: tasks.place(number)[:2])
        return tasks
    if any(later < earlier for earlier, later in pairwise(_places(tasks))):
        places = list(_places(tasks))
        tasks.sort(places.__getitem__)
    return tasks


def _places(tasks: Tasks) -> Iterator[tuple[bool, int, int]]:
    """Yields the sort key of each task: integers first, then the number of its first file, and the place in it."""
    ranks: dict[BlobPath, int] = {}
    near, rank = None, 0
    for method, path, offset in tasks.begins():
        if path is not near:  # a path's hash takes its time
            near, rank = path, ranks.setdefault(path, len(ranks))
        yield method is not INTEGERS, rank, offset


def _tasks_of(placed: Placed, seed: int) -> list[MergeTask]:
    """Returns the work of one output tensor: the merge and, if one model has more rows, the copy of these rows."""
    m, spec = placed.merged, placed.spec
    if m is None:
        if placed.source is None:
            raise ValueError(f"{spec.name} has no source")
        return [MergeTask(spec, COPY, (placed.source,), placed.file, placed.offset)]
    made, tail = spec, []
    if m.rest is not None:
        made, more = replace(spec, shape=m.sources[0].spec.shape), replace(spec, shape=m.rest.spec.shape)
        tail = [MergeTask(more, COPY, (m.rest,), placed.file, placed.offset + made.nbytes)]
    head = MergeTask(made, m.method, m.sources, placed.file, placed.offset, m.parameters, m.compute, m.based, seed)
    return [head, *tail]


def _cost(tasks: Sequence[MergeTask], io: str, tile_bytes: int = 0) -> Cost:
    """Returns the memory of one chunk: for each kind, the most that any task needs. Zero if all tasks copy verbatim.

    ``tile_bytes``: of longer tiles than the usual ones, if there are any.
    """
    cost = Cost(0, 0, 0, 0)
    seen: set[tuple[object, ...]] = set()
    for task, _ in alike(tasks):
        if task.to_turn:
            cost = cost.most(_turned_cost(task, io))
            continue
        if not all(map(_is_stored, task.sources)):
            cost = cost.most(_nested_cost(task, io, tile_bytes))
            continue
        if task.verbatim:
            continue
        # Tens of thousands of tasks are alike and cost the same, so each kind is computed once.
        method, dtypes = task.method, tuple(source.spec.dtype for source in task.sources)
        sized = task.out.shape if method.passes or method.row else None
        kind = (id(method), dtypes, task.out.dtype, task.compute, task.based, sized, id(task.parameters))
        if kind not in seen:
            seen.add(kind)
            cost = cost.most(_task_cost(task, [dtype.component for dtype in dtypes], io))
    return cost


def _turned_cost(task: MergeTask, io: str) -> Cost:
    """Returns the memory of a tensor that is made turned, and then copied."""
    made = turned_task(task, 0, 0)
    return _cost([made, copy_of_turned(task, Stored(made.out, None, 0))], io)


def _task_cost(task: MergeTask, dtypes: list[DType], io: str, alone: bool = False) -> Cost:
    """Returns the memory of one chunk. ``alone``: whether one worker makes all pieces of the tensor."""
    method, models = task.method, len(dtypes)
    widest = max(d.element_bytes for d in dtypes)
    out = task.out.dtype.component.element_bytes
    read, mapped = (widest, 0) if io == "pread" else (0, widest)
    inputs = models if io == "mmap" or method.passes else 0
    if method is COPY:
        return Cost(0, 0, out, read, inputs, mapped)
    compute, buffers = method.buffers_for(dtypes, task.compute, task.based)
    searches, rows_bytes = method.searches * models, method.held_bytes(task.row, models)
    passes = rows_bytes + held_bytes(task.elems if alone else min(task.elems, task.piece_elems), searches)
    passes += method.whole_bytes(task.shape, models - task.based, task.parameters, task.turned)
    spread = rows_bytes + held_bytes(task.elems, searches) if task.spread and not alone else 0
    return Cost(compute, buffers, out, read, inputs, mapped, task.row, method.passes, passes, spread)


def _nested_cost(task: MergeTask, io: str, tile_bytes: int = 0) -> Cost:
    """Returns the memory of one chunk if some sources are not plain byte ranges. Such sources cannot be mapped."""
    needed = Needs()
    for source in task.sources:
        if not _is_stored(source):
            needed += source.needs()
    nested = Cost(
        *(0, 0, 0, 0),
        scratch=needed.scratch_bytes,
        shared=needed.shared_bytes,
        tiles=needed.tiles,
        held=needed.held_bytes,
    )
    if task.verbatim:
        return nested
    dtypes = [source.spec.dtype.component for source in task.sources]
    alone = False
    if tile_bytes:
        from streammerge.planning.repeated import is_alone

        alone = is_alone(task, tile_bytes)
    read, mapped = (_task_cost(task, dtypes, way, alone) for way in ("pread", io))
    plain = any(map(_is_stored, task.sources))
    return read.most(nested) if not plain or io == "pread" else read.most(mapped).most(nested)
