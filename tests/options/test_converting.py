"""Options about what a conversion changes, and what an extracted adapter holds."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.converting import Converting, Extracting


@pytest.mark.parametrize(
    "case",
    [
        (Converting, {"drop": 3}, "`drop` takes patterns like 'dvae.*', not 3"),
        (Converting, {"only": 3}, "`only` takes a text, not 3"),
        (Extracting, {"energy": "110%"}, "`energy` takes a share above 0, up to 1, not 110%"),
        (Extracting, {"alpha": 0}, "`alpha` takes a positive number, not 0"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)
