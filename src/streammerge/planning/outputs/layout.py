"""What every kind of output is planned as, and what all of them say of their making."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from streammerge.formats.base import LayoutFile
from streammerge.methods.registry import COPY
from streammerge.planning.alignment import Merged
from streammerge.planning.receipt import InputSpans, Receipt
from streammerge.recipe.locations import resolved
from streammerge.recipe.model import Recipe
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.tensors.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """The output before it exists. ``side_files`` are copied as they are: (source, name)."""

    files: tuple[LayoutFile, ...]
    receipt: Receipt
    as_folder: bool = False
    side_files: tuple[tuple[Location, str], ...] = ()

    pickle_bytes: int = 0
    """Data of pickles that is held while it is written: the pickle, and copies of it with its checksums."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(slots=True)
class Placed:
    """A tensor of the output and where it goes; ``source`` for those copied from the first input beside the merge."""

    spec: TensorSpec
    merged: Merged | None
    file: int
    offset: int
    source: Source | None = None


@dataclass(slots=True)
class Output:
    """Layout, tensors with their places, and what to tell about it. ``inputs``: see :class:`Plan`."""

    layout: Layout
    placed: list[Placed]
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, InputSpans] = field(default_factory=dict)


def recipe_record(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe that made the output, without any path of this machine; none for a conversion."""
    conversion = recipe.merge_method is COPY and len(recipe.checkpoints) == 1
    return None if conversion else resolved(recipe).to_dict()


def blank_sums(sizes: list[int]) -> str:
    """Room for the checksums of a file with tensors of these sizes, and of what is around them."""
    return "0" * 8 * (sum(size > 0 for size in sizes) + 1)
