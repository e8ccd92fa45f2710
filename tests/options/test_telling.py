"""Options about what is checked, compared and shown."""

from __future__ import annotations

import pytest

from options.suite import Refused, refuses
from streammerge.options.telling import Comparing, Reporting, Showing, Verifying


@pytest.mark.parametrize(
    "case",
    [
        (Verifying, {"sample": "101%"}, "is not a share"),
        (Verifying, {"seed": "first"}, "`seed` takes a whole number, not first"),
        (Comparing, {"base": 3}, "`base` takes a path, not 3"),
        (Reporting, {"report": 3}, "`report` takes a path, not 3"),
        (Showing, {"compare": "no"}, "`compare` takes True or False, not no"),
    ],
)
def test_what_an_option_does_not_take(case: Refused) -> None:
    refuses(case)
