"""Names of entries: an optimizer's, copies of weights, and the state dict that was saved."""

from __future__ import annotations

from typing import Any

import pytest

import streammerge as sm
from streammerge.formats.dcp_metadata import Entry
from streammerge.formats.dcp_names import is_cut_master, is_optimizer_item, nested, weight_of_master
from streammerge.tensors.dtypes import DType


@pytest.mark.parametrize(
    ("name", "path", "is_one"),
    [
        ("optimizer.state.exp_avg.w", ("optimizer.state.exp_avg.w",), True),
        ("optim.w.step", ("optim", "w", "step"), True),
        ("0.state.optimizer.w", ("app", "state", "optimizer", "w"), True),
        ("0.state.model.optimizer.w", ("app", "state", "model", "optimizer", "w"), False),
        ("chained_0.optimizer.w", ("chained_0.optimizer.w",), True),
        ("state.layers.0.w.exp_avg_sq", ("state.layers.0.w.exp_avg_sq",), True),
        ("param_groups.w.lr", ("param_groups.w.lr",), True),
        ("model.optimizer", ("model", "optimizer"), False),
        ("layers.0.optimal.w", ("layers.0.optimal.w",), False),
        ("state.w", ("state.w",), False),
        ("w", ("w",), False),
    ],
)
def test_entries_of_an_optimizer(name: str, path: tuple[Any, ...], is_one: bool) -> None:
    assert is_optimizer_item(name, path) == is_one


def test_copies_of_weights_are_found_by_name_shape_and_dtype() -> None:
    shapes = {"decoder.w": (3, 2), "param.w": (4,)}

    def weight(name: str, shape: tuple[int, ...], dtype: DType = DType.F32) -> str | None:
        return weight_of_master(name, Entry(dtype, "", shape, []), shapes)

    assert weight("optimizer.state.param.decoder.w", (3, 2)) == "decoder.w"
    assert weight("optimizer.state.fp32_param.decoder.w", (3, 2)) == "decoder.w"
    assert weight("optimizer.state.param.param.w", (4,)) == "param.w", "param is a part of its name"
    assert weight("optimizer.state.param.decoder.w", (2, 3)) is None
    assert weight("optimizer.state.param.decoder.w", (3, 2), DType.BF16) is None
    assert weight("optimizer.state.exp_avg.decoder.w", (3, 2)) is None


def test_flat_copies_of_weights_are_found_by_name() -> None:
    shapes = {"decoder.w": (3, 2), "w": (4,)}

    def cut(name: str, shape: tuple[int, ...], dtype: DType = DType.F32) -> bool:
        return is_cut_master(name, Entry(dtype, "", shape, []), shapes)

    assert cut("optimizer.state.fp32_param.decoder.w", (3, 1, 2))
    assert cut("chained_0.optimizer.state.param.decoder.w", (1, 6))
    assert not cut("optimizer.state.param.decoder.w", (3, 2)), "it has the weight's shape"
    assert not cut("optimizer.state.param.decoder.w", (1, 6), DType.BF16)
    assert not cut("optimizer.state.exp_avg.decoder.w", (1, 6))
    assert not cut("optimizer.state.exp_avg.param.w", (1, 6)), "param is a part of its name"
    assert not cut("optimizer.state.param.other", (1, 6))


def test_the_state_dict_that_was_saved() -> None:
    one, two = object(), object()

    def tree(refs: dict[str, Any], paths: dict[str, tuple[Any, ...]] | None = None) -> dict[Any, Any]:
        return nested(refs, paths or {})

    assert tree({"a.w": one, "b": two}) == {"a.w": one, "b": two}
    assert tree({"model.a.w": one, "model.b": two}) == {"model": {"a.w": one, "b": two}}
    assert tree({"model.a": one, "b": two}) == {"model.a": one, "b": two}
    assert tree({"encoder.a": one, "encoder.b": two}) == {"encoder.a": one, "encoder.b": two}
    assert tree({"x": one, "y": two}, {"x": ("model", "a"), "y": ("model", 3)}) == {"model": {"a": one, 3: two}}
    assert tree({"x": one, "y": two}, {"x": ("a",), "y": ("a", "b")}) == {"a": one, "y": two}, "a tensor is no dictionary"
    with pytest.raises(sm.FormatError, match="the name a stands for two entries"):
        tree({"x": one, "a": two}, {"x": ("a",), "a": ("a",)})
