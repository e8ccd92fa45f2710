"""Answers that are remembered while a plan is made."""

from __future__ import annotations

from streammerge.stores.remembering import forget, known, recalled, remember, remembering


def test_an_answer_is_asked_for_once_within_a_block() -> None:
    asked = []

    def ask() -> int:
        asked.append(1)
        return len(asked)

    assert [recalled("x", ask), recalled("x", ask)] == [1, 2]
    with remembering():
        assert [recalled("x", ask), recalled("x", ask)] == [3, 3]
        with remembering():
            assert recalled("x", ask) == 3
        assert known("x") == 3
        forget()
        assert recalled("x", ask) == 4
        remember("y", None)
        assert known("y") is None
    assert known("x") is None
    assert recalled("x", ask) == 5
