"""The sample of parametrized tests that `scripts/test` runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from conftest import pytest_collection_modifyitems


def kept(request: pytest.FixtureRequest, mark: pytest.MarkDecorator, values: Sequence[tuple[str, int]]) -> list[str]:
    """Returns the names of the tests that are not slow, of one for each value of the parameters ``kind`` and ``size``."""
    items = []
    for kind, size in values:
        item = pytest.Function.from_parent(
            request.node.parent, name=f"test_x[{kind}-{size}]", originalname="test_x", callobj=lambda: None
        )
        item.callspec = SimpleNamespace(params={"kind": kind, "size": size})
        item.add_marker(mark)
        items.append(item)
    pytest_collection_modifyitems(items)
    return [item.name for item in items if item.get_closest_marker("slow") is None]


EVERY = [(kind, size) for kind in "abc" for size in range(5)]


def test_one_of_so_many_is_in_the_sample(request: pytest.FixtureRequest) -> None:
    found = kept(request, pytest.mark.sampled(4), EVERY)
    assert len(found) == 4, "15 of which each fourth"
    assert found == kept(request, pytest.mark.sampled(4), EVERY), "always the same"
    assert kept(request, pytest.mark.sampled(99), EVERY[:2]), "one at least"


def test_each_value_of_a_parameter_is_in_the_sample(request: pytest.FixtureRequest) -> None:
    found = kept(request, pytest.mark.sampled(9, by="kind"), EVERY)
    assert sorted(name[7] for name in found) == ["a", "b", "c"]


def test_others_are_left_alone(request: pytest.FixtureRequest) -> None:
    assert len(kept(request, pytest.mark.usefixtures(), EVERY)) == len(EVERY)
    assert kept(request, pytest.mark.slow, EVERY) == []
