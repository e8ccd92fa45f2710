"""Many names as few texts, without loss."""

from __future__ import annotations

import itertools
import random

import pytest

from streammerge.tensors.bundles import bundled, form_of, shown, unbundled


def names_of(texts: list[str]) -> list[str]:
    return [name for text in texts for name in unbundled(text)]


def test_numbers_become_ranges() -> None:
    names = [f"layers.{n}.experts.{e}.w{w}" for n in range(48) for e in range(128) for w in (1, 3)]
    assert bundled(names) == ["layers.{0-47}.experts.{0-127}.w{1,3}"]
    assert names_of(bundled(names)) == names


def test_a_missing_combination_stays_missing() -> None:
    names = [f"a.{n}.b.{e}" for n, e in itertools.product(range(4), range(3)) if (n, e) != (2, 1)]
    assert bundled(names) == ["a.{0-1,3}.b.{0-2}", "a.2.b.{0,2}"]
    assert sorted(names_of(bundled(names))) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        [],
        [""],
        ["x"],
        ["{", "}", "{}", "{{0-3}}", "a.{0-3}.1", "a.{0-3}.2", "}1{", "}2{"],
        ["a.00", "a.0", "a.01", "a.1", "a.10", "a.010"],
        ["9" * 20, "1" * 9, "1" * 10, "-1", "-2"],
        ["1.2.3", "1.2.4", "1", "2"],
    ],
)
def test_every_name_comes_back(names: list[str]) -> None:
    assert sorted(names_of(bundled(names))) == sorted(names)


def test_random_sets_come_back() -> None:
    make = random.Random(1)
    for _ in range(50):
        every = [f"{a}.{b}x{c}{'{' * (c % 2)}" for a in range(3) for b in range(4) for c in range(3)]
        names = make.sample(every, make.randrange(1, len(every)))
        assert sorted(names_of(bundled(names))) == sorted(names)


def test_what_differs_in_numbers_only_has_one_form() -> None:
    assert form_of("a.1.b2") == form_of("a.30.b4") != form_of("a.1.b")
    assert form_of("a.01") != form_of("a.1")


def test_a_message_shows_the_first() -> None:
    assert shown(["a", "b", "c"], 2) == "a, b and 1 more"
