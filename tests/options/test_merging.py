"""Options about what is merged, and how."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.merging import Choosing, Merging, Naming, Policies


@pytest.mark.parametrize(
    "case",
    [
        (Merging, {"weights": "0.6,0.4"}, "`weights` takes one number per input"),
        (Merging, {"weights": 0.5}, "`weights` takes one number per input"),
        (Merging, {"weights": {"a": 1}}, "`weights` takes"),
        (Merging, {"weights": [None]}, "`weights` takes"),
        (Merging, {"normalize": "no"}, "`normalize` takes True or False"),
        (Merging, {"parameters": ["t=0.3"]}, "`parameters` takes a dict"),
        (Merging, {"base": 3}, "`base` takes a path, not 3"),
        (Choosing, {"last": 0}, "`last` takes a positive whole number, not 0"),
        (Naming, {"rename": 3}, "`rename` takes patterns and new names"),
        (Policies, {"strict": None}, "`strict` takes True or False, not None"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)
