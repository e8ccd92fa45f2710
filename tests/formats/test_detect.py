"""Detection of a file by its content, and the message for files of no known format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli, trained

import streammerge as sm


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1863\n", "Git LFS pointer.*1863.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\0" * 100, "zero bytes"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b'{"weight_map": {}}', "JSON"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\xff\x01", "ONNX model"),
        (b"\x08\x07\x12\x0bonnx.quantize\x1a\x01:\xff\x01", "ONNX model"),
        (b"\x1c\0\0\0TFL3\x14\0\x20\0", "TensorFlow Lite"),
        (b"\x81\xa6params\x82\xa7encoder\x81", "MessagePack.*from_flax"),
        (b"\xde\0\x10\xa4bias\xc7\x20\x01\x93", "MessagePack"),
        (b"Rar!\x1a\x07\x00\xcf", "RAR archive; unpack"),
        (b"\x28\xb5\x2f\xfd\x04\x58", "Zstandard"),
        (b"lmgg\x01\0\0\0", "whisper.cpp"),
        (b"merge_method: linear\nmodels: []\n", "text file"),
        (b"\x80\x04\x95\x0b\0\0\0", "damaged pickle"),
        (b"PK\3\4 and nothing else", "truncated or damaged"),
        (b"\xff\xfe\x00\x01\x02\x03\x04\x05\x06\x07", "not a checkpoint of a known format"),
    ],
)
def test_what_a_file_is_is_decided_by_content(tmp_path: Path, cli: Cli, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(sm.FormatError, match=said):
        sm.inspect(tmp_path / "model.safetensors")


def test_truncated_files_are_named(tmp_path: Path) -> None:
    torch.save(trained(1), tmp_path / "zip.pth")
    torch.save(trained(1), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    sm.convert(tmp_path / "zip.pth", tmp_path / "st.safetensors")
    for path in list(tmp_path.iterdir()):
        for size in (path.stat().st_size - 1, path.stat().st_size // 2, 40):
            cut = tmp_path / "cut"
            cut.write_bytes(path.read_bytes()[:size])
            with pytest.raises(sm.FormatError, match="cut"):
                sm.inspect(cut)
