"""The tar format of torch 0.1."""

from __future__ import annotations

import struct
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from conftest import assert_same, load_safetensors

import streammerge as sm
from formats.suite import FormatSuite, Tensors


def old_tar(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes the tar layout of torch 0.1, reconstructed from its reader."""
    import pickle

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return str(obj.key) if isinstance(obj, Key) else None

    class Key:
        def __init__(self, key: int) -> None:
            self.key = key

    def dumped(*values: Any) -> bytes:
        return b"".join(pickle.dumps(value, 2) for value in values)

    # the pickle names these keys as text; here they are numbers
    storages, table = dumped(len(tensors)), dumped(len(tensors))
    for number, tensor in enumerate(tensors.values()):
        storages += (
            dumped((100 + number, "cpu", torch.FloatStorage)) + struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes()
        )
        sizes = [*tensor.shape, *tensor.stride(), 0]
        table += dumped((200 + number, 100 + number, torch.FloatTensor)) + struct.pack(
            f"<i4x{len(sizes)}q", tensor.dim(), *sizes
        )
    stream = BytesIO()
    Pickler(stream, 2).dump({name: Key(200 + number) for number, name in enumerate(tensors)})
    members = {"sys_info": dumped({"little_endian": True}), "pickle": stream.getvalue(), "tensors": table}
    with tarfile.open(path, "w") as archive:
        for name, data in {**members, "storages": storages + dumped([])}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def test_the_old_tar_layout(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    old_tar(tmp_path / "in.pth", tensors)
    assert_same(torch.load(tmp_path / "in.pth", weights_only=False), tensors)
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)


class TestTorchTar(FormatSuite):
    DTYPES = (torch.float32,)  # the dtype that the writer of this test supports

    def write(self, path: Path, tensors: Tensors) -> None:
        old_tar(path, tensors)
