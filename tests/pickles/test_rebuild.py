"""Tensors and storages as torch makes them, computed from the arguments alone."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge as sm
from streammerge.pickles.rebuild import Damaged, StorageTable, storage_dtype, text
from streammerge.pickles.tree import Global, PersistentId, StorageRef, TensorRef
from streammerge.pickles.unpickle import unpickle

BASE = torch.arange(60, dtype=torch.float32)
TENSORS = {
    "whole": BASE,
    "0-d": BASE[7],
    "empty": torch.empty(0, 3),
    "view": BASE[10:40].view(5, 6),
    "transposed": BASE.view(6, 10).t(),
    "stepped": BASE[3::7],
    "expanded": BASE[:3].unsqueeze(1).expand(3, 4),
    "half": torch.ones(3).half(),
    "bool": torch.tensor([True, False]),
    "complex": torch.ones(2, dtype=torch.complex64),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "uint16": torch.ones(2, dtype=torch.uint16),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "grad": torch.ones(2, requires_grad=True),
    "conj": torch.ones(2, dtype=torch.complex64).conj(),
}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[dict[str, TensorRef], StorageTable]:
    torch.save(TENSORS, tmp_path / "in.pth")
    table = StorageTable()
    with zipfile.ZipFile(tmp_path / "in.pth") as archive:
        return unpickle(archive.read("in/data.pkl"), table), table


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_described_as_torch_describes_them(name: str, saved: tuple[dict[str, TensorRef], StorageTable]) -> None:
    ref, tensor = saved[0][name], TENSORS[name]
    assert isinstance(ref, TensorRef)
    assert (ref.shape, ref.strides, ref.offset) == (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    assert ref.dtype.torch == tensor.dtype
    assert ref.storage.nbytes == tensor.untyped_storage().nbytes()
    assert ref.requires_grad == tensor.requires_grad
    assert ref.lazy == ("conjugated" if name == "conj" else "")
    assert bool(ref.wrapper) == (name == "parameter")


def test_views_share_their_storage(saved: tuple[dict[str, TensorRef], StorageTable]) -> None:
    tree, table = saved
    assert tree["view"].storage is tree["whole"].storage is tree["stepped"].storage
    assert tree["half"].storage is not tree["whole"].storage
    assert len(table.refs) == len({id(ref.storage) for ref in tree.values()})


def test_a_storage_has_one_dtype() -> None:
    table = StorageTable()
    first = table.add(StorageRef("0", storage_dtype(Global("torch", "FloatStorage")), 4))
    assert table.add(StorageRef("0", storage_dtype(Global("torch", "FloatStorage")), 4)) is first
    with pytest.raises(Damaged, match="two dtypes"):
        table.add(StorageRef("0", storage_dtype(Global("torch", "HalfStorage")), 4))


@pytest.mark.parametrize("kind", [Global("evil", "FloatStorage"), Global("torch", "NoStorage"), "FloatStorage", None])
def test_storages_of_other_classes_are_refused(kind: object) -> None:
    with pytest.raises(Damaged, match="class"):
        storage_dtype(kind)


def test_ids_that_are_not_torchs_stay_inert() -> None:
    table = StorageTable()
    assert isinstance(table("x"), PersistentId)
    assert isinstance(table(("other", 1)), PersistentId)
    assert table(("module", Global("m", "C"), "source", "code")) == Global("m", "C")
    for numel in (-1, "4", None, 2**70):
        with pytest.raises((Damaged, TypeError, ValueError)):
            table(("storage", Global("torch", "FloatStorage"), "0", "cpu", numel))


def test_names_are_text_and_not_endless() -> None:
    assert text("x" * 1000) == "x" * 1000
    assert text("ü".encode()) == "ü"
    for value in ("x" * 1001, b"x" * 1001, 3, None):
        with pytest.raises(Damaged):
            text(value)


def test_tensors_that_pickle_alone_wrote_are_called_so(tmp_path: Path) -> None:
    """Inside an archive of torch.save they have no place of their own in the file."""
    with zipfile.ZipFile(tmp_path / "a.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": torch.ones(3)}))
    with pytest.raises(sm.FormatError, match=r"were pickled without torch\.save; load it in Python") as raised:
        sm.inspect(tmp_path / "a.pkl")
    assert "damaged" not in str(raised.value)


class OnDevice:
    """A tensor as torch pickles it that lies on a device without storages, as those of XLA and Gaudi."""

    def __init__(self, tensor: torch.Tensor, as_array: bool) -> None:
        self.tensor, self.as_array = tensor, as_array

    def __reduce__(self) -> tuple[object, ...]:
        if self.as_array:
            arguments = (self.tensor.float().numpy(), self.tensor.dtype, "cpu", False)
            return torch._utils._rebuild_device_tensor_from_numpy, arguments
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (self.tensor, self.tensor.dtype, "cpu", False)


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_devices_without_storages(tmp_path: Path, as_array: bool, dtype: torch.dtype) -> None:
    tensors = [{"fc.weight": torch.randn(6, 5).to(dtype), "fc.bias": torch.randn(6).to(dtype)} for _ in range(2)]
    for number, each in enumerate(tensors):
        wrapped = {name: OnDevice(tensor, as_array) for name, tensor in each.items()}
        torch.save({"model": wrapped}, tmp_path / f"{number}.pt")
    inputs = [tmp_path / f"{number}.pt" for number in range(2)]
    sm.convert(inputs[0], tmp_path / "one.safetensors")
    sm.merge(inputs, tmp_path / "out.pt")
    converted, merged = load_file(tmp_path / "one.safetensors"), torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    for name in tensors[0]:
        assert torch.equal(converted[name], tensors[0][name])
        assert converted[name].dtype == dtype
        assert torch.equal(merged[name], ((tensors[0][name].double() + tensors[1][name].double()) / 2).to(dtype))
