"""Plans as data: what is written, what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.saved import read_saved, saved
from streammerge.stores.locations import parse


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    for name in "ab":
        save_file({"w": torch.full((30, 30), float(ord(name)))}, tmp_path / f"{name}.safetensors")
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_a_plan_is_read_as_it_was_saved(tmp_path: Path, models: list[Path]) -> None:
    made = saved(sm.plan(models, tmp_path / "folder" / "x.safetensors"), 3, "threads", hashed=True)
    (tmp_path / "plan").write_text(made.text())
    assert read_saved(parse(tmp_path / "plan")) == made
    assert made.out == str(tmp_path / "folder" / "x.safetensors")
    assert saved(sm.plan(models, f"{tmp_path}/new/"), None, "auto", hashed=False).out.endswith("/new/"), "a folder"
    assert json.loads(made.text())["units"] == made.units


def test_the_key_is_that_of_the_bytes(tmp_path: Path, models: list[Path]) -> None:
    def key(**more: object) -> str:
        return saved(sm.plan(models, tmp_path / "x.safetensors", **more), None, "auto", hashed=False).key  # type: ignore[arg-type]

    assert key() == key(memory="2GiB", workers=1, io="pread")
    assert key() != key(weights=[0.25, 0.75])
    before = key()
    save_file({"w": torch.zeros(30, 30)}, models[0])
    assert key() != before


def test_what_changed_is_named(tmp_path: Path, models: list[Path]) -> None:
    made = saved(sm.plan(models, tmp_path / "x.safetensors"), None, "auto", hashed=False)
    made.check_same(sm.plan(models, tmp_path / "x.safetensors"))
    save_file({"w": torch.zeros(30, 30)}, models[1])
    with pytest.raises(sm.ChangedError, match=r"the input \S*b\.safetensors changed; save a new one"):
        made.check_same(sm.plan(models, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-20], "is no saved plan"),
        (lambda text: text.replace('"lease_seconds": 30.0', '"lease_seconds": 0.1'), "was changed after it was saved"),
        (lambda text: text.replace('"streammerge_plan": 1', '"streammerge_plan": 99'), "by another version"),
        (lambda text: "[]", "is no saved plan"),
        (lambda text: "{}", "is no saved plan"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, models: list[Path], damage: object, said: str) -> None:
    text = saved(sm.plan(models, tmp_path / "x.safetensors"), None, "auto", hashed=False).text()
    (tmp_path / "plan").write_text(damage(text))  # type: ignore[operator]
    with pytest.raises(sm.FormatError, match=said):
        read_saved(parse(tmp_path / "plan"))
    with pytest.raises(sm.RecipeError, match="is not a file"):
        read_saved(parse(tmp_path / "nothing"))


def test_what_other_machines_cannot_follow_is_refused(tmp_path: Path, models: list[Path]) -> None:
    def own(group: sm.TensorGroup) -> sm.Kernel:
        return lambda chunk: chunk.models[0]

    with pytest.raises(sm.RecipeError, match="needs a name for its output"):
        saved(sm.plan(models), None, "auto", hashed=False)
    held = sm.plan([{"w": torch.ones(3)}, {"w": torch.zeros(3)}], tmp_path / "x.safetensors")
    with pytest.raises(sm.RecipeError, match="in the memory of this process"):
        saved(held, None, "auto", hashed=False)
    with pytest.raises(sm.RecipeError, match="a merge method of one's own"):
        saved(sm.plan(models, tmp_path / "x.safetensors", method=sm.merge_method("own")(own)), None, "auto", hashed=False)
    with pytest.raises(sm.RecipeError, match="memory:// belongs to this process"):
        saved(sm.plan(models, "memory://x.safetensors"), None, "auto", hashed=False)
