"""A checkpoint without its data. The oracle is torch, which loads the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import trained, voice
from safetensors.torch import save_file

import streammerge as sm
from streammerge.checkpoints.index import open_checkpoint


def test_it_is_a_mapping_of_every_tensor_in_order(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "x.pth")
    index, loaded = open_checkpoint(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth")
    assert list(index) == list(index.keys()) == list(loaded)
    assert (len(index), "scale" in index, "nothing" in index) == (len(loaded), True, False)
    assert index.numel == sum(t.numel() for t in loaded.values())
    assert index.nbytes == sum(t.nbytes for t in loaded.values())
    for name, entry in index.items():
        assert (entry.spec.shape, entry.spec.dtype.torch) == (tuple(loaded[name].shape), loaded[name].dtype)
    assert f"{len(loaded)} tensors" in repr(index)
    assert list(index.identities()) == list(index.files)


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    shared = torch.ones(5, 3)
    torch.save({"a": shared, "b": shared, "turned": shared.t(), "e": shared[5:], "f": shared[5:]}, tmp_path / "x.pth")
    index = open_checkpoint(tmp_path / "x.pth")
    assert index.aliases == {"b": "a"}
    assert (index.numel, index.nbytes) == (30, 120)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    plain = open_checkpoint(tmp_path / "x.safetensors")
    assert (plain.aliases, plain.extras, plain.plain_data(), plain.in_memory) == ({}, None, None, False)


def test_what_stands_beside_the_tensors_is_data_and_names_of_classes(tmp_path: Path) -> None:
    torch.save({**voice(1, 10, 3, 2.0), "path": Path("x"), "mean": torch.ones(3)}, tmp_path / "x.pth")
    index = open_checkpoint(tmp_path / "x.pth")
    data = index.plain_data()
    assert (data["step"], data["model_loss"], data["config"]["audio"]) == (
        10,
        {"train_loss": 2.0, "eval_loss": None},
        {"sample_rate": 22050},
    )
    assert not {"model", "mean"} & set(data)
    assert (index.value("step"), index.value("model_loss.train_loss")) == (10, 2.0)
    assert [index.value(key) for key in ("model_loss.eval_loss", "model_loss", "absent.key", "step.x")] == [None] * 4
    assert index.classes() == ["pathlib.PosixPath"], "classes of torch are not named"


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pth")
    with pytest.raises(sm.RecipeError, match=r"modle\.pth does not exist; did you mean .*model\.pth\?"):
        open_checkpoint(tmp_path / "modle.pth")
    with pytest.raises(sm.RecipeError, match=r"does not exist$"):
        open_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(
        sm.RecipeError,
        match=r"^org/name does not exist, and the hub's cache does not hold it, while HF_HUB_OFFLINE is set$",
    ):
        open_checkpoint("org/name")
    with pytest.raises(sm.RecipeError, match=r"model\.pth: .*absent"):
        open_checkpoint(tmp_path / "model.pth", state_dict="absent")


def test_many_views_of_one_small_storage_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.ones(1000)
    torch.save({f"w{n}": whole[n:].expand(7, 1000 - n) for n in range(20)}, tmp_path / "x.pth")
    open_checkpoint(tmp_path / "x.pth")
    monkeypatch.setattr("streammerge.checkpoints.index.MOST_EXPANDED_BYTES", 1000)
    with pytest.raises(sm.FormatError, match="expanded beyond reason"):
        open_checkpoint(tmp_path / "x.pth")
