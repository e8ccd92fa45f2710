"""The tensors of an output: from what each is made, and how. Tensors that are alike are rows of tables, and not objects."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from streammerge.methods.contracts import MergeMethod
from streammerge.sources.base import Source
from streammerge.sources.table import StoredTable, named_kind
from streammerge.tensors.spec import TensorSpec


@dataclass(slots=True)
class Merged:
    """One tensor of the output, its sources, and the method that merges them.

    ``base_names`` are its names in the first checkpoint, more than one when tied; ``tied`` its further output names.
    ``rest`` has the rows behind those that are merged, where one model has more of them. ``added``: the first checkpoint
    lacks it. ``why``: the reason why it is copied. ``inner``: the method of its
    leading block, where the rest is the first's.
    """

    base_names: tuple[str, ...]
    spec: TensorSpec
    method: MergeMethod
    sources: tuple[Source, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    compute: str = "float32"
    based: bool = False
    tied: tuple[str, ...] = ()
    rest: Source | None = None
    added: bool = False
    why: str = ""
    inner: MergeMethod | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """How tensors are merged that differ in name and place only: as ``like``, from the tables of these numbers."""

    like: Merged
    tables: tuple[int, ...]


class Views:
    """The tables that tensors are merged from. ``theirs``: for each table, the row of each tensor of the first one, -1 for
    none; None if the rows are the same."""

    def __init__(self, tables: Sequence[StoredTable], theirs: Sequence[array[int] | None]) -> None:
        self.tables, self.theirs = tables, theirs

    def row(self, number: int, row: int) -> int:
        """Returns the row in a table of the tensor in this row of the first; -1 if there is none."""
        theirs = self.theirs[number]
        return row if theirs is None else theirs[row]

    def sources(self, way: Way, row: int) -> tuple[Source, ...]:
        return tuple([self.tables[number].at(self.row(number, row)) for number in way.tables])

    def spec(self, way: Way, row: int) -> TensorSpec:
        return named_kind(self.tables[0].names[row], way.like.spec)


class MergedTensors(Sequence[Merged]):
    """Tensors of an output in their order. Each is made when it is asked for.

    ``made``: the way of each tensor, or the tensor itself if it is like no other. ``rows``: the rows of the others in the
    first table.
    """

    def __init__(self, views: Views) -> None:
        self.views = views
        self.made: list[Way | Merged] = []
        self.rows = array("I")

    def add(self, made: Way | Merged, row: int = 0) -> None:
        self.made.append(made)
        self.rows.append(row)

    def take(self, numbers: Iterable[int]) -> MergedTensors:
        """Returns the tensors with these numbers."""
        taken = MergedTensors(self.views)
        for number in numbers:
            taken.add(self.made[number], self.rows[number])
        return taken

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[Merged]:
        return map(self._at, range(len(self.made)))

    @overload
    def __getitem__(self, number: int) -> Merged: ...
    @overload
    def __getitem__(self, number: slice) -> list[Merged]: ...
    def __getitem__(self, number: int | slice) -> Merged | list[Merged]:
        if isinstance(number, slice):
            return [self._at(each) for each in range(len(self.made))[number]]
        return self._at(number)

    def _at(self, number: int) -> Merged:
        way, row = self.made[number], self.rows[number]
        if isinstance(way, Merged):
            return way
        like, spec = way.like, self.views.spec(way, row)
        sources = self.views.sources(way, row)
        return Merged((spec.name,), spec, like.method, sources, like.parameters, like.compute, like.based)

    def columns(self) -> tuple[list[str], list[TensorSpec]]:
        """Returns the names of the tensors in the output, and their dtypes and shapes."""
        names, made = self.views.tables[0].names, self.made
        return (
            [names[row] if isinstance(m, Way) else m.spec.name for m, row in zip(made, self.rows, strict=True)],
            [m.like.spec if isinstance(m, Way) else m.spec for m in made],
        )

    def named(self) -> Iterator[tuple[str, Merged]]:
        """Yields the output name of each tensor, and a tensor that has all but its names and sources."""
        names = self.views.tables[0].names
        for made, row in zip(self.made, self.rows, strict=True):
            if made.__class__ is Way:
                yield names[row], made.like
            elif isinstance(made, Merged):
                yield made.spec.name, made


def named(merged: Sequence[Merged]) -> Iterator[tuple[str, Merged]]:
    """Yields the output name of each tensor, and a tensor that has all but its names and sources."""
    return merged.named() if isinstance(merged, MergedTensors) else ((m.spec.name, m) for m in merged)


def names_of(merged: Sequence[Merged]) -> list[str]:
    """Returns the output name of each tensor."""
    return merged.columns()[0] if isinstance(merged, MergedTensors) else [m.spec.name for m in merged]


def has_rows_of_first(merged: Sequence[Merged]) -> bool:
    """Whether the tensors are just the rows of the first table, under their names."""
    return isinstance(merged, MergedTensors) and merged.columns()[0] == merged.views.tables[0].names


def where(merged: Sequence[Merged], test: Callable[[str], bool]) -> Iterator[Merged]:
    """Yields the tensors whose name in the output, or in the first checkpoint, passes the test."""
    if isinstance(merged, MergedTensors):  # both names are equal
        return (merged[number] for number, (name, _) in enumerate(merged.named()) if test(name))
    return (m for m in merged if test(m.spec.name) or test(m.base_names[0]))


def unlike(merged: Sequence[Merged]) -> Iterable[Merged]:
    """Returns the tensors that are not of the first checkpoint's shape under one name, and some others."""
    return [m for m in merged.made if isinstance(m, Merged)] if isinstance(merged, MergedTensors) else merged


def elements(merged: Sequence[Merged]) -> Iterator[tuple[TensorSpec, int]]:
    """Yields dtype and shape of the tensors with the number of their elements, those of one kind together."""
    if not isinstance(merged, MergedTensors):
        yield from ((m.spec, m.spec.numel) for m in merged)
        return
    counts = dict[int, int]()
    for made in merged.made:
        counts[id(made)] = counts.get(id(made), 0) + 1
    for made in {id(made): made for made in merged.made}.values():
        spec = made.like.spec if isinstance(made, Way) else made.spec
        yield spec, spec.numel * counts[id(made)]
