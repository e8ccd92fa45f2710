"""Options about many merges of the same inputs."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.sweeping import Blending, Sweeping


@pytest.mark.parametrize(
    "case",
    [
        (Sweeping, {"weights": [0.5, 0.5]}, "`weights` takes lists of one number per input"),
        (Sweeping, {"random": 0}, "`random` takes a positive whole number, not 0"),
        (Sweeping, {"soup": "hot"}, "`soup` takes greedy, not hot"),
        (Blending, {"seed": 0.5}, "`seed` takes a whole number, not 0.5"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)
