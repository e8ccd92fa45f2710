"""The plan of any kind of output, and the parts of the recipe and receipt that each of them holds."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from streammerge.checkpoints.index import CheckpointIndex
from streammerge.formats.base import LayoutFile, Literal
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.methods.registry import COPY
from streammerge.planning.aligned import Merged, MergedTensors
from streammerge.planning.alignment import Alignment
from streammerge.planning.conservation import Account, accounts_of
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.receipt import InputSpans, Receipt
from streammerge.recipe.document import to_json
from streammerge.recipe.locations import travelling
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.tensors.spec import TensorSpec

PLAIN_ENDINGS = (".pkl", ".pickle")
"""Of files that are a pickle and nothing else."""


class Layout(NamedTuple):
    """The files of a planned output. ``side_files``: (source, name) of files that are copied unchanged."""

    files: tuple[LayoutFile, ...]
    receipt: Receipt
    as_folder: bool = False
    side_files: tuple[tuple[Location, str], ...] = ()

    pickle_bytes: int = 0
    """Memory for the pickle while it is written: the pickle itself, and its copies with the checksums."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(slots=True, eq=False)
class Placed:
    """A tensor of the output and its place. ``merged`` is None for a tensor that is copied from the first input beside the
    merge; then ``source`` is its source."""

    spec: TensorSpec
    merged: Merged | None
    file: int
    offset: int
    source: Source | None = None


@dataclass(slots=True, eq=False)
class PlacedTensors:
    """Tensors of one file of the output. ``starts``: where each begins in it."""

    merged: MergedTensors
    file: int
    starts: array[int]


@dataclass(slots=True, eq=False)
class PlannedOutput:
    """The layout, the tensors with their places, and notes for the user. ``inputs``: see :class:`Plan`.

    ``dispositions``: of all that the receipt records. ``accounts``: what becomes of the tensors of each checkpoint.
    """

    layout: Layout
    placed: Sequence[Placed | PlacedTensors]
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, InputSpans] = field(default_factory=dict)
    dispositions: Dispositions = field(default_factory=Dispositions)
    accounts: Sequence[Account] = ()


class Accounting(NamedTuple):
    """A receipt that still lacks the accounts of its checkpoints. ``named``: their names in it -> their indexes."""

    receipt: Receipt
    named: Mapping[str, CheckpointIndex]
    alignment: Alignment

    def of(self, made: Iterable[Merged | MergedTensors | Source]) -> tuple[Receipt, list[Account]]:
        """Returns the receipt of an output that holds these tensors, and the accounts in it."""
        accounts = accounts_of(self.named, self.alignment, made)
        return replace(self.receipt, accounts=[each.record() for each in accounts]), accounts


_OF_QUANTISED = ("_quantization_metadata",)
"""Metadata that states how weights are quantised."""


def stays_enclosed(name: str, first: CheckpointIndex) -> bool:
    """Whether a file lies in an archive like that of the first input: by its ending."""
    container = first.container
    return container.enclosed is not None and bool(container.path.suffix) and name.endswith(container.path.suffix)


def recipe_record(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the recipe that made the output, without paths of this machine. Returns None for a conversion."""
    conversion = recipe.merge_method is COPY and len(recipe.checkpoints) == 1
    return None if conversion else travelling(recipe).to_dict()


def metadata_of(recipe: Recipe, first: CheckpointIndex) -> dict[str, str]:
    """Returns the first checkpoint's own metadata, ``format: pt`` and, for a merge, the recipe."""
    left = (RECIPE_KEY, RECEIPT_KEY, *(_OF_QUANTISED if first.quantised else ()))
    kept = {k: v for k, v in first.metadata.items() if not _is_hash(k) and k not in left}
    record = recipe_record(recipe)
    return kept | {"format": "pt"} | ({RECIPE_KEY: to_json(record)} if record else {})


def hashes_of(first: CheckpointIndex) -> list[str]:
    """Returns the keys of the metadata that hold a hash: of this file, or of one that it was trained on. A program that
    finds one in another file takes that for the first."""
    return [key for key in first.metadata if _is_hash(key)]


def _is_hash(key: str) -> bool:
    return "hash" in key.lower()


def blank_sums(sizes: list[int]) -> str:
    """Returns zeros in place of a file's checksums: one per tensor that is not empty, and one for the other bytes.

    ``sizes``: the bytes of each tensor.
    """
    return "0" * 8 * (sum(size > 0 for size in sizes) + 1)


def text_file(name: str, text: str) -> LayoutFile:
    """Returns the plan of a file of this text in UTF-8."""
    data = text.encode()
    return LayoutFile(name, len(data), {}, (Literal(0, data),))
