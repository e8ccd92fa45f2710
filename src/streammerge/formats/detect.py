"""Detection of a file's format by its content; its name is ignored."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from streammerge.errors import FormatError, printable
from streammerge.formats.base import Container
from streammerge.stores.local import file_size, open_stream

_HEAD_BYTES = 512
_READERS = ("safetensors", "torch_zip", "torch_tar", "torch_legacy")
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file, whose weights are quantised for llama.cpp; give the original safetensors"),
    (b"\x89HDF", "an HDF5 file (Keras); only PyTorch and safetensors checkpoints are read"),
    (b"\x93NUMPY", "a numpy array; only PyTorch and safetensors checkpoints are read"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"BZh", "a bzip2 file; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\xfd7zXZ", "an xz file; unpack it first"),
    (b"PK\5\6", "an empty zip archive"),
)


def read(path: Path) -> Container:
    """Returns the container of a file or folder. Raises FormatError that names what was found instead."""
    if not path.is_dir() and not path.name.endswith(".index.json"):
        return read_file(path)
    from streammerge.formats import folder

    return folder.read(path, read_file) if path.is_dir() else folder.read_sharded(path, read_file)


def read_file(path: Path) -> Container:
    """Returns the container of a single file. Raises FormatError."""
    size = file_size(path)
    with open_stream(path) as stream:
        head = stream.read(min(_HEAD_BYTES, size))  # files of the kernel have size 0, and some never end
    for name in _READERS:
        # imports only the readers that are tried, so that inspecting a file is fast
        reader = import_module(f"streammerge.formats.{name}")
        if reader.matches(head, size):
            container: Container = reader.read(path)
            return container
    raise FormatError(f"{printable(path)} {_what(head, size)}")


def _what(head: bytes, size: int) -> str:
    if not size:
        return "is empty (0 bytes); the download or the save did not finish"
    if head.startswith(b"version https://git-lfs"):
        stated = re.search(rb"size (\d+)", head)
        wanted = f" of {int(stated[1])} bytes" if stated else ""
        return f"is a Git LFS pointer, not the file{wanted} it stands for; run `git lfs pull`"
    if re.match(rb"\s*<(!doctype|html|\?xml|head|error)", head, re.IGNORECASE):
        return "is an HTML or XML page, not a checkpoint: a download that failed; fetch it again"
    if not head.strip(b"\0"):
        return "begins with zero bytes only; the download or the save did not finish"
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return f"is {what}"
    if head[:1] == b"\x80" and head[1:2] in (b"\0", b"\1", b"\2", b"\3", b"\4", b"\5"):
        return "is a plain pickle, not written by torch.save; load it in Python and torch.save its state dict"
    if re.match(rb"\s*[{\[]", head):
        return "is a JSON text, not a checkpoint"
    if len(head) >= 16 and head[8:9] == b"{":
        return "begins like safetensors, but its header length is impossible; it is damaged"
    if re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]+", head) and b"\n" in head:
        return "is a text file, not a checkpoint"
    return f"is not a checkpoint of a known format (it begins with {head[:8].hex(' ')})"
