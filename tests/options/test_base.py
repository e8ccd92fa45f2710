"""What a class of options does with the values that it is given."""

from __future__ import annotations

import pytest

from streammerge.options.base import Options, option, options_of, picked
from streammerge.options.values import COUNT, TEXT


class Asked(Options):
    """What is asked."""

    name: str | None = option("A name.", TEXT, otherwise="found by itself", overrides=True)
    count: int = option("How many.", COUNT, default=3, letter="-c")


class Besides(Options):
    """What is asked besides."""

    resume: bool = option("False: start over.", default=True, negated=True)


def test_options_have_the_names_and_types_of_their_classes_in_their_order() -> None:
    found = options_of(Besides, Asked)
    assert [(each.name, each.annotation, each.default) for each in found.values()] == [
        ("resume", "bool", True),
        ("name", "str | None", None),
        ("count", "int", 3),
    ]
    assert [each.flag for each in found.values()] == ["--no-resume", "--name", "--count"]


def test_values_are_read_and_stay() -> None:
    asked = Asked(count=5)
    assert (asked.name, asked.count, asked.overrides) == (None, 5, {"name": None})
    with pytest.raises(AttributeError, match="count"):
        asked.count = 6
    with pytest.raises(TypeError, match="Asked has no option resume"):
        Asked(resume=True)
    assert asked.count == 5


def test_a_class_takes_its_own_among_all_arguments() -> None:
    assert vars(picked(Asked, {"count": 2, "resume": False})) == {"name": None, "count": 2}
