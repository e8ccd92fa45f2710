"""Single values of a recipe: what each kind reads, and what it refuses with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.methods.contracts import METHODS
from streammerge.methods.registry import LINEAR, find_method, list_methods
from streammerge.recipe.fields import Plain, Problems
from streammerge.recipe.scalars import (
    COMPUTE,
    DTYPE,
    LAYER_RANGE,
    METHOD,
    MODEL,
    PATTERN,
    SIZE,
    UNREAD,
    parameter_docs,
)
from streammerge.tensors.dtypes import DType


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (MODEL, "a.pth", "a.pth"),
        (MODEL, Path("a.pth"), "a.pth"),
        (MODEL, {"model": "a.pth"}, "a.pth"),
        (MODEL, {"model": {"path": "a.pth", "revision": None}}, "a.pth"),
        (MODEL, {"model": {"path": "org/a", "revision": "v1"}}, "org/a@v1"),
        (LAYER_RANGE, [0, 1], (0, 1)),
        (LAYER_RANGE, ["3", 24], (3, 24)),
        (SIZE, "5GB", 5_000_000_000),
        (SIZE, "1KiB", 1024),
        (SIZE, 1, 1),
        (DTYPE, "bfloat16", DType.BF16),
        (COMPUTE, "float64", DType.F64),
        (METHOD, "linear", LINEAR),
    ],
)
def test_values_that_are_right(kind: Plain, given: Any, value: Any) -> None:
    problems = Problems()
    assert kind.read(given, ("k",), problems) == value
    assert problems == []


@pytest.mark.parametrize(
    ("kind", "given", "words", "went_on_with"),
    [
        (MODEL, "", "takes the path of a model", UNREAD),
        (MODEL, "a\0b", "takes the path of a model", UNREAD),
        (MODEL, {"model": "a", "lora": {"path": "b", "scal": 1}}, "unknown key scal of lora", UNREAD),
        (MODEL, {"model": "a", "lora_path": "b"}, "unknown key lora_path of a model", UNREAD),
        (MODEL, {"model": "a", "lora": 3}, "takes the path of a model", UNREAD),
        (LAYER_RANGE, [1, 1], "takes the first layer and the layer after the last", (0, 0)),
        (LAYER_RANGE, [-1, 1], "takes the first layer", (0, 0)),
        (LAYER_RANGE, [0, 1, 2], "takes the first layer", (0, 0)),
        (LAYER_RANGE, [0, 1.5], "takes the first layer", (0, 0)),
        (SIZE, 0, "a size must be positive", None),
        (SIZE, "big", "'big' is not a size", None),
        (DTYPE, "int64", "takes a floating-point dtype, not int64", None),
        (DTYPE, "bflot16", "did you mean bfloat16", None),
        (COMPUTE, "float16", "the compute dtype must be float32 or float64", None),
        (METHOD, "liner", "did you mean linear", LINEAR),
        (PATTERN, "/(/", "not a regular expression", None),
    ],
)
def test_values_that_are_wrong(kind: Plain, given: Any, words: str, went_on_with: Any) -> None:
    problems = Problems()
    made = kind.read(given, ("k",), problems)
    (said,) = [message for _, message in problems]
    assert words in said
    assert made == went_on_with


def test_every_value_is_written_as_it_is_read() -> None:
    for kind, given in ((DTYPE, "bfloat16"), (LAYER_RANGE, [0, 24]), (PATTERN, "*.bias"), (PATTERN, "/^a+$/")):
        assert kind.dump(kind.read(given, ("k",), Problems())) == given
    for name in METHODS.built_in:
        assert METHOD.dump(find_method(name)) == name


def test_a_method_that_is_unknown_accepts_every_parameter() -> None:
    """So the rest of its recipe can be checked."""
    stand_in = METHOD.read("xyzzyqq", ("merge_method",), Problems())
    assert set(stand_in.parameters) == set(parameter_docs())
    stand_in.check_models(0)
    stand_in.check_models(99)


def test_every_parameter_is_described_by_the_methods_that_have_it() -> None:
    docs = parameter_docs()
    owners = {name: {m for m, method in list_methods().items() if name in method.parameters} for name in docs}
    assert list(docs) == sorted(docs)
    for name, doc in docs.items():
        assert set(doc.removeprefix("Parameter of ").removesuffix(".").split(", ")) == owners[name] != set()
