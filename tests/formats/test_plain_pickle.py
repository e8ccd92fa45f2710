"""Plain pickles of numpy's arrays, as detectron2 and its relatives publish weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import load_safetensors, mean, octets
from safetensors.torch import save_file

import streammerge as sm
from formats.suite import FormatSuite, Tensors
from streammerge.formats.plain_pickle import header, matches


def arrays(tensors: Tensors) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def same_arrays(made: dict[str, Any], tensors: Tensors) -> None:
    assert list(made) == list(tensors)
    for name, tensor in tensors.items():
        assert type(made[name]) is np.ndarray
        assert (made[name].shape, made[name].dtype) == (tuple(tensor.shape), tensor.numpy().dtype), name
        assert made[name].tobytes() == octets(tensor), name


class PlainPickle(FormatSuite):
    PROTOCOL = 2
    NAME = "model.pkl"
    DTYPES: ClassVar[tuple[torch.dtype, ...]] = tuple(t for t in FormatSuite.DTYPES if t is not torch.bfloat16)

    def write(self, path: Path, tensors: Tensors) -> None:
        content = {"model": arrays(tensors), "__author__": "model zoo", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content, self.PROTOCOL))

    @pytest.mark.parametrize("io", ["mmap", "pread"])
    @pytest.mark.parametrize("out", ["out.safetensors", "out.pth", "out.pkl"])
    def test_every_bit_is_kept(self, tmp_path: Path, io: str, out: str) -> None:
        """A pickle and a .pth have arrays where the input has arrays."""
        tensors = self.tensors(2)
        path = self.saved(tmp_path, tensors)
        sm.convert(path, tmp_path / out, io=io)
        if out.endswith("safetensors"):
            made = load_safetensors(tmp_path / out)
            assert {name: octets(tensor) for name, tensor in made.items()} == {n: octets(t) for n, t in tensors.items()}
            return
        load = pickle.load if out.endswith("pkl") else lambda file: torch.load(file, weights_only=False)
        with (tmp_path / out).open("rb") as file:
            made = load(file)
        assert (made.pop("__author__"), made.pop("matching_heuristics")) == ("model zoo", True)
        same_arrays(made.pop("model"), tensors)
        assert not made
        assert sm.verify(tmp_path / out, sample=1.0).recomputed

    @pytest.mark.parametrize("out", ["out.pkl", "out.pth"])
    def test_a_merge_is_written_as_arrays(self, tmp_path: Path, out: str) -> None:
        one, two = self.floats(3), self.floats(4)
        paths = [self.saved(tmp_path, one), self.saved(tmp_path, two, "other.pkl")]
        seen = set()
        for way in ({}, {"workers": 1, "memory": "48MiB"}, {"io": "pread", "workers": 3}):
            sm.merge(paths, tmp_path / out, weights=[0.6, 0.4], overwrite=True, **way)  # type: ignore[arg-type]
            seen.add((tmp_path / out).read_bytes())
        assert len(seen) == 1
        made = torch.load(tmp_path / out, weights_only=False) if out == "out.pth" else pickle.loads(seen.pop())
        same_arrays(made["model"], {name: mean([one[name], two[name]], [0.6, 0.4]) for name in one})
        assert all(array.flags.writeable for array in made["model"].values())
        assert sm.verify(tmp_path / out, sample=1.0).recomputed


class TestProtocol2(PlainPickle):
    """The arrays are texts."""


class TestProtocol4(PlainPickle):
    PROTOCOL = 4


class TestProtocol5(PlainPickle):
    """The arrays are bytearrays."""

    PROTOCOL = 5


def test_an_output_is_read_and_merged_again(tmp_path: Path) -> None:
    content = {"w": np.ones((3, 4), "f4"), "one": np.ones(1, "u1"), "none": np.ones(0), "s": np.float64(3)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 4))
    sm.merge([tmp_path / "a.pkl"] * 2, tmp_path / "b.pkl", integers="first")
    sm.merge([tmp_path / "b.pkl", tmp_path / "a.pkl"], tmp_path / "c.pkl", integers="first")
    made = pickle.loads((tmp_path / "c.pkl").read_bytes())
    assert list(made) == list(content)
    assert all(np.array_equal(made[name], content[name]) for name in content)
    assert len(sm.inspect(tmp_path / "c.pkl").metadata) == 2
    assert sm.inspect(tmp_path / "c.pkl").format == "pickle"


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weights": {"w": np.arange(99, dtype="f4")}, "by": "x"}, 4))
    sm.convert(tmp_path / "a.pkl", tmp_path / "b.pkl")
    data = (tmp_path / "b.pkl").read_bytes()
    for old, new, said in (
        (b"weights", b"Weights", "header"),
        (np.float32(50).tobytes(), np.float32(51).tobytes(), "byte"),
    ):
        assert data.count(old) == 1
        (tmp_path / "b.pkl").write_bytes(data.replace(old, new))
        with pytest.raises(sm.VerifyError, match=said):
            sm.verify(tmp_path / "b.pkl")


def test_tensors_become_arrays_where_numpy_has_their_dtype(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 3), "half": torch.ones(2).half()}, tmp_path / "a.safetensors")
    sm.convert(tmp_path / "a.safetensors", tmp_path / "a.pkl")
    made = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert type(made) is dict
    assert {name: (array.dtype.name, array.shape) for name, array in made.items()} == {
        "w": ("float32", (2, 3)),
        "half": ("float16", (2,)),
    }
    with pytest.raises(sm.RecipeError, match=r"bfloat16, which numpy does not have; pass another `dtype`"):
        sm.convert(tmp_path / "a.safetensors", tmp_path / "b.pkl", dtype="bfloat16")


def test_torchs_container_stays_torchs_under_such_a_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pkl")
    sm.convert(tmp_path / "a.pkl", tmp_path / "b.pkl")
    assert torch.load(tmp_path / "b.pkl")["w"].tolist() == [1, 1]


def test_what_is_no_weights_is_said(tmp_path: Path) -> None:
    for content, said in (
        (pickle.dumps({"a": 1}), "it holds no tensors"),
        (pickle.dumps({"w": np.ones(2)}) + b"more", "4 bytes behind it"),
        (pickle.dumps({"w": np.ones(2)}) * 2, "bytes behind it"),
        (pickle.dumps({"w": np.ones(2)}, 0), "is no checkpoint|old protocol|text file"),
    ):
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(sm.FormatError, match=said):
            sm.inspect(tmp_path / "a.pkl")


def test_only_pickles_match() -> None:
    assert matches(pickle.dumps(1, 2), 10) == "unless another"
    assert not matches(b"PK\3\4", 10)
    assert not matches(pickle.dumps(1, 0), 10)
    assert header("streammerge", b"text") == b"streammerge\ntext"


def test_a_header_of_a_stranger_is_a_text_like_others(tmp_path: Path) -> None:
    """Only our own keys are metadata."""
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04X\3\0\0\0a\nb0" + pickle.dumps({"w": np.ones(2)}, 4)[2:])
    index = sm.inspect(tmp_path / "a.pkl")
    assert (index.metadata, list(index)) == ({}, ["w"])
