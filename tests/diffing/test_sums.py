"""Measures that follow from sums, where they have no plain value."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from streammerge.diffing.sums import Sums, cosine, relative


def test_every_sum_is_added_and_the_largest_kept() -> None:
    one = Sums(*range(1, len(fields(Sums)) + 1))
    two = Sums(*range(101, len(fields(Sums)) + 101))
    one.add(two)
    largest = [each.name for each in fields(Sums)].index("largest")
    values = [getattr(one, each.name) for each in fields(Sums)]
    assert values == [104 if n == largest else 2 * n + 102 for n in range(len(values))]


def test_norms_of_zeros_and_overflow() -> None:
    assert (relative(0.0, 0.0), relative(1.0, 0.0), relative(4.0, 16.0)) == (0.0, math.inf, 0.5)
    assert (relative(math.inf, 1.0), relative(1.0, math.inf), relative(math.nan, 1.0)) == (None, None, None)
    assert relative(1e-300, 1e300) == pytest.approx(1e-300)
    assert relative(1e300, 1e-300) == pytest.approx(1e300)


def test_cosines_stay_between_their_bounds() -> None:
    assert (cosine(3.0, 9.0, 1.0), cosine(-1.0000000001, 1.0, 1.0), cosine(1.1, 1.0, 1.0)) == (1.0, -1.0, 1.0)
    assert (cosine(0.0, 0.0, 1.0), cosine(1.0, math.inf, 1.0), cosine(math.nan, 1.0, 1.0)) == (None, None, None)
