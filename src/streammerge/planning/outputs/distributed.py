"""Plans an output that is a folder of torch.distributed.checkpoint, where the first input is one.

Such a folder is what training goes on from. So it also has what stands beside the weights in the first input: counters,
states of generators of random numbers, and on request the optimizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats import dcp_writer
from streammerge.formats.base import LayoutFile
from streammerge.formats.dcp import BESIDE, Saved
from streammerge.formats.dcp_names import is_cut_master, is_optimizer_item, weight_of_master
from streammerge.formats.dcp_writer import Piece, Whole
from streammerge.pickles.training_state import is_training_state
from streammerge.planning.aligned import Merged
from streammerge.planning.dispositions.entries import OPTIMIZER
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.layout import Placed, blank_sums, recipe_record
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.sources.rows import rows_of
from streammerge.sources.stored import Stored
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

_MANY = (
    (re.compile(r".*\.bucket_idx_\d+\.param"), "in buckets"),
    (re.compile(r".*\.param_state(/shard_[\d._]+)?"), "in one object"),
)
"""An optimizer's copies in float32 of many weights as Megatron calls them, and how they lie: one behind the other
(``dp_reshardable``), or all in one object (``dp_zero_gather_scatter``, which NeMo 2 writes)."""
_CUT = "in pieces of its ranks"
"""How the copy of one weight lies that is cut into flat pieces (``fully_sharded_model_space`` until Megatron 0.15)."""


def is_distributed(recipe: Recipe, part: CheckpointIndex) -> bool:
    """Whether a model of an output folder is written as a distributed checkpoint.

    A conversion writes safetensors, and so does a merge whose recipe tells the size of shards.
    """
    saved = isinstance(part.container.distributed, Saved)
    return saved and recipe_record(recipe) is not None and recipe.output.max_shard_size is None


@dataclass(slots=True)
class DistributedFiles:
    """The files of a distributed checkpoint. ``placed``: what they hold; the numbers of files count from 0. ``sums``: blank
    checksums by file. ``copied``: (source, name) of files that other programs need beside them."""

    files: list[LayoutFile]
    placed: list[Placed]
    sums: dict[str, str]
    copied: list[tuple[Location, str]] = field(default_factory=list)


def distributed_files(
    recipe: Recipe, part: CheckpointIndex, merged: Sequence[Merged], dispositions: Dispositions
) -> DistributedFiles:
    """Plans the files. Raises RecipeError if two tensors would have one name."""
    saved: Saved = part.container.distributed
    made = _Contents(saved, part, recipe.output.keep_optimizer)
    for m in merged:
        made.add_merged(m)
    made.add_others(dispositions)
    files, places = dcp_writer.plan_files(made.pieces, made.tensors, made.paths)
    placed = [
        Placed(spec, m, places[spec.name][0], places[spec.name][1], source) for spec, m, source in made.placed.values()
    ]
    sizes: list[list[tuple[int, int]]] = [[] for _ in files]
    for each in placed:
        sizes[each.file].append((each.offset, each.spec.nbytes))
    sums = {
        file.name: blank_sums([nbytes for _, nbytes in sorted(own)]) for file, own in zip(files, sizes, strict=True) if own
    }
    beside = [(file, name) for name in BESIDE if (file := saved.home.folder / name).is_file()]
    dispositions.add("file", [name for _, name in beside], "copied", "needed by the program that has saved the checkpoint")
    return DistributedFiles(files, placed, sums, beside)


class _Contents:
    """The pieces of the output, and what each is made from."""

    def __init__(self, saved: Saved, part: CheckpointIndex, keep_optimizer: bool) -> None:
        self.saved, self.part, self.keep_optimizer = saved, part, keep_optimizer
        self.full = {each.name: each.ref.entry.spec.name for each in part.selection.tensors if each.ref.entry is not None}
        self.pieces: list[Piece] = []
        self.tensors: dict[str, Whole] = {}
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.placed: dict[str, tuple[TensorSpec, Merged | None, Source | None]] = {}
        self.merged: dict[str, Merged] = {}

    def add_merged(self, m: Merged) -> None:
        for name in (m.spec.name, *m.tied):
            full, path = self._full(m.base_names[0], name)
            self._add_blocks(full, m)
            self._named(full, m.spec, path)
            self.merged[full] = m

    def _add_blocks(self, full: str, m: Merged) -> None:
        blocks = _blocks(m.spec.shape, m.spec.nbytes) if _may_be_cut(m) else [(0, 0)]
        for start, stop in blocks:
            of_block = m if len(blocks) == 1 else replace(m, sources=tuple(rows_of(s, start, stop) for s in m.sources))
            self._add(full, m.spec, (start, stop), len(blocks) > 1, of_block, None)

    def _full(self, base: str, name: str) -> tuple[str, tuple[Any, ...]]:
        """Returns the name of a tensor in the checkpoint, and the keys that lead to it; () if they are not known.

        A tensor that the first input lacks, or that was renamed, stands where others of the first input do.
        """
        like = base if base in self.full else next(iter(self.full))
        full, paths = self.full[like], self.saved.metadata.paths
        above, path = full.removesuffix(like), paths.get(full, ())
        if like == name:
            return full, path
        return above + name, (*path[:-1], name) if path else ()

    def _named(self, full: str, spec: TensorSpec, path: tuple[Any, ...]) -> None:
        if full in self.tensors:
            raise RecipeError(f"two tensors would be called {printable(full)} in a distributed checkpoint")
        self.tensors[full] = Whole(spec.dtype.torch_name, spec.shape)
        if path:
            self.paths[full] = path

    def _add(
        self, full: str, spec: TensorSpec, block: tuple[int, int], cut: bool, m: Merged | None, source: Source | None
    ) -> None:
        """Adds a tensor, or a block of its rows."""
        start, stop = block
        offsets, sizes = (0,) * len(spec.shape), spec.shape
        label = full
        if cut:
            offsets, sizes, label = (start, *offsets[1:]), (stop - start, *sizes[1:]), f"{full}[{start}:{stop}]"
        own = TensorSpec(label, spec.dtype, sizes)
        self.pieces.append(Piece(label, full, own.nbytes, (offsets, sizes), spec.dtype))
        self.placed[label] = (own, replace(m, spec=own, tied=()) if m is not None else None, source)

    def add_others(self, dispositions: Dispositions) -> None:
        """Adds what stands beside the weights in the first input."""
        chosen = set(self.full.values())
        copies = {
            found.ref.entry.spec.name
            for candidate in self.part.selection.copies
            for found in candidate.tensors
            if found.ref.entry is not None
        }
        for source in self.part.container.arrays:
            name = source.spec.name
            if name not in chosen and name not in copies and (self.keep_optimizer or not self._is_state(name)):
                self._copy_tensor(name, source)
        dispositions.add("entry", sorted(copies - chosen), "dropped", "another copy of the weights, which would be stale")
        kept, left = list[str](), list[str]()
        metadata = self.saved.metadata
        for name in (*metadata.objects, *metadata.tensors):
            (kept if self.keep_optimizer or not self._is_state(name) else left).append(name)
        shapes = {full: m.spec.shape for full, m in self.merged.items()}
        masters = {name: m for name in kept if (m := self._weight_of(name, shapes)) is not None}
        for name in kept:
            if name in masters:
                self._add_master(name, masters[name])
            else:
                self._copy_items(name)
        copied = [name for name in kept if name not in masters]
        dispositions.add("entry", copied, "copied", "of the first input, beside its weights")
        dispositions.add("entry", [*masters], "merged", "the optimizer's copies of the weights in float32")
        dispositions.add("entry", left, "dropped", OPTIMIZER)

    def _weight_of(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Merged | None:
        """Returns the merged weight of which an entry is the optimizer's copy in float32, None for any other entry.

        Training would go on from these copies, so they must not be the first input's. Raises RecipeError for copies whose
        weights are not known.
        """
        if not self._is_state(name):
            return None
        for pattern, how in _MANY:
            if pattern.fullmatch(name):
                raise self._other_form(name, how)
        entry = self.saved.metadata.tensors.get(name)
        if entry is None:
            return None
        weight = weight_of_master(name, entry, shapes)
        if weight is None and is_cut_master(name, entry, shapes):
            raise self._other_form(name, _CUT)
        return None if weight is None or self.merged[weight].spec.dtype.kind != "float" else self.merged[weight]

    def _other_form(self, name: str, how: str) -> RecipeError:
        return RecipeError(
            f"{self.saved.home.where}: the optimizer holds the weights in float32 {how} ({printable(name)}), from "
            "which training would go on instead of from the merge; leave `keep_optimizer` out, or save the checkpoint "
            "with Megatron's option dist-ckpt-optim-fully-reshardable"
        )

    def _add_master(self, name: str, m: Merged) -> None:
        """Adds the merge in float32, so that the weight beside it is this number rounded."""
        own = replace(m, spec=TensorSpec(name, DType.F32, m.spec.shape), tied=())
        self._add_blocks(name, own)
        self._named(name, own.spec, self.saved.metadata.paths.get(name, ()))

    def _is_state(self, name: str) -> bool:
        """Whether an entry is the state of an optimizer or a scheduler, which is stale after a merge."""
        path = self.saved.metadata.paths.get(name, (name,))
        keys = path if len(path) > 1 else tuple(name.split(".", 2)[:2])
        return is_optimizer_item(name, path) or any(is_training_state(key, None) for key in keys[:2])

    def _copy_tensor(self, name: str, source: Source) -> None:
        blocks = _blocks(source.spec.shape, source.spec.nbytes)
        for start, stop in blocks:
            of_block = source if len(blocks) == 1 else rows_of(source, start, stop)
            self._add(name, source.spec, (start, stop), len(blocks) > 1, None, of_block)
        self._named(name, source.spec, self.saved.metadata.paths.get(name, ()))

    def _copy_items(self, name: str) -> None:
        """Adds an entry that is copied as it is, in the pieces that it has in the first input."""
        metadata = self.saved.metadata
        entry = metadata.tensors.get(name)
        boxes = [None] if entry is None else [box for box in entry.boxes if math.prod(box[1])]
        if entry is not None:
            self.tensors[name] = Whole(entry.dtype_name, entry.shape)
        if path := metadata.paths.get(name):
            self.paths[name] = path
        for number, box in enumerate(boxes):
            item = metadata.items.get((name, box and box[0]))
            if item is None:
                raise RecipeError(f"{self.saved.home.where} does not tell where its entry {listed([name])} lies")
            label = f"{name} (item {number})"
            spec = TensorSpec(label, DType.U8, (item.nbytes,))
            self.pieces.append(Piece(label, name, item.nbytes, box, None, item.transforms))
            self.placed[label] = (spec, None, Stored(spec, *self.saved.place(item, name)))


def _may_be_cut(m: Merged) -> bool:
    """Whether blocks of rows of a tensor can be merged by themselves."""
    return (
        m.method.pointwise and m.rest is None and m.inner is None and all(s.spec.shape == m.spec.shape for s in m.sources)
    )


def _blocks(shape: tuple[int, ...], nbytes: int) -> list[tuple[int, int]]:
    """Returns the rows of each block of a tensor; (0, 0) for a tensor that is one block."""
    if not shape or nbytes <= dcp_writer.BLOCK_BYTES or shape[0] < 2:
        return [(0, 0)]
    return list(_steps(shape[0], max(dcp_writer.BLOCK_BYTES // (nbytes // shape[0]), 1)))


def _steps(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
