"""Options about which tensors of a file are the weights."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.selecting import Selecting


@pytest.mark.parametrize(
    "case",
    [
        (Selecting, {"state_dict": 3}, "`state_dict` takes a text, not 3"),
        (Selecting, {"ema": "always"}, "`ema` takes ignore or prefer or only, not always"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)
