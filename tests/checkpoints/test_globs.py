"""Paths and globs, in the order of their numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from streammerge.checkpoints.globs import expand


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
    ("path", "words"),
    [
        ("none-*.pt", "nothing matches none"),
        ("a.yaml", "stands alone"),
        ("a.yml", "stands alone"),
        ("m/config.json", "holds no tensors; give the folder that holds the model, like m$"),
    ],
)
def test_what_names_no_checkpoint(path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    with pytest.raises(sm.RecipeError, match=words):
        expand(["a.pt", path])
