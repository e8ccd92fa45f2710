"""The plan of a run: a pure function of recipe, headers and budget. It can be printed, serialised and executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from streammerge.checkpoints.agreement import differing_keys
from streammerge.checkpoints.config import config_folder
from streammerge.errors import RecipeError, listed, printable
from streammerge.methods.registry import COPY, INTEGERS
from streammerge.planning.aligned import Way
from streammerge.planning.alignment import Alignment, align
from streammerge.planning.announced import disagreements
from streammerge.planning.budget import Budget
from streammerge.planning.conservation import Account, is_alarming, unused_text, used_text
from streammerge.planning.costs import budget_of, is_stored
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.container import like_first, plan_output
from streammerge.planning.outputs.layout import Layout, Placed, PlacedTensors, PlannedOutput
from streammerge.planning.receipt import InputSpans
from streammerge.planning.tasks import MergeTask, Tasks, alike, objects, turned_places, where
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe
from streammerge.recipe.summary import recipe_lines, rule_lines, stage_lines, weight_notes
from streammerge.sources.base import BlobPath, Source
from streammerge.stores.base import Location, Status
from streammerge.units import binary_bytes, counted, decimal_bytes, inflected

if TYPE_CHECKING:
    from streammerge.checkpoints.index import CheckpointIndex
    from streammerge.planning.vocabularies import Tokenized
    from streammerge.sources.deflated import PackedKey


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
        memory += f"({counted(budget.workers, 'worker')}{processes}, chunks of {budget.chunk_elems} elements, {self.io})"
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
    output = plan_output(out or like_first(indexes[recipe.checkpoints[0]]), recipe, indexes, alignment, hashed)
    made = all_tasks(output.placed, recipe.seed, out is not None and out.store.sends_parts)
    tasks, expressions, spooled = _nested(made)
    pickle_bytes = _pickle_bytes(indexes, output.layout, alignment.tokenized)
    sent = out.store.output_buffers(max([file.size for file in output.layout.files], default=0)) if out else (0, 0)
    budget, io = budget_of(tasks, memory_bytes, workers, io, bool(spooled), pickle_bytes + sent[0], sent[1])
    disagreeing = disagreements(indexes, alignment.merged, output.layout)
    notes, warnings = _said(recipe, indexes, alignment, output, out)
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
        _identities(indexes, output.layout, alignment.tokenized),
        list(dict.fromkeys([*notes, *noise, *disagreeing])),
        list(dict.fromkeys(warnings)),
        alignment.taken,
        {file: index.path for index in _origins(indexes) for file in index.files},
        output.inputs,
        pickle_bytes,
        dispositions=output.dispositions,
        accounts=output.accounts,
        disagreements=disagreeing,
    )


def _origins(indexes: Indexes) -> list[CheckpointIndex]:
    """Returns the checkpoints whose files are read: those of the recipe, and of its stages."""
    return [origin for index in indexes.values() for origin in index.origins()]


def _nested(tasks: Tasks) -> tuple[Sequence[MergeTask], list[Source], dict[PackedKey, str]]:
    """Returns the tasks, which remember what they read twice, the sources that are not plain byte ranges, and the packed
    records in them, each with the name of a tensor."""
    if all(is_stored(source) for task in objects(tasks) for source in task.sources):
        return tasks, [], {}
    from streammerge.planning.repeated import remembered
    from streammerge.sources.deflated import records

    made = remembered(tasks)
    expressions = {s.place: s for task in objects(made) for s in task.sources if not is_stored(s)}.values()
    spooled: dict[PackedKey, str] = {}
    for source in expressions:
        for record in records(source):
            spooled.setdefault(record, source.spec.name)
    return made, list(expressions), spooled


def _pickle_bytes(indexes: Indexes, layout: Layout, tokens: Tokenized | None) -> int:
    """Returns the memory for pickles while they are read and written, and for tokens.

    Reading a pickle takes two copies of it beside its tree. They are freed before the output's pickle is written.
    """
    opened = indexes.values()
    held = [index.container.held_bytes for index in {id(i): i for i in (*opened, *_origins(indexes))}.values()]
    reading = max(2 * max(held), *(index.container.reading_bytes for index in opened))
    return sum(held) + max(reading, layout.pickle_bytes) + (tokens.held_bytes if tokens else 0)


def _identities(indexes: Indexes, layout: Layout, tokens: Tokenized | None) -> dict[Location, Status]:
    """Returns each file that the plan depends on, and its state."""
    found = {path: known for index in indexes.values() for path, known in index.identities().items()}
    found |= {source: source.status() for source, _ in layout.side_files}
    return found | {file: file.status() for file in (tokens.read if tokens else ())}


def _said(
    recipe: Recipe, indexes: Indexes, alignment: Alignment, output: PlannedOutput, out: Location | None
) -> tuple[list[str], list[str]]:
    """Returns the notes and the warnings of a plan."""
    opened = indexes.values()
    notes = [*(note for index in opened for note in index.notes), *alignment.notes, *output.notes]
    notes += [*output.dispositions.notes(), *weight_notes(recipe)]
    if out is not None and recipe.output.max_shard_size is not None and not output.layout.as_folder:
        notes.append(
            "`max_shard_size` is without effect, because the output is one file; a name that ends in / is a folder"
        )
    warnings = [*(warning for index in opened for warning in index.warnings), *alignment.warnings]
    if recipe.merge_method is not COPY and is_alarming(output.accounts):
        warnings.append(unused_text(output.accounts))
    return notes, warnings


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
            f"{counted(len(names), 'tensor')} ({listed(names, 2)}) {inflected(len(names), 'has', 'have')} several dtypes "
            f"in the inputs and {inflected(len(names), 'is', 'are')} written as {dtype.torch_name}, as in mergekit; "
            '`dtype`, or `mixed_dtypes="first"`, says otherwise'
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
    elif config_folder(indexes[recipe.checkpoints[0]].path):
        from streammerge.planning.tokenizers import tokens_without_rows

        alignment.notes += tokens_without_rows(indexes[recipe.checkpoints[0]], alignment.merged)
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
