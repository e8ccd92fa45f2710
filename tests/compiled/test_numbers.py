"""The dtypes that compiled functions know."""

from __future__ import annotations

import pytest

from streammerge.compiled.numbers import CODES, known
from streammerge.tensors.dtypes import DType


def test_dtypes_that_are_known(compiled_or_not: bool) -> None:
    assert known(list(CODES)) is compiled_or_not
    assert not known([DType.F32, DType.I32])
    assert not known([DType.F8_E4M3])


@pytest.mark.usefixtures("uncompiled")
def test_without_functions_none_is_known() -> None:
    assert not known([DType.F32])
