"""Plain values come out as Python reads them; everything else stays inert. Hostile ones: formats/test_hostile.py."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import streammerge as sm
from streammerge.pickles.tree import Global, Instance, OrderedTree, PersistentId
from streammerge.pickles.unpickle import unpickle

PROTOCOLS = range(6)
LEAVES = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text()
LEAVES |= some.binary(min_size=1)  # old protocols write no bytes as a call, which stays inert
KEYS = some.text() | some.integers(-(2**63), 2**63)  # larger ones are refused
VALUES = some.recursive(
    LEAVES,
    lambda inner: some.lists(inner) | some.tuples(inner, inner) | some.dictionaries(KEYS, inner),
)


@settings(deadline=None)
@given(VALUES, some.sampled_from(PROTOCOLS))
def test_plain_values_are_what_pickle_reads(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert unpickle(data) == pickle.loads(data) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_objects_stay_shared_and_cycles_stay_cycles(protocol: int) -> None:
    shared: list[Any] = [1]
    value: dict[str, Any] = {"one": shared, "two": shared, "copy": [1]}
    value["itself"] = value
    tree = unpickle(pickle.dumps(value, protocol))
    assert tree["one"] is tree["two"]
    assert tree["one"] is not tree["copy"]
    assert tree["itself"] is tree


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_made_of_a_class(protocol: int) -> None:
    tree = unpickle(pickle.dumps({"f": Fraction(3, 4), "c": OrderedDict(a=1), "t": Fraction}, protocol))
    assert isinstance(tree["f"], Instance)
    assert tree["f"].path == "fractions.Fraction"
    assert isinstance(tree["c"], OrderedTree)
    assert tree["c"] == {"a": 1}
    assert tree["t"] == Global("fractions", "Fraction")


def test_persistent_ids_are_resolved_by_the_caller() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("outside", 7) if isinstance(thing, Fraction) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump([Fraction(1), 5])
    assert unpickle(stream.getvalue(), lambda pid: pid) == [("outside", 7), 5]
    inert = unpickle(stream.getvalue())[0]
    assert isinstance(inert, PersistentId)
    assert inert.value == ("outside", 7)


def test_a_stream_is_left_behind_its_end() -> None:
    stream = io.BytesIO(b"before" + pickle.dumps([1]) + pickle.dumps("two") + b"rest")
    stream.seek(6)
    assert [unpickle(stream), unpickle(stream), stream.read()] == [[1], "two", b"rest"]


@pytest.mark.parametrize("data", [b"", b".", b"N", b"\xffN.", pickle.dumps([1, "x" * 300])[:-2], b"h\x05.", b"}K\x01s."])
def test_damage_is_one_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(sm.FormatError, match="the file: damaged"):
        unpickle(data, where="the file")
