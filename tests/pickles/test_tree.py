"""What a tree shows of itself."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from streammerge.pickles.tree import Global, Instance, PersistentId, children, mapping_items, number, plain, walk
from streammerge.pickles.unpickle import unpickle


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i2", "i4", "i8", "u4", "u8"])
def test_numpy_numbers_are_numbers(kind: str) -> None:
    value = np.dtype(kind).type(3)
    assert number(unpickle(pickle.dumps(value))) == 3


@pytest.mark.parametrize("value", [True, None, "3", [3], (3,), b"3", 3j])
def test_what_is_no_number(value: Any) -> None:
    assert number(value) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": [1, 2.5, None, True, "x"]}, {"a": [1, 2.5, None, True, "x"]}),
        (float("inf"), "inf"),
        ((1, (2,)), [1, [2]]),
        ({1: 2, None: 3, (1, 2): 4}, {"1": 2, "None": 3, "(1, 2)": 4}),
        ({5, 6}, [5, 6]),
        (b"ab", {"$bytes": "6162", "length": 2}),
        (b"x" * 65, {"$bytes": "78" * 64 + "...", "length": 65}),
        (Fraction, {"$global": "fractions.Fraction"}),
        (Fraction(3, 4), {"$object": "fractions.Fraction", "args": [3, 4]}),
    ],
)
def test_trees_as_plain_data(value: Any, shown: Any) -> None:
    found = plain(unpickle(pickle.dumps(value)))
    if isinstance(value, Fraction):  # its arguments are the text or the pair, by Python's version
        assert found["$object"] == shown["$object"]
    else:
        assert found == shown
    json.dumps(found, allow_nan=False)


def test_what_is_shared_without_end_is_cut() -> None:
    bomb: list[Any] = [1]
    for _ in range(60):
        bomb = [bomb, bomb]
    assert len(json.dumps(plain(bomb))) < 10_000_000
    itself: list[Any] = []
    itself.append(itself)
    assert "..." in json.dumps(plain(itself))


def test_walking_meets_each_node_once_parents_first() -> None:
    shared = [1]
    key = Global("m", "K")
    tree: dict[Any, Any] = {"a": {"b": shared}, "c": (shared, PersistentId(("x",))), key: []}
    tree["itself"] = tree
    met = list(walk(tree))
    assert [path for path, node in met if node is shared] == [("a", "b")]
    assert [path for path, node in met if node is tree] == [()]
    assert [node for _, node in met if node is key] == [key]
    assert not any(isinstance(node, int | str) for _, node in met)
    assert ("a", "b") not in [path for path, _ in walk(tree, {(id(tree), "a")})]
    deep: Any = [1]
    for _ in range(50_000):
        deep = [deep]
    assert len(list(walk(deep))) <= 2000
    while isinstance(deep, list):  # a nest this deep must not be freed at once
        deep = deep.pop()


def test_mappings_and_children() -> None:
    made = Instance("new", Global("m", "C"), (1,), items=[("k", "v")])
    assert mapping_items({"a": 1}) == [("a", 1)]
    assert mapping_items(made) == [("k", "v")]
    assert mapping_items([("a", 1)]) is None
    assert ("k", "v") in list(children(made))
    assert list(children("text")) == []
    assert repr(made) == "<m.C>"
    assert Global("__builtin__", "set").path == "builtins.set"
