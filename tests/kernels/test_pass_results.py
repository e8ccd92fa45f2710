"""Results of passes, and the same kernel made of them without a second look at the tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from methods.suite import Case, suites
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.pass_results import PassResults
from streammerge.methods.registry import find_method

# One worker makes a whole tensor of the methods that hold much of it, so their results are not sent anywhere.
CASES = [
    case
    for suite in suites()
    for case in suite.CASES
    if find_method(case.method).passes and not find_method(case.method).whole
]


def blind(*arguments: Any, **options: Any) -> Iterator[Any]:
    raise AssertionError("the tensor was looked at a second time")


def group_of(
    case: Case, sweep: Callable[..., Iterator[Any]] | None, results: PassResults
) -> tuple[TensorGroup, dict[str, Any]]:
    make = torch.Generator().manual_seed(3)
    base, *models = (torch.randn(23, 4001, generator=make) for _ in range(case.models + 1))
    method = find_method(case.method)
    values = method.resolve(case.parameters, case.models)
    row = method.rows((23, 4001), values)
    whole = TensorGroup.of(*models, base=base if case.base else None, row=row)
    fields = (whole.name, whole.shape, whole.models, whole.compute, sweep or whole.sweep, whole.based, row, 0, results)
    return TensorGroup(*fields), values


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_method_makes_the_same_kernel_of_its_results(case: Case) -> None:
    first = PassResults()
    group, values = group_of(case, None, first)
    method = find_method(case.method)
    wanted = group.merged(method.bind(group, values))
    again, values = group_of(case, blind, PassResults(first.results))
    assert torch.equal(group.merged(method.bind(again, values)), wanted)
    assert sum(map(len, first.results)) < 200_000


def test_passes_beyond_the_record_are_run_and_recorded() -> None:
    results = PassResults()
    assert [results.next(lambda: 1), results.next(lambda: [2.5])] == [1, [2.5]]
    longer = PassResults(results.results)
    assert [longer.next(lambda: 7), longer.next(lambda: 7), longer.next(lambda: 3)] == [1, [2.5], 3]
    assert len(results.results) == 2
    assert len(longer.results) == 3


def test_what_a_method_does_to_a_result_is_not_recorded() -> None:
    results = PassResults()
    results.next(lambda: torch.ones(3)).add_(1)
    assert torch.equal(PassResults(results.results).next(lambda: torch.zeros(1)), torch.ones(3))
