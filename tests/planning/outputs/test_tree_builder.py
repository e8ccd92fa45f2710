"""Where the tensors of a pickle get their bytes: arrays of numpy among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, deflate, load_safetensors, mean
from safetensors.torch import save_file

import streammerge as sm


def mixed(seed: int) -> dict[str, Any]:
    """Returns a checkpoint with arrays among its tensors, beside them and in other classes."""
    chance = np.random.RandomState(seed)
    weights = {f"l{n}.weight": torch.from_numpy(chance.randn(4, 4)) for n in range(9)}
    head, single = chance.randn(3, 5).astype("f4"), chance.randn(30_001).astype("f8")
    return {
        "state_dict": {**weights, "head.weight": head, "tied.weight": head, "long": single, "zero": np.zeros((0, 2), "f2")},
        "epoch": seed,
        "best": np.float64(0.5 * seed),
        "names": np.array(["a", "b"]),
        "rng": {"state": np.arange(624, dtype="u4")},
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_among_the_tensors_are_merged_and_stay_arrays(tmp_path: Path, protocol: int) -> None:
    for seed in (1, 2):
        torch.save(mixed(seed), tmp_path / f"{seed}.pth", pickle_protocol=protocol)
    sm.merge([tmp_path / "1.pth", tmp_path / "2.pth"], tmp_path / "out.pth", weights=[0.6, 0.4])
    made, one, two = torch.load(tmp_path / "out.pth", weights_only=False), mixed(1), mixed(2)
    for name, mine in one["state_dict"].items():
        got, other = made["state_dict"][name], two["state_dict"][name]
        assert type(got) is type(mine)
        pair = [torch.as_tensor(each) for each in (mine, other)]
        assert_same({name: torch.as_tensor(got)}, {name: mean(pair, [0.6, 0.4])})
    assert made["state_dict"]["head.weight"] is made["state_dict"]["tied.weight"]
    assert (made["epoch"], made["best"], made["names"].tolist()) == (2, 0.5, ["a", "b"])
    assert np.array_equal(made["rng"]["state"], np.arange(624))
    assert sm.verify(tmp_path / "out.pth", sample=1.0).recomputed
    sm.convert(tmp_path / "1.pth", tmp_path / "out.safetensors")
    assert len(load_safetensors(tmp_path / "out.safetensors")) == 13


def test_an_array_takes_another_dtype_if_numpy_has_it(tmp_path: Path) -> None:
    torch.save({"w": np.ones((2, 3), ">f4"), "b": np.asfortranarray(np.ones((3, 2)))}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.pth", dtype="float16")
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert {name: array.dtype.name for name, array in made.items()} == {"w": "float16", "b": "float16"}
    with pytest.raises(sm.RecipeError, match="numpy does not have"):
        sm.convert(tmp_path / "in.pth", tmp_path / "never.pth", dtype="bfloat16")


def test_a_tensor_that_only_a_later_model_has_is_an_array_among_arrays(tmp_path: Path) -> None:
    torch.save({"w": np.ones(2), "v": np.ones(2)}, tmp_path / "a.pth")
    save_file({"w": torch.ones(2), "v": torch.ones(2), "x": torch.ones(3)}, tmp_path / "b.safetensors")
    sm.merge([tmp_path / "a.pth", tmp_path / "b.safetensors"], tmp_path / "out.pth", on_missing="union")
    made = torch.load(tmp_path / "out.pth", weights_only=False)
    assert {name: (type(array), array.tolist()) for name, array in made.items()}["x"] == (np.ndarray, [1.0, 1.0, 1.0])


def test_a_legacy_file_and_a_compressed_one_hold_arrays_too(tmp_path: Path) -> None:
    content = {"w": np.arange(99_000, dtype="f4").reshape(300, 330).T, "b": np.arange(3.0)}
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    deflate(tmp_path / "zip.pth", tmp_path / "deflated.pth")
    for name in ("zip", "legacy", "deflated"):
        sm.convert(tmp_path / f"{name}.pth", tmp_path / f"{name}.out.pth")
        made = torch.load(tmp_path / f"{name}.out.pth", weights_only=False)
        assert list(made) == ["w", "b"]
        assert all(np.array_equal(made[key], content[key]) for key in content)
