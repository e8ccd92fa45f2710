"""SafetensorsWriter: files larger than memory, tensors in any order, output whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors

import streammerge as sm


class TestSafetensorsWriter:
    specs = (sm.TensorSpec("b", "bool", (3,)), sm.TensorSpec("a", "bfloat16", (2, 3)), sm.TensorSpec("e", "float32", (0,)))

    def test_any_order_and_in_parts(self, tmp_path: Path) -> None:
        value = torch.randn(2, 3).bfloat16()
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs, {"by": "me"}) as writer:
            writer.write("a", value.reshape(-1)[4:], start=4)
            writer.write("a", value.reshape(-1)[:4])
            writer.write("b", torch.tensor([True, False, True]).numpy())
            assert not (tmp_path / "x.safetensors").exists()
            writer.commit()
        expected = {"a": value, "b": torch.tensor([True, False, True]), "e": torch.empty(0)}
        assert_same(load_safetensors(tmp_path / "x.safetensors"), expected)
        header = (tmp_path / "x.safetensors").read_bytes()
        assert b'"format":"pt"' in header
        assert b'"by":"me"' in header

    def test_what_was_committed_is_synced_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[str] = []
        good = os.fsync

        def fsync(fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            good(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs[2:]) as writer:
            writer.commit()
        names = [Path(path).name for path in synced]
        assert [name for name in names if name in ("x.safetensors", tmp_path.name)][-2:] == ["x.safetensors", tmp_path.name]

    def test_a_kept_merge_is_not_thrown_away(self, tmp_path: Path) -> None:
        folder = tmp_path / ".x.safetensors.streammerge"
        (folder / "output").mkdir(parents=True)
        (folder / "journal").write_text("kept")
        with pytest.raises(sm.RecipeError, match="an interrupted merge"):
            sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs)
        assert (folder / "journal").read_text() == "kept"

    def test_leaving_without_commit_leaves_nothing(self, tmp_path: Path) -> None:
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs) as writer:
            writer.write("b", bytes(3))
        assert list(tmp_path.iterdir()) == []

    def test_incomplete_files_are_not_published(self, tmp_path: Path) -> None:
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs) as writer:
            writer.write("b", bytes(3))
            with pytest.raises(sm.MismatchError, match="a"):
                writer.commit()
        assert list(tmp_path.iterdir()) == []

    def test_a_closed_file_says_so(self, tmp_path: Path) -> None:
        writer = sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs[2:])
        writer.commit()
        for call in (writer.commit, lambda: writer.write("e", b"")):
            with pytest.raises(sm.RecipeError, match="closed"):
                call()

    def test_what_cannot_be_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(sm.RecipeError, match="metadata"):
            sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs, {"a": 1})  # type: ignore[dict-item]
        with pytest.raises(sm.RecipeError, match="shape"):
            sm.TensorSpec("x", "float32", (-1,))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("c", torch.ones(1), sm.RecipeError),
            ("a", torch.ones(2, 3), sm.MismatchError),
            ("a", torch.ones(3, 2).bfloat16(), sm.MismatchError),
            ("a", torch.ones(7).bfloat16(), sm.MismatchError),
            ("b", bytes(4), sm.MismatchError),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path: Path, name: str, value: object, error: type[Exception]) -> None:
        with sm.SafetensorsWriter(tmp_path / "x.safetensors", self.specs) as writer, pytest.raises(error):
            writer.write(name, value)
