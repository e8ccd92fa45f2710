"""Errors of outputs that do not fit or may not be replaced."""

from __future__ import annotations

import pytest

import streammerge as sm
from stores.test_base import at
from streammerge.stores.space import exists_already, no_room, space_checked


def test_a_full_store_says_what_it_knows() -> None:
    with pytest.raises(sm.SpaceError, match=r"no room for x: it needs 5.0 kB \(No space left on device\)"):  # noqa: SIM117
        with space_checked(at("x"), 5000):
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="Input/output error"):  # noqa: SIM117
        with space_checked(at("x"), 5000):
            raise OSError(5, "Input/output error")
    assert isinstance(no_room(at("x"), 1), sm.SpaceError)


def test_what_is_missing_is_said_where_the_free_space_is_known() -> None:
    said = str(no_room(at("x"), 5000, "full", free_bytes=2000))
    assert said == "no room for x: it needs 5.0 kB, 2.0 kB are free on that disk (3.0 kB are missing)"
    assert str(no_room(at("x"), 5000, "full", free_bytes=9000)).endswith("9.0 kB are free on that disk (full)")


def test_an_output_that_exists_names_the_option() -> None:
    assert "few://x exists already; pass `overwrite=True`" in str(exists_already(at("x")))
