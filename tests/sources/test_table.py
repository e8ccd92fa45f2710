"""Tensors as columns are the same tensors as one object each."""

from __future__ import annotations

from array import array

import pytest

from streammerge.sources.stored import Stored
from streammerge.sources.table import StoredTable, concatenated, same_names, same_tensors
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec

KINDS = [TensorSpec("", DType.F32, (2, 3)), TensorSpec("", DType.BF16, ()), TensorSpec("", DType.F32, (0, 4))]


def table(names: str = "abcd", path: str = "file", begin: int = 8) -> StoredTable:
    """Returns tensors of the three kinds in turn, back to back."""
    kinds = [KINDS[number % 3] for number in range(len(names))]
    starts, cursor = [], begin
    for kind in kinds:
        starts.append(cursor)
        cursor += kind.nbytes
    return StoredTable(list(names), kinds, [path], array("I", [0] * len(names)), array("Q", starts))


def objects(made: StoredTable) -> dict[str, Stored]:
    """Returns the same tensors, each made from the columns here."""
    rows = zip(made.names, made.kinds, made.files, made.starts, strict=True)
    return {name: Stored(TensorSpec(name, k.dtype, k.shape), made.paths[file], start) for name, k, file, start in rows}


@pytest.mark.parametrize("names", ["", "a", "abcd", "abcdefghijk"])
def test_a_table_is_the_mapping_of_its_tensors(names: str) -> None:
    made = table(names)
    expected = objects(made)
    assert dict(made) == expected
    assert list(made) == list(names)
    assert list(made.values()) == list(expected.values())
    assert list(made.items()) == list(expected.items())
    assert made.keys() == expected.keys()
    assert {name: (spec.dtype, spec.shape) for name, spec in made.specs().items()} == {
        name: (entry.spec.dtype, entry.spec.shape) for name, entry in expected.items()
    }
    assert [spec.nbytes for spec in made.specs().values()] == [entry.nbytes for entry in expected.values()]
    assert made.nbytes == sum(entry.nbytes for entry in expected.values())
    assert made.numel == sum(entry.spec.numel for entry in expected.values())
    assert "z" not in made
    with pytest.raises(KeyError):
        made["z"]


def test_tables_are_joined_row_by_row() -> None:
    one, two, three = table("ab", "one"), table("", "two"), table("cde", "three", 100)
    made = concatenated([one, two, three])
    assert dict(made) == {**objects(one), **objects(three)}
    assert made.paths == ["one", "two", "three"]
    again = concatenated([made, table("f", "four")])
    assert dict(again) == {**objects(made), **objects(table("f", "four"))}


def test_spans_leave_out_what_is_empty_and_join_neighbours() -> None:
    made = concatenated([table("abcd", "one", 8), table("e", "two", 64)])
    assert made.spans(joined=False) == {"one": [(8, 24), (32, 2), (34, 24)], "two": [(64, 24)]}
    assert made.spans(joined=True) == {"one": [(8, 50)], "two": [(64, 24)]}
    gap = StoredTable(["b", "a"], KINDS[:1] * 2, ["f"], array("I", [0, 0]), array("Q", [50, 8]))
    assert gap.spans(joined=True) == gap.spans(joined=False) == {"f": [(8, 24), (50, 24)]}


def test_equal_columns_are_held_once() -> None:
    one, two, other = table("abcd", "one"), table("abcd", "two"), table("abce", "three")
    assert same_names(one, two)
    assert not same_tensors(one, two)
    expected = objects(two)
    for each in (two, other):
        each.share(one)
    assert two.names is one.names
    assert two.starts is one.starts
    assert same_tensors(one, two)
    assert not same_names(one, other)
    assert not same_tensors(one, other)
    assert dict(two) == expected, "the tensors stay those of its own file"
    assert same_names(one, dict.fromkeys("dcba"))


def test_no_two_tensors_have_one_shape_object() -> None:
    """A pickle shows which tuples are one object, so the bytes of a .pth would depend on it."""
    made = table("abcd")
    assert made["a"].spec.shape == made["d"].spec.shape
    assert made["a"].spec.shape is not made["d"].spec.shape
