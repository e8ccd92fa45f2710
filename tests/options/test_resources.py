"""Options about memory, workers and machines."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.resources import Machine, Resources, Sharing


@pytest.mark.parametrize(
    "case",
    [
        (Resources, {"workers": 0}, "`workers` takes a positive whole number, not 0"),
        (Resources, {"workers": 2.5}, "`workers` takes a positive whole number, not 2.5"),
        (Resources, {"workers": True}, "`workers` takes a positive whole number"),
        (Resources, {"memory": None}, "`memory` takes a size"),
        (Resources, {"memory": "lots"}, "is not a size"),
        (Resources, {"io": "mmapped"}, "`io` takes mmap or pread, not mmapped"),
        (Machine, {"workers": 0}, "`workers` takes a positive whole number, not 0"),
        (Sharing, {"share": 3}, "`share` takes a text, not 3"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)


def test_a_machine_gives_what_the_plan_says_unless_told() -> None:
    machine = Machine()
    assert (machine.memory, machine.workers, machine.io, machine.executor) == (None, None, None, None)
