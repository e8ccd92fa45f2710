"""The state dicts of a tree, and what may be one."""

from __future__ import annotations

import io
import zipfile
from typing import Any, NamedTuple

import pytest
import torch

from streammerge.errors import FormatError
from streammerge.pickles.candidates import candidates, dotted, inside
from streammerge.pickles.rebuild import StorageTable
from streammerge.pickles.tree import Instance
from streammerge.pickles.unpickle import unpickle

W = torch.ones(2)


class Pair(NamedTuple):
    model: Any
    other: Any


def tree(content: Any) -> Any:
    stream = io.BytesIO()
    torch.save(content, stream)
    return unpickle(zipfile.ZipFile(stream).read("archive/data.pkl"), StorageTable())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"w": W, "v": W}, [("(top level)", "state dict", 2)]),
        ({"model": {"w": W}, "lists": [W, W], "none": {}}, [("model", "state dict", 1), ("lists", "list", 2)]),
        (({"w": W}, {"v": W}), [("0", "state dict", 1), ("1", "state dict", 1)]),
        (Pair({"w": W}, 3), [("0", "state dict", 1)]),
        ({"net": torch.nn.Linear(2, 2)}, [("net", "module", 2)]),
        ({"a": {"b": [{"x": 1, "y": 2, "z": W}]}}, [("(top level)", "loose tensors", 1)]),
        ({"a": 1}, []),
    ],
)
def test_state_dicts_modules_and_lists_are_found(content: Any, found: list[tuple[str, str, int]]) -> None:
    made = candidates(tree(content))
    assert [(each.label, each.kind, len(each.tensors)) for each in made] == found


def test_what_lies_below_an_optimizer_is_marked() -> None:
    content = {"model": {"w": W}, "optimizer": {"state": {0: {"exp_avg": W}}, "param_groups": []}, "loss": {"w": W}}
    marks = {each.label: (each.barred, each.stale) for each in candidates(tree(content))}
    assert marks == {"model": (False, False), "optimizer.state.0": (True, True), "loss": (True, False)}


def test_the_state_of_a_class_with_its_source_is_entered() -> None:
    meta = {"class_name": "Net", "state": {"_modules": {}, "_parameters": {"w": 3}}}
    call = unpickle(b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n.")
    holder, items = inside(Instance("call", call, (meta,)))
    assert holder is meta["state"]
    assert dict(items) == meta["state"]


def test_long_names_are_refused() -> None:
    assert dotted(("a", 3, "b")) == "a.3.b"
    with pytest.raises(FormatError, match="beyond the limit"):
        dotted(("x" * 3000, "y" * 3000))
