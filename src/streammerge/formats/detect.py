"""Detection of a file's format by its content; its name is ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from streammerge.errors import FormatError, StreammergeError, printable
from streammerge.formats.base import Container, Format, is_index, is_part
from streammerge.stores.base import Location

_HEAD_BYTES = 512
_SHORT_TEXT_BYTES = 200
_COMMON = ("safetensors", "torch_zip")
"""The formats that are asked first, so that their files need no other."""
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF", "an HDF5 file (Keras); only PyTorch and safetensors checkpoints are read"),
    (b"\x93NUMPY", "a numpy array; only PyTorch and safetensors checkpoints are read"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"lmgg", "a file of whisper.cpp or of llama.cpp before GGUF; give the checkpoint that it was made from"),
    (b"ftrt", "a TensorRT engine, which is made for one card; give the checkpoint that it was made from"),
    (b"PK\5\6", "an empty zip archive"),
)
_COMPRESSED: tuple[tuple[bytes, str, str, str], ...] = (
    (b"\x1f\x8b", "a gzip file", "gzip", ".gz"),
    (b"BZh", "a bzip2 file", "bzip2", ".bz2"),
    (b"\xfd7zXZ", "an xz file", "xz", ".xz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "zstd", ".zst"),
)
"""The begin of a compressed file, what it is, the program that unpacks it, and the usual end of its name."""
_ONNX = rb"(?s)\x08[\x01-\x14]\x12.[\x20-\x7e]{2,40}\x1a|\x08[\x01-\x14]\x12\x07pytorch|\x08[\x01-\x14](\x12\x00)?:"
"""The begin of an ONNX model: the version of its format, then the name of what made it, or the graph."""
_MSGPACK = rb"(?s)([\x81-\x8f]|\xde..)([\xa1-\xbf]|\xd9.)[\x20-\x7e]+([\x81-\x8f]|\xc7|\xc8|\xc9|\xde)"
"""The begin of a mapping in MessagePack: a name, then another mapping or an array of Flax."""


def read(path: Location) -> Container:
    """Returns the container of a file or folder. Raises FormatError that names what was found instead."""
    if not path.is_folder() and not is_index(path.name):
        return read_file(path)
    from streammerge.formats import folder, shards

    return folder.read(path, read_file) if path.is_folder() else shards.read_sharded(path, read_file)


def read_file(path: Location) -> Container:
    """Returns the container of a single file. Raises FormatError."""
    if is_part(path):
        folder = printable(path.parent)
        raise FormatError(
            f"{printable(path)} is one rank's part of the distributed checkpoint in {folder}; give that folder"
        )
    size = path.size
    with path.stream() as stream:
        head = stream.read(min(_HEAD_BYTES, size))  # files of the kernel have size 0, and some never end
    likely, failures = None, list[str]()
    for format in _formats():
        try:
            matches = format.matches(head, size)
        except Exception as error:  # a plug-in may raise anything for the head of another format's file
            if isinstance(format, ModuleType):
                raise
            failures.append(f"; the format {_name(format)} failed with {_said(error)}")
            continue
        if matches is True:
            return _read(format, path)
        likely = format if matches and likely is None else likely
    if likely is not None:
        return _read(likely, path)
    from streammerge.formats import archive

    end = path.read(max(size - archive.END_BYTES, 0), min(size, archive.END_BYTES))
    raise FormatError(f"{printable(path)} {_compressed(path, head) or _what(head, size, end)}{''.join(failures)}")


def _read(format: Format, path: Location) -> Container:
    """Reads a file. Raises FormatError that names the format if a plug-in fails."""
    built_in = isinstance(format, ModuleType)
    if built_in:
        return format.read(path)
    name = _name(format)
    try:
        made: Any = format.read(path)
    except (StreammergeError, OSError, MemoryError):
        raise
    except Exception as error:  # a plug-in may raise anything
        raise FormatError(f"{printable(path)} cannot be read: the format {name} failed with {_said(error)}") from error
    if not isinstance(made, Container):
        raise FormatError(
            f"{printable(path)} cannot be read: the format {name} made {type(made).__name__}, not a Container"
        )
    return made


def _formats() -> Iterator[Format]:
    """Yields every format in the order in which they are asked."""
    for name in _COMMON:
        yield import_module(f"streammerge.formats.{name}")
    from streammerge.formats.registry import others

    yield from others(_COMMON)


def _name(plug_in: Format) -> str:
    from streammerge.formats.registry import name_of

    return name_of(plug_in)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(error)}"


def _compressed(path: Location, head: bytes) -> str:
    """Returns what a compressed file is, with the command that unpacks it; "" for any other file.

    A tensor in it cannot be read without all before it. NeMo packs its archives either way, and loads the unpacked one too.
    """
    found = next((each for each in _COMPRESSED if head.startswith(each[0])), None)
    if found is None:
        return ""
    from shlex import quote

    _, what, program, ending = found
    to = path.name.removesuffix(ending) if path.name.endswith(ending) else f"unpacked-{path.name}"
    command = f"{program} -dc {quote(printable(path))} > {quote(printable(path.parent / to))}"
    packed = ", a packed tar archive, as NeMo writes some" if path.name.endswith(".nemo") and program == "gzip" else ""
    return f"is {what}{packed}, which is read from begin to end only; unpack it with `{command}` and give that file"


def _what(head: bytes, size: int, end: bytes) -> str:
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
    if head[4:8] == b"TFL3":
        return "is a TensorFlow Lite model; give the checkpoint that it was made from"
    if re.match(_ONNX, head):
        return "is an ONNX model, whose names and layouts are an exporter's; give the checkpoint that it was made from"
    if re.match(_MSGPACK, head):
        return (
            "is a MessagePack file, as Flax writes it; load it in transformers with from_flax=True, or in Python, and save "
            "it as safetensors"
        )
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return f"is {what}"
    if re.match(rb"\x80[\0\1]|\(d[pq]|\}q|ccollections\nOrderedDict\n", head):
        return "is a plain pickle of an old protocol; load it in Python and pickle it again with protocol 2 or higher"
    from streammerge.formats import archive

    if end.startswith(archive.END):
        return "has bytes before its zip archive, so torch.load does not read it either; save it again"
    if re.match(rb"\s*[{\[]", head):
        return f"is a JSON text, not a checkpoint{_quoted(head, size)}"
    if len(head) >= 16 and head[8:9] == b"{":
        return "begins like safetensors, but its header length is impossible; it is damaged"
    short = size <= _SHORT_TEXT_BYTES and re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head)
    if short or (re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]+", head) and b"\n" in head):
        return f"is a text file, not a checkpoint{_quoted(head, size)}"
    return f"is not a checkpoint of a known format (it begins with {head[:8].hex(' ')})"


def _quoted(head: bytes, size: int) -> str:
    """Quotes a short text, which may say why a download failed."""
    text = printable(head.decode("utf-8", "replace").strip())
    return f": {text!r}; fetch it again" if size <= _SHORT_TEXT_BYTES else ""
