"""Sizes as users type them and as messages print them."""

from __future__ import annotations

import pytest

import streammerge as sm
from streammerge.units import binary_bytes, counted, decimal_bytes, inflected, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("5GB", 5 * 10**9), ("1.5g", 15 * 10**8), ("7", 7), (9, 9), ("2 KiB", 2048), ("1T", 10**12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "5 apples", "-1", "1e9", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(sm.RecipeError):
        parse_bytes(text)


def test_sizes_as_people_read_them() -> None:
    assert [decimal_bytes(n) for n in (0, 999, 1999, 1_900_000_000, 123_456)] == [
        "0 bytes",
        "999 bytes",
        "2.0 kB",
        "1.9 GB",
        "123 kB",
    ]
    assert [binary_bytes(n) for n in (1 << 20, 221 << 20, 3 << 30)] == ["1.0 MiB", "221 MiB", "3.0 GiB"]


def test_verbs_agree_with_their_number() -> None:
    assert [f"{counted(n, 'tensor')} {inflected(n, 'is', 'are')}" for n in (0, 1, 2)] == [
        "0 tensors are",
        "1 tensor is",
        "2 tensors are",
    ]
