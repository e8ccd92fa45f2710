"""The kinds of values that options take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from streammerge.errors import RecipeError
from streammerge.options import values
from streammerge.options.base import OptionKind
from streammerge.options.merging import Merging
from streammerge.options.resources import Resources


def test_numbers_of_numpy_and_torch() -> None:
    asked = Merging(weights=numpy.array([0.5, 0.25]), normalize=numpy.True_, convert_first=Path("a"))
    assert (asked.weights, asked.normalize, asked.convert_first) == ([0.5, 0.25], True, "a")
    assert Merging(weights=(torch.tensor(0.5), numpy.float32(0.25))).weights == [0.5, 0.25]
    assert Resources(workers=numpy.int64(3), memory=numpy.int64(1 << 30)).workers == 3
    assert type(Resources(workers=torch.tensor(3)).workers) is int


@pytest.mark.parametrize(
    ("kind", "given", "read"),
    [
        (values.COUNT, 1, 1),
        (values.WHOLE, -3, -3),
        (values.SIZE, "2GiB", "2GiB"),
        (values.PATTERNS, "dvae.*", ("dvae.*",)),
        (values.PATTERNS, ["a", "b"], ("a", "b")),
        (values.RENAMES, {"a": "b"}, {"a": "b"}),
        (values.RENAMES, {}, None),
        (values.PATH, Path("a/b"), "a/b"),
        (values.PATH, "~/a/", f"{Path.home()}/a/"),
        (values.one_of(("first", "last")), "last", "last"),
    ],
)
def test_what_a_kind_reads(kind: OptionKind, given: Any, read: Any) -> None:
    assert kind.parse(given) == read


@pytest.mark.parametrize(
    ("parse", "given"),
    [
        (values.COUNT.parse, 0),
        (values.COUNT.parse, True),
        (values.WHOLE.parse, 2.5),
        (values.TEXT.parse, 3),
        (values.TRUTH.parse, 1),
        (values.PATH.parse, ""),
        (values.PATH.parse, "a\0b"),
        (values.PATTERNS.parse, [3]),
        (values.BUDGET.parse, 512),
        (values.number, math.nan),
        (values.numbers, "0.6,0.4"),
        (values.share, "101%"),
        (values.energy, 0),
        (values.energy, "110%"),
        (values.positive, math.inf),
        (values.one_of(("first",)).parse, "last"),
    ],
)
def test_what_a_kind_refuses(parse: Any, given: Any) -> None:
    with pytest.raises((TypeError, ValueError, RecipeError)):
        parse(given)


def test_shares_in_per_cent() -> None:
    assert values.energy("95%") == 0.95
    assert values.number_or_percent(" 60% ") == 0.6
    assert values.share("5%") == "5%"
