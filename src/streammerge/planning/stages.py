"""A stage: a planned merge as a model of another one. Its tensors are expressions, and no byte of it is written.

The output of the stage is planned as if it was written to its own folder or file. That plan is then opened as a checkpoint,
so a stage has just the names, files, configuration and tokenizer that it would have on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex, index_of
from streammerge.errors import FormatError, RecipeError, StreammergeError, printable
from streammerge.formats import detect
from streammerge.formats.base import Container
from streammerge.pickles.tree import TensorRef
from streammerge.planning.alignment import Alignment
from streammerge.planning.outputs.container import plan_output
from streammerge.planning.plan import aligned, all_tasks
from streammerge.planning.tasks import MergeTask, Tasks
from streammerge.planning.unwritten import Unwritten
from streammerge.planning.views import Indexes
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.constant import Constant
from streammerge.sources.inline import Inline
from streammerge.sources.joined import joined
from streammerge.sources.merged import Merged, by_columns
from streammerge.sources.stored import Stored
from streammerge.sources.table import StoredTable
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType

Stage = Mapping[tuple[str, int], Source]
"""The tensor at an offset of a file: (key of the file, offset) -> its expression."""


class Opened:
    """A stage whose tensors are not read yet. ``index`` makes an index of it for each state dict that is asked for."""

    def __init__(self, name: str, recipe: Recipe, indexes: Indexes) -> None:
        """Plans the stage. Raises the errors of :func:`streammerge.planning.plan.build_plan`, with the stage's name."""
        self.name, self.indexes = name, indexes
        store = Unwritten(name)
        first = indexes[recipe.checkpoints[0]]
        place = store.folder
        out = Location(store, name, f"{place}/")
        if not first.path.is_folder() or first.in_memory:
            place = out = store.file(name + (first.path.suffix if not first.in_memory else ".safetensors"))
        recipe = replace(recipe, output=replace(recipe.output, card=False))  # the card is that of the whole merge
        try:
            if recipe.quantise is not None:
                raise RecipeError("`quantise` is about the output, and a stage is none; say it in the last recipe")
            recipe, alignment, self.declared = _aligned(recipe, indexes)
            output = plan_output(out, recipe, indexes, alignment, hashed=False)
        except StreammergeError as error:
            raise type(error)(f"stage {printable(name)}: {error}") from error
        store.add(output.layout)
        files = [store.folder / file.name for file in output.layout.files]
        tasks = all_tasks(output.placed, recipe.seed)
        self.made = _expressions(tasks, [file.key for file in files])
        self.container = settled(detect.read(place), self.made)
        store.sealed = True
        self.place = place
        notes = [*(note for index in indexes.values() for note in index.notes), *alignment.notes, *output.notes]
        self.notes = [self._told(note) for note in dict.fromkeys(notes)]
        warnings = [*(warning for index in indexes.values() for warning in index.warnings), *alignment.warnings]
        self.warnings = [self._told(warning) for warning in dict.fromkeys(warnings)]

    def _told(self, said: str) -> str:
        return said if said.startswith("stage ") else f"stage {printable(self.name)}: {said}"

    def index(self, state_dict: str | None, ema: str) -> CheckpointIndex:
        """Returns the index of the stage. Raises as :func:`streammerge.checkpoints.index.open_checkpoint` does."""
        if not self.container.pickled:
            state_dict = None  # it held several only in the files that the stage is made of
        index = _with_expressions(index_of(self.container, self.place, state_dict, ema), self.made)
        return replace(
            index,
            made_from={each.path: made for each, made in self.indexes.items()},
            notes=self.notes,
            warnings=self.warnings,
            declared={name: self.declared[name] for name in index.entries if name in self.declared},
        )


def _aligned(recipe: Recipe, indexes: Indexes) -> tuple[Recipe, Alignment, dict[str, DType]]:
    """Returns the recipe and the tensors of a stage; and the dtypes that they would be rounded to, if they are not."""
    if recipe.round:
        return *aligned(recipe, indexes), {}
    declared = {m.spec.name: m.spec.dtype for m in aligned(recipe, indexes)[1].merged}
    wide = recipe.compute_dtype or (DType.F64 if recipe.merge_method.compute == "float64" else DType.F32)
    rules = tuple(replace(rule, dtype=None) for rule in recipe.rules)
    return *aligned(replace(recipe, dtype=None, out_dtype=wide, rules=rules), indexes), declared


def _expressions(tasks: Tasks, files: list[str]) -> Stage:
    """Returns the expression for each tensor of a planned output. ``files``: the keys of its files."""
    made: dict[tuple[str, int], Source] = {}
    for task in tasks:
        if task.elems:
            made[files[task.file], task.offset] = expression(task)
    return made


def expression(task: MergeTask) -> Source:
    """Returns the tensor that a task makes, as a source of the same numbers."""
    if task.verbatim:
        return task.sources[0].named(task.out.name)
    parts = (task.parameters, task.compute, task.based, task.seed, task.out.name)
    return by_columns(Merged(task.out, task.method, task.sources, *parts))


@dataclass(slots=True)
class _Container(Container):
    """The container of a stage. Its tensors are expressions."""

    made: Stage = field(default_factory=dict)

    def locate(self, name: str, ref: TensorRef) -> Source:
        return _instead(Container.locate(self, name, ref), self.made)


def settled(container: Container, made: Stage) -> _Container:
    values: dict[str, Any] = {each.name: getattr(container, each.name) for each in fields(Container)}
    values["parts"] = {name: settled(part, made) for name, part in container.parts.items()}
    return _Container(**values, made=made)


def _with_expressions(index: CheckpointIndex, made: Stage) -> CheckpointIndex:
    """Returns the index of a stage's files with expressions as its tensors."""
    entries = {name: _instead(entry, made) for name, entry in index.entries.items()}
    parts = {name: _with_expressions(part, made) for name, part in index.parts.items()}
    return replace(index, entries=entries, homes={} if parts else _homes(index), parts=parts)


def _homes(index: CheckpointIndex) -> dict[str, Location]:
    """Returns the file that each tensor would be in."""
    if isinstance(index.entries, StoredTable):
        return {name: entry.begin[0] for name, entry in index.entries.items()}
    read = ((each.name, Container.locate(index.container, each.name, each.ref)) for each in index.selection.tensors)
    return {name: entry.begin[0] for name, entry in read if entry.begin[0] is not None}


def _instead(source: Source, made: Stage) -> Source:
    """Returns a source with expressions in place of what would be read from the stage's files."""
    if not isinstance(source, Stored | Inline):
        return source.with_parts(tuple(_instead(part, made) for part in source.parts)) if source.parts else source
    if not isinstance(getattr(source.path, "store", None), Unwritten):
        return source
    spec = source.spec
    if not spec.numel:
        return Constant(spec)
    pieces, at = [], source.offset
    while at < source.offset + spec.nbytes:
        piece = made.get((source.path.key, at))
        if piece is None or piece.spec.dtype != spec.dtype or not piece.spec.numel:
            raise FormatError(
                f"{printable(source.path)}: {printable(spec.name)} is a part of a tensor, which only a file can give; make "
                "this stage by a run of its own"
            )
        pieces.append(piece)
        at += piece.spec.nbytes
    whole = pieces[0] if len(pieces) == 1 else joined(spec.name, pieces)
    if whole.spec.shape != spec.shape:
        raise FormatError(f"{printable(source.path)}: {printable(spec.name)} has another shape than its tensor")
    return whole.named(spec.name)
