"""The user's own evaluation."""

from __future__ import annotations

import pytest

import streammerge as sm
from streammerge.sweeps.scoring import kept_count, scorer


def test_the_last_number_is_the_score() -> None:
    score = scorer("echo loading 3 models; echo {}; echo WER 12.5% of 1e2")
    assert score("a b.pth") == 100.0
    assert scorer("printf 'x -1.5e-3'; : {}")("p") == -0.0015


def test_a_name_is_one_word_of_the_shell() -> None:
    assert scorer('test {} = "it\'s; exit 3" && echo 7')("it's; exit 3") == 7.0


def test_a_function_is_asked_too() -> None:
    assert scorer(lambda path: len(path))("abc") == 3.0
    for wrong in (None, "x", float("nan")):
        with pytest.raises(sm.TaskError, match="the score of p is"):
            scorer(lambda path, wrong=wrong: wrong)("p")


def test_how_many_are_kept() -> None:
    assert [kept_count(each) for each in (None, "best:3", 2, "4")] == [None, 3, 2, 4]
    for wrong in ("best:0", "worst:1", "", -1):
        with pytest.raises(sm.RecipeError, match="takes best:N"):
            kept_count(wrong)
