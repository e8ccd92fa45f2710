"""Options about what is written, and over what."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.writing import Running, Saving, Writing


@pytest.mark.parametrize(
    "case",
    [
        (Running, {"overwrite": 1}, "`overwrite` takes True or False, not 1"),
        (Running, {"resume": None}, "`resume` takes True or False, not None"),
        (Writing, {"hash": "yes"}, "`hash` takes True or False, not yes"),
        (Saving, {"save": ""}, "`save` takes a path, not an empty text"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)
