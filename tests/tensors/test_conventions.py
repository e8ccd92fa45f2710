"""The lists of what programs agree on about names."""

from __future__ import annotations

import re

from streammerge.tensors.conventions import AVERAGED, CHECKSUM_FILES, IGNORED, LEADING_WRAPPERS, SPELLINGS, WRAPPERS


def test_every_entry_has_its_reason() -> None:
    assert all(reason and re.compile(pattern) for pattern, _, reason in (*IGNORED, *SPELLINGS))
    assert all(reason and part.endswith(".") for part, reason in (*WRAPPERS.items(), *LEADING_WRAPPERS.items()))
    assert {condition for _, condition, _ in IGNORED} == {"", "square mask"}
    assert all(ending == ending.lower() for ending in CHECKSUM_FILES)


def test_parts_that_speak_of_an_average() -> None:
    averaged = [
        part
        for part in ("ema", "model_ema", "teacher", "g_ema", "ema2", "shadow", "student", "schema", "emanuel")
        if re.fullmatch(AVERAGED, part)
    ]
    assert averaged == ["ema", "model_ema", "teacher", "g_ema", "ema2", "shadow"]
