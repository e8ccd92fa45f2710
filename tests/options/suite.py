"""What the tests of options share."""

from __future__ import annotations

import re
from typing import Any

import pytest

import streammerge as sm
from streammerge.options.base import Options

Refused = tuple[type[Options], dict[str, Any], str]


def refuses(case: Refused) -> None:
    """A class of options does not take a value, and says so in these words."""
    group, given, said = case
    with pytest.raises(sm.RecipeError, match=re.escape(said)):
        group(**given)
