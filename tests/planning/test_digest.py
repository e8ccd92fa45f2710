"""When the pieces of an interrupted run are those of this one, and how a difference is told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.digest import can_be_resumed, differences, plan_parts


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abc"):
        save_file({"w": torch.full((300, 7), float(number)), "e": torch.empty(0)}, tmp_path / f"{name}.safetensors")


def parts(out: str = "out.safetensors", names: str = "ab", **options: Any) -> dict[str, Any]:
    made = plan_parts(sm.plan([f"{name}.safetensors" for name in names], out, **options))
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


@pytest.mark.parametrize("ways", [{"memory": "64MiB"}, {"workers": 3}, {"io": "pread"}, {"executor": "threads"}], ids=str)
def test_how_a_plan_is_run_has_no_part_in_it(ways: dict[str, Any]) -> None:
    assert parts(**ways) == parts()
    assert differences(parts(), parts(**ways)) == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1, 2]}, "the recipe's keys models, parameters changed"),
        ({"seed": 3}, "the recipe's key seed changed"),
        ({"dtype": "bfloat16"}, "the recipe's key dtype changed"),
        ({"names": "ac"}, "the inputs"),
        ({"hash": True}, "only one of them hashes the inputs"),
        ({"out": "out.pth"}, "its tensors are placed or computed differently"),
    ],
)
def test_a_difference_is_told(options: dict[str, Any], words: str) -> None:
    assert parts()["digest"] != parts(**options)["digest"]
    assert words in differences(parts(), parts(**options))
    assert differences(parts(**options), parts())


@pytest.mark.parametrize(
    "spelled", [["./a.safetensors", "b.safetensors"], ["{here}/a.safetensors", "b.safetensors"], "below"]
)
def test_the_same_files_by_another_spelling_are_the_same_plan(tmp_path: Path, spelled: Any) -> None:
    if spelled == "below":  # from another folder
        (tmp_path / "x").mkdir()
        os.chdir(tmp_path / "x")
        inputs, out = [tmp_path / "a.safetensors", "../b.safetensors"], "../out.safetensors"
    else:
        inputs, out = [each.replace("{here}", str(tmp_path)) for each in spelled], "out.safetensors"
    made = plan_parts(sm.plan(inputs, out))
    os.chdir(tmp_path)
    assert json.loads(json.dumps(made)) == parts()


def test_another_mount_of_the_disk_is_the_same_plan(tmp_path: Path) -> None:
    """A copy with the same times is another inode, as after a remount."""
    before = parts()
    for name in "ab":
        shutil.copy2(f"{name}.safetensors", "copy")
        os.replace("copy", f"{name}.safetensors")
    assert parts() == before
    os.utime("a.safetensors", (1, 1))
    assert differences(before, parts()) == "the input a.safetensors changed"


def test_an_input_that_changed_is_named() -> None:
    before = parts()
    save_file({"w": torch.full((300, 7), 9.0), "e": torch.empty(0)}, "b.safetensors")
    assert differences(before, parts()) == "the input b.safetensors changed"


def test_other_versions_are_told() -> None:
    now = parts()
    assert differences({**now, "form": 1}, now) == "another version of streammerge made it"
    older = {**now, "versions": {**now["versions"], "torch": "1.0", "gone": "2"}}
    said = differences(older, now)
    assert f"torch was 1.0 and is {torch.__version__}" in said
    assert "gone was 2 and is none" in said


def test_the_same_is_planned_again_only_from_files_by_methods_of_this_package() -> None:
    paths = ["a.safetensors", "b.safetensors"]
    assert can_be_resumed(sm.plan(paths, "out.pth"))
    assert not can_be_resumed(sm.plan([{"w": torch.ones(300, 7), "e": torch.empty(0)}, *paths], "out.pth"))

    def own(group: sm.TensorGroup) -> sm.Kernel:
        return lambda chunk: chunk.models[0]

    assert not can_be_resumed(sm.plan(paths, "out.pth", method=own))
