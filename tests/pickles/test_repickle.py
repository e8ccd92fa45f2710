"""A tree written again is what Python reads. In whole files: planning/outputs/test_pickled.py."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import streammerge as sm
from streammerge.pickles.repickle import Edit, repickle
from streammerge.pickles.unpickle import unpickle

from .test_unpickle import VALUES


@settings(deadline=None)
@given(VALUES)
def test_plain_values_come_back(value: Any) -> None:
    data = repickle(value)
    assert pickle.loads(data) == value
    assert unpickle(data) == value


@settings(deadline=None)
@given(VALUES, some.sampled_from(range(6)))
def test_writing_is_the_inverse_of_reading(value: Any, protocol: int) -> None:
    once = repickle(unpickle(pickle.dumps([value, value], protocol)))
    assert pickle.loads(once) == [value, value]
    assert repickle(unpickle(once)) == once


@pytest.mark.parametrize("count", [0, 1, 255, 256, 999, 1000, 1001, 2500])
def test_many_items_and_many_memo_entries(count: int) -> None:
    value = {"list": list(range(count)), "map": {f"k{n}": [n] for n in range(count)}}
    assert pickle.loads(repickle(value)) == value


@pytest.mark.parametrize(
    "value", [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 255, 256, 65535, 65536, -1, 2**2040, -(2**2050)]
)
def test_integers_of_every_width(value: int) -> None:
    assert pickle.loads(repickle(value)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_classes_and_order_survive(protocol: int) -> None:
    value = {"f": Fraction(3, 4), "o": OrderedDict(b=1, a=2), "s": {1, 2}, "c": 1 + 2j, "t": Fraction}
    back = pickle.loads(repickle(unpickle(pickle.dumps(value, protocol))))
    assert back == value
    assert type(back["o"]) is OrderedDict
    assert list(back["o"]) == ["b", "a"]


def test_shared_objects_stay_shared_and_cycles_stay_cycles() -> None:
    value: dict[str, Any] = {"one": [1]}
    value["two"], value["itself"] = value["one"], value
    back = pickle.loads(repickle(value))
    assert back["one"] is back["two"]
    assert back["itself"] is back


def test_edits_change_what_is_written_and_not_the_tree() -> None:
    inner = {"a": 1, "b": 2, "c": 3}
    tree = {"x": inner, "y": [inner, "old"], "z": (4,)}
    edit = Edit(
        replaced={id(tree["z"]): "new"},
        dropped={(id(inner), "a")},
        values={(id(inner), "b"): 20},
        renamed={(id(inner), "c"): "d"},
    )
    assert pickle.loads(repickle(tree, edit)) == {"x": {"b": 20, "d": 3}, "y": [{"b": 20, "d": 3}, "old"], "z": "new"}
    assert tree == {"x": {"a": 1, "b": 2, "c": 3}, "y": [inner, "old"], "z": (4,)}


def test_what_cannot_be_written_is_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for tree in (deep, object()):
        with pytest.raises(sm.FormatError, match=r"write a \.safetensors file instead"):
            repickle(tree)
    while deep:  # a nest this deep must not be freed at once
        deep = deep.pop()
