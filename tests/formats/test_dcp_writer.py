"""The plan of a folder of torch.distributed.checkpoint: every byte of a file has one place."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from streammerge.formats import dcp_writer
from streammerge.formats.base import LayoutFile
from streammerge.formats.dcp_writer import Piece, Whole, plan_files
from streammerge.stores.checksums import CRC32
from streammerge.tensors.dtypes import DType

TENSORS = {"a": torch.randn(5, 3), "b": torch.randn(()).bfloat16(), "c": torch.empty(0, 2), "d": torch.arange(4)}
DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.int64: DType.I64}
OBJECT = b"an item that is copied as it is"


def octets(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) if tensor.dim() else octets(tensor[None])


def pieces() -> tuple[list[Piece], dict[str, Whole]]:
    made = [Piece(name, name, t.nbytes, ((0,) * t.dim(), tuple(t.shape)), DTYPES[t.dtype]) for name, t in TENSORS.items()]
    wholes = {name: Whole(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in TENSORS.items()}
    return [*made, Piece("object", "step", len(OBJECT))], wholes


def written(layout: LayoutFile) -> bytes:
    """Puts a file together. Every byte must be written once."""
    data = bytearray(layout.size)
    seen = bytearray(layout.size)
    content = {name: octets(tensor) for name, tensor in TENSORS.items()} | {"object": OBJECT}
    parts = [(layout.offsets[name], content[name]) for name in layout.offsets]
    sums = {at: CRC32.update(part) for at, part in parts}
    parts += [(each.offset, each.data) for each in layout.around(sums, b"")]
    for at, part in parts:
        assert not any(seen[at : at + len(part)])
        data[at : at + len(part)], seen[at : at + len(part)] = part, b"\1" * len(part)
    assert all(seen)
    return bytes(data)


@pytest.mark.parametrize("most", [1, 3000, 1 << 30])
def test_items_and_metadata(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(dcp_writer, "_FILE_BYTES", most)
    wanted, wholes = pieces()
    layouts, places = plan_files(wanted, wholes, {"a": ("model", "a")})
    assert len(layouts) == {1: 6, 3000: 3, 1 << 30: 2}[most]
    files = {layout.name: written(layout) for layout in layouts[:-1]}
    metadata = pickle.loads(layouts[-1].literals[0].data)
    assert isinstance(metadata, Metadata)
    assert metadata.planner_data == {"a": ("model", "a")}
    for name, tensor in TENSORS.items():
        entry = metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        assert (entry.size, entry.properties.dtype) == (tensor.shape, tensor.dtype)
        info = metadata.storage_data[MetadataIndex(name, torch.Size([0] * tensor.dim()))]
        item = files[info.relative_path][info.offset : info.offset + info.length]
        assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None
        assert torch.equal(torch.load(io.BytesIO(item), weights_only=True), tensor)
        number, at = places[name]
        assert layouts[number].name == info.relative_path
        assert files[info.relative_path][at : at + tensor.nbytes] == octets(tensor)
    assert isinstance(metadata.state_dict_metadata["step"], BytesStorageMetadata)
    info = metadata.storage_data[MetadataIndex("step")]
    assert files[info.relative_path][info.offset :][: info.length] == OBJECT


def test_it_is_a_folder_for_torch(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    wanted, wholes = pieces()
    layouts, _ = plan_files(wanted[:-1], wholes, {})
    for layout in layouts:
        (tmp_path / layout.name).write_bytes(written(layout) if layout.offsets else layout.literals[0].data)
    dcp_to_torch_save(tmp_path, tmp_path / "out.pth")
    made = torch.load(tmp_path / "out.pth")
    assert made.keys() == TENSORS.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in TENSORS.items())
