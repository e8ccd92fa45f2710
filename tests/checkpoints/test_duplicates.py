"""Links to a checkpoint and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.choosing import choose
from streammerge.checkpoints.duplicates import distinct


@pytest.mark.parametrize("way", ["link", "hard link", "copy", "folder"])
def test_a_checkpoint_that_a_glob_meets_twice_counts_once(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (100, 200):
        place = Path(f"best_{step}")
        if way == "folder":
            place.mkdir()
        save_file({"w": torch.tensor([float(step)])}, place / "model.safetensors" if way == "folder" else place)
    if way == "link":
        Path("best").symlink_to("best_200")
    elif way == "hard link":
        Path("best").hardlink_to("best_200")
    elif way == "copy":
        shutil.copy("best_200", "best")
    else:
        shutil.copytree("best_200", "best")
    planned = sm.plan("best*")
    assert planned.recipe.inputs == ("best_100", "best_200"), "the name with a number stays"
    assert "best is the same checkpoint as best_200, so it counts once" in planned.notes
    assert sm.plan(["best", "best_100", "best_200"], last=2).recipe.inputs == ("best_100", "best_200")
    named = sm.plan(["best", "best_100", "best_200"])
    assert len(named.recipe.inputs) == 3, "what was named one by one counts as often as it was named"
    assert ("best_200 is the same checkpoint as best, and counts twice" in named.notes) == ("link" in way)


def test_a_path_that_is_named_twice_counts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 3.0), ("b", 6.0)):
        save_file({"w": torch.tensor([number])}, f"{name}.safetensors")
    result = sm.merge(["a.safetensors", "b.safetensors", "a.safetensors"], "out.safetensors")
    assert load_safetensors(Path("out.safetensors"))["w"] == 4
    assert "a.safetensors is named 2 times, and counts 2 times" in result.notes


def test_checkpoints_of_one_size_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte in the middle of the file differs, far from its end."""
    monkeypatch.chdir(tmp_path)
    tensor = torch.zeros(100_000)
    save_file({"w": tensor}, "a1.safetensors")
    tensor[10] = 1
    save_file({"w": tensor}, "a2.safetensors")
    assert len(sm.plan("a*.safetensors").recipe.inputs) == 2


def test_folders_with_links_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that leads back to its own folder ends the walk; a file that is deeper and differs is seen."""
    monkeypatch.chdir(tmp_path)
    for number, deep in ((1, b"same"), (2, b"same"), (3, b"else")):
        folder = Path(f"c{number}/unet")
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(deep)
        (folder / "back").symlink_to("..")
    notes: list[str] = []
    assert distinct(["c1", "c2", "c3", "absent", "absent"], notes) == ["c1", "c3", "absent"]
    assert notes == ["c2 is the same checkpoint as c1, so it counts once"]


def test_checkpoints_in_the_memory_store() -> None:
    for name, data in (("d/1/w.bin", b"abc"), ("d/2/w.bin", b"abc"), ("d/3/w.bin", b"abd")):
        sm.memory_store.put(name, data)
    try:
        assert distinct([f"memory://d/{n}" for n in (3, 2, 1)], []) == ["memory://d/3", "memory://d/2"]
    finally:
        sm.memory_store.remove("d")


def test_the_name_with_the_step_stays_whatever_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`best` has no number of its own, though its folder has: the step that it leads to keeps its place among the last."""
    monkeypatch.chdir(tmp_path)
    for number in (6, 8, 10):
        folder = Path(f"run2/checkpoint-{number}")
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3,), float(number))}, folder / "model.safetensors")
    Path("run2/best").symlink_to("checkpoint-8")
    Path("run2/checkpoint-last").symlink_to("checkpoint-10")
    chosen, _ = choose(["run2/*"], last=2)
    assert chosen == ["run2/checkpoint-8", "run2/checkpoint-10"]
    chosen, _ = choose(["run2/checkpoint-*"], range="8:10")
    assert chosen == ["run2/checkpoint-8", "run2/checkpoint-10"]
