"""Kinds of values: what they read, what they report and go on with, and the schema that describes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jsonschema
import pytest

from streammerge.recipe.fields import (
    TEXT,
    TRUTH,
    WHOLE,
    FormOf,
    Kind,
    ListOf,
    MapOf,
    Path,
    Plain,
    Position,
    Problems,
    key,
    one_of,
    position_of,
    shown,
)


@dataclass(frozen=True)
class Inner:
    REFUSED: ClassVar = {"later": "wait for it"}
    MEANT: ClassVar = {"amount": "count"}
    name: str = key(TEXT, "Its name.")
    count: int = key(WHOLE, "How many.", default=1)
    path: Path = field(default=(), compare=False)


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...] = key(ListOf(FormOf(Inner)), "Its parts.", default=())
    kind: str = key(one_of(("a", "b")), "Its kind.", default="a")
    more: Any = key(MapOf(TRUTH), "More.", default_factory=dict)


def read(kind: Kind, value: Any) -> tuple[Any, Problems]:
    problems = Problems()
    return kind.read(value, ("k",), problems), problems


def test_values_that_are_right_come_back_without_problems() -> None:
    data = {"parts": [{"name": "x"}, {"name": "y", "count": 3}], "kind": "b", "more": {"on": True}}
    made, problems = read(FormOf(Outer), data)
    assert problems == []
    assert made == Outer((Inner("x"), Inner("y", 3)), "b", {"on": True})
    assert [part.path for part in made.parts] == [("k", "parts", 0), ("k", "parts", 1)]
    assert FormOf(Outer).dump(made) == data
    assert FormOf(Outer).dump(Outer()) == {}, "keys with their default are left out"


@pytest.mark.parametrize(
    ("kind", "value", "went_on_with", "said"),
    [
        (WHOLE, "many", None, {("k",): "k takes a whole number, not many"}),
        (one_of(("a", "b")), "c", None, {("k",): "k takes one of a, b, not c"}),
        (Plain("a number", float, {}, guess=lambda value: 0.0), [], 0.0, {("k",): "k takes a number, not []"}),
        (ListOf(WHOLE), [], (), {("k",): "k takes a list, not nothing"}),
        (ListOf(WHOLE), 3, (), {("k",): "k takes a list, not 3"}),
        (ListOf(WHOLE, or_one=True), 3, (3,), {}),
        (ListOf(WHOLE, least=0), [], (), {}),
        (ListOf(WHOLE), [1, "x", 2], (1, 2), {("k", 1): "an entry of k takes a whole number, not x"}),
        (MapOf(WHOLE), None, {}, {}),
        (MapOf(WHOLE), 3, {}, {("k",): "k takes names with values below them, not 3"}),
        (MapOf(WHOLE), {"a": 1, "b": "x"}, {"a": 1}, {("k", "b"): "b takes a whole number, not x"}),
        (FormOf(Inner), {"nam": "x"}, Inner("x"), {("k", "nam"): "unknown key nam; did you mean name?"}),
        (
            FormOf(Inner),
            {"name": "x", "amount": 2},
            Inner("x", 2),
            {("k", "amount"): "unknown key amount; did you mean count?"},
        ),
        (FormOf(Inner), {"name": "x", "later": 2}, Inner("x"), {("k", "later"): "later is not supported yet: wait for it"}),
        (FormOf(Inner), {"name": "x", "later": None}, Inner("x"), {}),
        (FormOf(Inner), {"count": 2}, None, {("k",): "k needs name"}),
        (FormOf(Inner), True, None, {("k",): "k takes keys like name, count with their values, not true"}),
    ],
)
def test_a_mistake_is_reported_with_its_key_and_reading_goes_on(
    kind: Kind, value: Any, went_on_with: Any, said: dict[Path, str]
) -> None:
    made, problems = read(kind, value)
    assert (made, dict(problems)) == (went_on_with, said)
    assert len(problems) == len(said)


def test_a_key_has_the_place_of_its_nearest_parent() -> None:
    positions = {(): Position("r.yaml", 1, 1), ("a", 0): Position("r.yaml", 3, 5)}
    assert str(position_of(("a", 0, "b", "c"), positions)) == "r.yaml:3:5: "
    assert position_of(("a", 1), positions) == positions[()]
    assert position_of(("a",), {}) is None
    assert [shown(each) for each in (None, True, {"a": 1, "b": 2}, "x\n")] == ["nothing", "true", "the keys a, b", "x\\n"]


def test_the_schema_takes_what_is_read_and_refuses_what_is_not() -> None:
    forms: dict[str, Any] = {}
    validator = jsonschema.Draft202012Validator({**FormOf(Outer).schema(forms), "$defs": forms})
    validator.validate({"parts": [{"name": "x", "count": 3}], "kind": "b", "more": {"on": True}})
    for bad in ({"kind": "c"}, {"parts": []}, {"parts": [{}]}, {"more": {"x": "maybe"}}, {"x": 1}):
        assert not validator.is_valid(bad), bad
        assert read(FormOf(Outer), bad)[1], bad
