"""Paths and globs, in numeric order."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from streammerge.checkpoints.globs import expand, numeric_order


def test_numbers_in_names_are_compared_as_numbers() -> None:
    assert sorted(["c-1000", "c-200", "c-200b"], key=numeric_order) == ["c-200", "c-200b", "c-1000"]
    assert sorted(["10", "9", "a", ""], key=numeric_order) == ["", "9", "10", "a"]
    assert sorted(["e1-s10", "e1-s9", "e01-s1", "e10-s0"], key=numeric_order)[-1] == "e10-s0"
    assert sorted(["\u0662", "3"], key=numeric_order) == ["3", "\u0662"], "digits of other scripts are letters"


def test_globs_stand_where_they_were_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c-1000.pt", "c-20.pt", "b.pt", "odd[1].pt", "odd1.pt"):
        Path(name).touch()
    assert expand([]) == []
    assert expand(["b.pt", "c-*.pt", "b.pt"]) == ["b.pt", "c-20.pt", "c-1000.pt", "b.pt"]
    assert expand([str(tmp_path / "c-?0.pt")]) == [str(tmp_path / "c-20.pt")]
    assert expand(["odd[1].pt"]) == ["odd[1].pt"], "a file of exactly that name comes before what the glob matches"
    assert expand(["absent.pt"]) == ["absent.pt"], "that it does not exist is said where it is opened"


@pytest.mark.parametrize(
    ("path", "words"), [("none-*.pt", "nothing matches none"), ("a.yaml", "stands alone"), ("a.yml", "stands alone")]
)
def test_what_names_no_checkpoint(path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    with pytest.raises(sm.RecipeError, match=words):
        expand(["a.pt", path])
