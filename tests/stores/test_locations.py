"""The border where text becomes a place."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge as sm
from streammerge.stores.locations import HERE, is_here, parse


def test_what_has_no_scheme_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("a/b").local_path == "a/b"
    assert parse(Path("memory:") / "a").local_path == "memory:/a"
    assert parse(tmp_path / "x").local_path == str(tmp_path / "x")
    assert parse("~/x").local_path == str(tmp_path / "x")
    assert str(parse("~/x")) == "~/x"
    assert parse("file:///a/b").local_path == "/a/b"
    assert parse("FILE:///a/b") == parse("File:///a/b") == parse("/a/b")
    assert parse("c:/a").local_path == "c:/a"
    assert parse("x", HERE) == parse("x")
    assert parse("x", parse("/a/b")) == parse("/a/b/x")
    assert parse("/x", parse("/a/b")) == parse("/x")
    assert parse("x", parse("memory://a")) == parse("memory://a/x")
    assert parse("x", parse("memory://")) == parse("memory://x")
    assert parse("x", parse("/")) == parse("/x")
    assert parse("memory://x", parse("/a")) == parse("memory://x")
    assert parse("Memory://x") == parse("memory://x")
    for wrong in (3, None, ["x"]):
        with pytest.raises(sm.RecipeError, match="is not a path, but a"):
            parse(wrong)  # type: ignore[arg-type]


def test_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    assert is_here(str(tmp_path))
    assert is_here(f"{tmp_path}/link")
    assert not is_here(f"{tmp_path}/x")
    assert not is_here(f"file://{tmp_path}")
