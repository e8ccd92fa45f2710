"""The tables of names."""

from __future__ import annotations

import re

from streammerge.adapters import dialects


def test_no_key_of_a_configuration_stands_in_two_tables() -> None:
    tables = (dialects.NEEDED, dialects.TOLD, set(dialects.REFUSED))
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_patterns_compile_and_starts_are_in_order() -> None:
    for pattern, _, reason in (*dialects.PARTS, *dialects.WRAPPERS):
        assert re.compile(pattern)
        assert reason
    starts = [start for start, _ in dialects.COMPONENTS]
    for number, start in enumerate(starts):
        assert not any(start.startswith(before) for before in starts[:number]), start
