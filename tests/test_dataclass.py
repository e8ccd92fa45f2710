"""Our dataclasses are those of the standard library, which are the oracle, but made faster."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from streammerge.dataclass import dataclass

WAYS: list[dict[str, bool]] = [
    {"frozen": frozen, "slots": slots, "eq": eq, "repr": repr_}
    for frozen in (False, True)
    for slots in (False, True)
    for eq in (True, False)
    for repr_ in (True, False)
]


def made_by(decorator: Callable[..., Any], **how: bool) -> type[Any]:
    @decorator(**how)
    class Thing:
        """Some thing."""

        name: str
        count: int = 3
        items: list[int] = field(default_factory=list)
        hidden: int = field(default=0, repr=False, compare=False)
        double: int = field(init=False, compare=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "double", 2 * self.count)

        def twice(self) -> str:
            return 2 * self.name

    return Thing


@pytest.fixture(params=WAYS, ids=lambda how: "-".join(key for key, value in how.items() if value) or "plain")
def pair(request: pytest.FixtureRequest) -> tuple[type[Any], type[Any]]:
    return made_by(dataclass, **request.param), made_by(dataclasses.dataclass, **request.param)


def outcome(ask: Callable[[], Any]) -> Any:
    """Returns the answer, or the kind of error and its text."""
    try:
        return ask()
    except (TypeError, AttributeError) as error:
        return type(error), str(error)


ASKED: list[Callable[[type[Any]], Any]] = [
    lambda made: dataclasses.asdict(made("a", 2, [1])),
    lambda made: dataclasses.astuple(made("a", items=[4], hidden=7)),
    lambda made: dataclasses.asdict(dataclasses.replace(made("a", 2, [1]), count=5)),
    lambda made: [(f.name, f.type, f.init, f.repr, f.compare) for f in dataclasses.fields(made)],
    lambda made: made("a") == made("a", 3, []),
    lambda made: made("a") == made("b"),
    lambda made: made("a", hidden=1) == made("a", hidden=2),
    lambda made: made("a") == 3,
    lambda made: (made.__hash__ is None, made.__hash__ is object.__hash__),
    lambda made: made.__eq__ is object.__eq__ or hash(made("a", 1, ())) == hash(made("a", 1, ())),
    lambda made: repr(made("a", 1)) if made.__repr__ is not object.__repr__ else "the plain one",
    lambda made: made("a").twice(),
    lambda made: [*inspect.signature(made).parameters],
    lambda made: [p.default for p in inspect.signature(made).parameters.values()][:2],
    lambda made: made.__match_args__,
    lambda made: getattr(made, "__slots__", None),
    lambda made: made.__doc__,
    lambda made: setattr(made("a"), "name", "b"),
    lambda made: delattr(made("a"), "name"),
    lambda made: dataclasses.asdict(copy.copy(made("a", 2, [1]))),
    lambda made: dataclasses.asdict(copy.deepcopy(made("a", 2, [1]))),
    lambda made: made("a").items is made("a").items,
    lambda made: made.__init__.__qualname__.endswith("Thing.__init__"),
    lambda made: [getattr(made.__dataclass_params__, key) for key in ("init", "repr", "eq", "frozen")],
]


@pytest.mark.parametrize("ask", ASKED, ids=range(len(ASKED)))
def test_it_answers_as_the_standard_one(pair: tuple[type[Any], type[Any]], ask: Callable[[type[Any]], Any]) -> None:
    ours, theirs = (outcome(lambda made=made: ask(made)) for made in pair)
    assert ours == theirs


@pytest.mark.parametrize("wrong", [{}, {"name": 1, "more": 2}, {"double": 3, "name": 1}])
def test_wrong_arguments_are_errors(pair: tuple[type[Any], type[Any]], wrong: dict[str, int]) -> None:
    for made in pair:
        with pytest.raises(TypeError):
            made(**wrong)


@dataclass(frozen=True, slots=True)
class Sent:
    """It can be pickled, since it is found in this module."""

    name: str
    more: tuple[int, ...] = ()


@dataclass(slots=True)
class Changing:
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return "its own"


@dataclasses.dataclass(frozen=True)
class Below(Sent):
    """A class of somebody who uses the standard decorator."""

    own: int = 1


def test_it_can_be_sent_to_another_process() -> None:
    for thing in (Sent("a", (1, 2)), Changing([3]), Below("a", (), 4)):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_methods_of_the_class_stay() -> None:
    assert repr(Changing()) == "its own"


def test_a_class_that_holds_itself_can_be_shown() -> None:
    @dataclass()
    class Holder:
        inner: Any = None

    holder = Holder()
    holder.inner = holder
    assert repr(holder).endswith("Holder(inner=...)")


def test_a_class_without_fields() -> None:
    @dataclass(frozen=True, slots=True)
    class Empty:
        """No fields."""

    assert Empty() == Empty()
    assert hash(Empty()) == hash(Empty())
    assert repr(Empty()).endswith("Empty()")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the standard library is faster there")
def test_it_is_made_faster() -> None:
    def cpu_seconds(decorator: Callable[..., Any]) -> float:
        begin = time.thread_time()
        for _ in range(20):
            made_by(decorator, frozen=True, slots=True)
        return time.thread_time() - begin

    ours, theirs = (min(cpu_seconds(each) for _ in range(5)) for each in (dataclass, dataclasses.dataclass))
    assert ours < theirs / 2
