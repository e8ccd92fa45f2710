"""NeMo archives (``.nemo``): an uncompressed tar with a configuration and the weights, read where they lie in it.

The weights are one file of torch.save, or a folder of torch.distributed.checkpoint. An archive with one file is written
too: all members of the first input, with other weights.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import BinaryIO, NamedTuple

from streammerge.errors import FormatError, RecipeError, listed, printable
from streammerge.formats import archive, torch_zip
from streammerge.formats.base import Container, LayoutFile, Literal, Match
from streammerge.stores.base import Location
from streammerge.units import decimal_bytes

NAME = "NeMo archive"
"""What :class:`Container` calls the format."""
_BLOCK = 512
_MOST_MEMBERS = 1_000_000
_MOST_NAME_BYTES = 1 << 16
_OF_TORCH = ("sys_info", "pickle", "tensors", "storages")
"""The members of a tar of torch 0.1."""
_WEIGHTS = "model_weights.ckpt"
_MOST_BYTES_BESIDE = 64 << 20
"""What an archive that is written may hold beside its weights; these bytes are held in memory."""
_FOLDER = "model_weights/"
_PARALLEL = re.compile(r"(mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)/model_weights\.ckpt")


def matches(head: bytes, size: int) -> Match:
    """Whether it is a tar archive that does not begin as one of torch 0.1."""
    return head[257:262] == b"ustar" and _clean(head[:100]) not in _OF_TORCH


def read(path: Location) -> Container:
    """Returns the container of the weights in a NeMo archive. Raises FormatError; nothing in it is executed."""
    where = printable(path)
    with path.stream() as stream:
        found = {each.name: each for each in _members(stream, where)}
    places = {name: (each.begin, each.nbytes) for name, each in found.items()}
    if parallel := [name for name in places if _PARALLEL.fullmatch(name)]:
        raise FormatError(
            f"{where} holds a model in parts of {len(parallel)} model-parallel ranks ({listed(sorted(parallel), 2)}), "
            "which is not read; make one of them with NeMo's `change_tensor_parallel_partition.py`"
        )
    if _WEIGHTS in places:
        with path.stream() as stream:
            head = stream.seek(places[_WEIGHTS][0]) and stream.read(_BLOCK)
            if not archive.matches(head or b""):
                raise FormatError(
                    f"{where}: its {_WEIGHTS} is not in the zip format of torch.save; unpack the archive and give that file"
                )
        made = torch_zip.read(path, places[_WEIGHTS], _WEIGHTS)
        made.enclosed = partial(_enclosed, path, found[_WEIGHTS])
    elif inside := {name.removeprefix(_FOLDER): place for name, place in places.items() if name.startswith(_FOLDER)}:
        from streammerge.formats import nemo_folder  # here, because files of many formats come past this one

        made = nemo_folder.read(path, inside)
    else:
        raise FormatError(f"{where} is a tar archive, not a PyTorch checkpoint; unpack it and give the checkpoint inside")
    made.format, made.files, made.distributed = NAME, (path,), None
    made.members = sorted(name for name in places if name != _WEIGHTS and not name.startswith(_FOLDER))
    if made.members:
        made.facts["beside"] = listed(made.members)
    return made


class _Member(NamedTuple):
    """A regular member: from ``start`` on its headers, the last of which is ``header``; from ``begin`` on its bytes."""

    name: str
    start: int
    header: bytes
    begin: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.begin + _padded(self.nbytes)

    def header_for(self, nbytes: int) -> bytes:
        """Returns its header for another size: octal digits, or binary from 8 GiB on."""
        size = b"%011o\0" % nbytes if nbytes < 8 << 30 else b"\x80" + nbytes.to_bytes(11, "big")
        blank = self.header[:124] + size + self.header[136:148] + b" " * 8 + self.header[156:]
        return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def _enclosed(path: Location, weights: _Member, file: LayoutFile) -> LayoutFile:
    """Returns the plan of the archive with a planned file of weights in the place of its own; all other bytes are kept.

    Raises RecipeError if these are too many.
    """
    beside = path.size - (weights.end - weights.start)
    if beside > _MOST_BYTES_BESIDE:
        raise RecipeError(
            f"{printable(path)} holds {decimal_bytes(beside)} beside its weights, too much to write it again; write a "
            f".ckpt file and put it into the archive as {_WEIGHTS}"
        )
    head = path.read(0, weights.start) + weights.header_for(file.size)
    end = len(head) + file.size
    tail = bytes(-file.size % _BLOCK) + path.read(weights.end, path.size - weights.end)
    offsets = {name: offset + len(head) for name, offset in file.offsets.items()}
    seal = partial(_sealed, file, head, Literal(end, tail))
    return file._replace(size=end + len(tail), offsets=offsets, literals=(), seal=seal)


def _sealed(file: LayoutFile, head: bytes, tail: Literal, checksums: Mapping[int, int], receipt: bytes) -> list[Literal]:
    """Returns all bytes of an archive outside tensors."""
    inner = file.around({offset - len(head): value for offset, value in checksums.items()}, receipt)
    return [Literal(0, head), *(Literal(each.offset + len(head), each.data) for each in inner), tail]


def _members(stream: BinaryIO, where: str) -> Iterator[_Member]:
    """Yields each regular member. Raises FormatError.

    Reads names and sizes in extended headers too: Python writes these for long names and for members of 8 GiB or more.
    """
    cursor, end = 0, stream.seek(0, io.SEEK_END)
    start = cursor
    seen = set[str]()
    extended: dict[str, str] = {}
    for _ in range(_MOST_MEMBERS):
        stream.seek(cursor)
        header = stream.read(_BLOCK)
        if len(header) < _BLOCK or not header.strip(b"\0"):
            return
        kind, nbytes = header[156:157], _number(header[124:136])
        if header[257:262] != b"ustar" or nbytes < 0:
            raise FormatError(f"{where}: its tar directory is damaged at byte {cursor}")
        begin = cursor + _BLOCK
        if kind in (b"0", b"\0"):
            nbytes = int(extended.get("size", nbytes))
        if begin + nbytes > end:
            raise FormatError(f"{where} is truncated: a member of its tar archive reaches beyond its end")
        cursor = begin + _padded(nbytes)
        if kind in (b"x", b"L"):
            if nbytes > _MOST_NAME_BYTES:
                raise FormatError(f"{where}: an extended header of its tar archive has {nbytes} bytes, which is too many")
            extended |= _extended(stream.read(nbytes), kind)
            continue
        if kind in (b"0", b"\0"):
            prefix = _clean(header[345:500]) if header[257:263] == b"ustar\0" else ""
            name = extended.get("path") or (f"{prefix}/" if prefix else "") + _clean(header[:100])
            name = name.removeprefix("./")
            if name in seen:
                raise FormatError(f"{where} holds the member {printable(name)} twice; such a file is refused")
            seen.add(name)
            yield _Member(name, start, header, begin, nbytes)
        extended, start = {}, cursor


def _extended(data: bytes, kind: bytes) -> dict[str, str]:
    """Returns the name and the size that an extended header tells for the next member."""
    if kind == b"L":
        return {"path": _clean(data)}
    found = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(rb"[0-9]{1,6}", length) or not len(length) < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path" or (key == b"size" and re.fullmatch(rb"[0-9]{1,18}", value)):
            found[key.decode()] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return found


def _padded(nbytes: int) -> int:
    """Returns how many bytes a member takes, whole blocks."""
    return -(-nbytes // _BLOCK) * _BLOCK


def _clean(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "replace")


def _number(field: bytes) -> int:
    """Returns a number in a header: octal digits, or binary beyond 8 GiB. -1 if it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,12}", digits) else -1
