"""Plain byte ranges as columns. An object for each tensor would take ten times the memory of its entry in a header."""

from __future__ import annotations

from array import array
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView

from streammerge.sources.base import BlobPath
from streammerge.sources.stored import Stored
from streammerge.tensors.spec import TensorSpec

_MOST_SEARCHES = 64


class StoredTable(Mapping[str, Stored]):
    """The tensors of a checkpoint, name -> :class:`Stored`, which is made when it is asked for.

    One row for each tensor, in the order of the checkpoint. ``names``: their names, each once. ``kinds``: dtype and shape,
    as a specification without a name; equal ones are mostly the same object. ``paths``: the files. ``files``: the number
    of each tensor's file among them. ``starts``: the offset of its bytes in that file.
    """

    __slots__ = ("_rows", "_searches", "files", "kinds", "names", "paths", "starts")

    def __init__(
        self,
        names: list[str],
        kinds: list[TensorSpec],
        paths: list[BlobPath],
        files: array[int],
        starts: array[int],
    ) -> None:
        self.names, self.kinds, self.paths, self.files, self.starts = names, kinds, paths, files, starts
        self._rows: dict[str, int] | None = None
        self._searches = 0

    @property
    def rows(self) -> dict[str, int]:
        """Name -> row."""
        if self._rows is None:
            self._rows = dict(zip(self.names, range(len(self.names)), strict=True))
        return self._rows

    def row(self, name: str) -> int:
        """Returns the row of a name. Raises KeyError if there is none.

        The first few names are searched for, because most merges ask for no more, and a dictionary of all names takes as
        much memory as all columns together.
        """
        if self._rows is None and self._searches < _MOST_SEARCHES:
            self._searches += 1
            try:
                return self.names.index(name)
            except ValueError:
                raise KeyError(name) from None
        return self.rows[name]

    def share(self, other: StoredTable) -> None:
        """Takes over the columns of another table that are equal, so that they are held once."""
        if self.names is not other.names and self.names == other.names:
            self.names, self._rows = other.names, other._rows
        if self.kinds is not other.kinds and self.kinds == other.kinds:
            self.kinds = other.kinds
        if self.starts is not other.starts and self.starts == other.starts:
            self.starts = other.starts

    def at(self, row: int) -> Stored:
        """Returns the tensor of a row."""
        spec = named_kind(self.names[row], self.kinds[row])
        return Stored(spec, self.paths[self.files[row]], self.starts[row])

    def distinct(self) -> dict[int, TensorSpec]:
        """Returns each kind once, by its identity."""
        return {id(kind): kind for kind in self.kinds}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Returns name -> dtype and shape."""
        return _Specs(self)

    @property
    def numel(self) -> int:
        return sum([kind.numel for kind in self.kinds])

    @property
    def nbytes(self) -> int:
        return sum([kind.nbytes for kind in self.kinds])

    def spans(self, joined: bool) -> dict[BlobPath, list[tuple[int, int]]]:
        """Returns the (offset, bytes) of the tensors that are not empty, by file, sorted.

        ``joined``: as few as possible, with neighbours as one.
        """
        found: dict[BlobPath, list[tuple[int, int]]] = {path: [] for path in self.paths}
        lists = [found[path] for path in self.paths]
        for file, start, kind in zip(self.files, self.starts, self.kinds, strict=True):
            nbytes, there = kind.nbytes, lists[file]
            if not nbytes:
                continue
            if joined and there and sum(there[-1]) == start:
                there[-1] = (there[-1][0], there[-1][1] + nbytes)
            else:
                there.append((start, nbytes))
        return {path: sorted(each) for path, each in found.items()}

    def begins(self) -> dict[BlobPath, array[int]]:
        """Returns where the tensors that are not empty begin, by file."""
        columns = [array("Q") for _ in self.paths]
        for file, start, kind in zip(self.files, self.starts, self.kinds, strict=True):
            if kind.nbytes:
                columns[file].append(start)
        return dict(zip(self.paths, columns, strict=True))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.row(name) >= 0
        except KeyError:
            return False

    def __getitem__(self, name: str) -> Stored:
        return self.at(self.row(name))

    def keys(self) -> KeysView[str]:
        return self.rows.keys()

    def values(self) -> ValuesView[Stored]:
        return _Values(self)

    def items(self) -> ItemsView[str, Stored]:
        return _Items(self)


def named_kind(name: str, kind: TensorSpec) -> TensorSpec:
    """Returns the specification of a tensor of this kind.

    Its shape is a tuple of its own. A pickle shows which tuples are one object, and no byte may depend on what is held
    once.
    """
    return TensorSpec(name, kind.dtype, (*kind.shape,))


class _Values(ValuesView[Stored]):
    """The tensors in their order, without a search by name."""

    _mapping: StoredTable

    def __iter__(self) -> Iterator[Stored]:
        return map(self._mapping.at, range(len(self._mapping)))


class _Items(ItemsView[str, Stored]):
    _mapping: StoredTable

    def __iter__(self) -> Iterator[tuple[str, Stored]]:
        return zip(self._mapping.names, map(self._mapping.at, range(len(self._mapping))), strict=True)


class _Specs(Mapping[str, TensorSpec]):
    def __init__(self, table: StoredTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.names)

    def __getitem__(self, name: str) -> TensorSpec:
        return self.table.kinds[self.table.rows[name]]

    def values(self) -> ValuesView[TensorSpec]:
        return _Kinds(self)

    def items(self) -> ItemsView[str, TensorSpec]:
        return _NamedKinds(self)


class _Kinds(ValuesView[TensorSpec]):
    """Dtypes and shapes in their order, without a search by name."""

    _mapping: _Specs

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self._mapping.table.kinds)


class _NamedKinds(ItemsView[str, TensorSpec]):
    _mapping: _Specs

    def __iter__(self) -> Iterator[tuple[str, TensorSpec]]:
        return zip(self._mapping.table.names, self._mapping.table.kinds, strict=True)


def concatenated(tables: Iterable[StoredTable]) -> StoredTable:
    """Returns the rows of several tables, one after the other. No name may be in two of them."""
    made = StoredTable([], [], [], array("I"), array("Q"))
    for table in tables:
        first = len(made.paths)
        made.names += table.names
        made.kinds += table.kinds
        made.paths += table.paths
        made.files.extend(array("I", [first]) * len(table) if len(table.paths) == 1 else [first + n for n in table.files])
        made.starts.extend(table.starts)
    return made


def same_names(one: Mapping[str, object], two: Mapping[str, object]) -> bool:
    """Whether two mappings have the same names, in any order."""
    if isinstance(one, StoredTable) and isinstance(two, StoredTable) and one.names is two.names:
        return True
    return one.keys() == two.keys()


def same_tensors(one: Mapping[str, object], two: Mapping[str, object]) -> bool:
    """Whether two mappings are tables that hold names, dtypes and shapes once for both."""
    if isinstance(one, StoredTable) and isinstance(two, StoredTable):
        return one.names is two.names and one.kinds is two.kinds
    return False
