"""Checkpoints that are folders: shards with an index, or one checkpoint among its side files.

A name in an index is a plain file name, so it stays in the folder. A link in the folder belongs to the user and is
followed (:func:`streammerge.stores.files.file_status`). It is an error if a shard is absent, if a tensor is not in the
shard that the index names, or if two shards hold the same tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container, StorageBytes
from streammerge.formats.distributed import refuse_distributed
from streammerge.options import RECEIPT_FILE, RECIPE_FILE
from streammerge.pickles.state_dict import select
from streammerge.pickles.tree import StorageRef, TensorRef
from streammerge.stores.base import Location
from streammerge.strict_json import load_json
from streammerge.tensors.conventions import CHECKSUM_FILES

MAX_INDEX_BYTES = 256 << 20
_MOST_SIDE_FILE_BYTES = 128 << 20
_INDEX_ENDING = ".index.json"
_PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
    "model.pt",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".th", ".tar")
_TRAINING = ("training_args.bin", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state.json")
_NOT_COPIED = (".gguf", ".onnx", ".msgpack", ".h5", ".ot", ".tflite", ".distcp", ".gitattributes", ".lock")

_OWN_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

ReadFile = Callable[[Location], Container]


def read(folder: Location, read_file: ReadFile) -> Container:
    """Returns the container of a checkpoint folder. If it has several forms, takes the one that transformers takes.

    Raises FormatError; for forms that are not read yet, it names the command to run.
    """
    present = {p.name for p in folder.children()}
    names = [n for n in present if n.endswith(_WEIGHTS) and not n.startswith((*_TRAINING, "."))]
    indexes = sorted(n for n in present if n.endswith(_INDEX_ENDING))
    chosen = [n for n in _PREFERRED if n in present][:1] or indexes[:1]
    if chosen and chosen[0] in indexes:
        return read_sharded(folder / chosen[0], read_file)
    if not chosen:
        refuse_distributed(folder)
        chosen = names
    if len(chosen) != 1:
        what = f"several checkpoints ({listed(sorted(chosen))}); give one of them" if chosen else "no checkpoint"
        raise FormatError(f"{printable(folder)} holds {what}")
    container = read_file(inside(folder, chosen[0]))
    if len(names) > 1:
        container.notes.append(
            f"{printable(folder)}: {printable(chosen[0])} was taken; "
            f"the folder also holds {listed(sorted(set(names) - set(chosen)))}"
        )
    return container


def inside(folder: Location, name: Any) -> Location:
    """Returns the path of a regular file in the folder, or of a link to one, by its plain name. Raises FormatError
    otherwise."""
    where = f"{printable(folder)}: {printable(name)}"
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or any(c in name for c in "/\\\0:")
        or name.startswith("~")
    ):
        raise FormatError(f"{where} is not the name of a file in this folder; such an index is refused")
    path = folder / name
    if len(os.fsencode(printable(name, 1000))) > 255:
        raise FormatError(f"{where} is longer than the name of a file can be")
    if not path.lexists():
        raise FormatError(f"{where} is absent; the download is not complete")
    path.status()
    return path


def read_sharded(index: Location, read_file: ReadFile) -> Container:
    """Returns the shards that an index names, as one container. Raises FormatError."""
    where, folder = printable(index), index.parent
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    tree: dict[str, Any] = {}
    storages: dict[str, StorageBytes] = {}
    files, notes, extra, pickled = [index], [], [], False
    holders: dict[str, str] = {}
    metadata: dict[str, str] = {}
    held_bytes = 0
    for number, shard in enumerate(shards):
        container = read_file(inside(folder, shard))
        pickled |= container.pickled
        held_bytes += container.held_bytes
        files += container.files
        notes += container.notes
        metadata = metadata or container.metadata
        storages |= {f"{number}/{key}": place for key, place in container.storages.items()}
        for name, ref in _tensors(container):
            if name in holders:
                both = f"{printable(holders[name])} and {printable(shard)}"
                raise FormatError(f"{where}: the tensor {printable(name)} is in two shards, {both}")
            holders[name] = shard
            if name not in weight_map:
                extra.append(name)
                continue
            if weight_map[name] != shard:
                raise FormatError(
                    f"{where} puts {printable(name)} into {printable(weight_map[name])}, but it is in {printable(shard)}"
                )
            tree[name] = _renamed(ref, f"{number}/")
    absent = [name for name in weight_map if name not in holders]
    if absent:
        raise FormatError(f"{where} names tensors that its shards do not have: {listed(absent)}")
    if extra:
        notes.append(f"{where} does not name {len(extra)} tensors of its shards, which are left out: {listed(extra)}")
    kind = "sharded PyTorch" if pickled else "sharded safetensors"
    return Container(folder, kind, tree, storages, tuple(files), metadata, notes, pickled, held_bytes=held_bytes)


def _tensors(container: Container) -> Iterable[tuple[str, TensorRef]]:
    if not container.pickled:
        return container.tree.items()  # type: ignore[no-any-return]
    try:
        return [(found.name, found.ref) for found in select(container.tree).tensors]
    except StreammergeError as error:
        raise type(error)(f"{printable(container.path)}: {error}") from error


def _renamed(ref: TensorRef, prefix: str) -> TensorRef:
    """Returns the tensor with its storage's name prefixed."""
    if ref.entry is not None:
        return ref
    old = ref.storage
    storage = StorageRef(prefix + old.key, old.dtype, old.numel, old.view_offset)
    return TensorRef(storage, ref.dtype, ref.offset, ref.shape, ref.strides, ref.requires_grad, ref.wrapper, ref.lazy)


def _weight_map(index: Location) -> dict[str, str]:
    where, size = printable(index), index.size
    if size > MAX_INDEX_BYTES:
        raise FormatError(f"{where} has {size} bytes, beyond the limit of {MAX_INDEX_BYTES}")
    try:
        content = load_json(index.read(0, size).decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{where} cannot be read as JSON ({printable(error)})") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{where} has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{where}: its weight_map has names of files that are not text")
    for shard in set(weight_map.values()):
        inside(index.parent, shard)
    return weight_map


def foreign_files(folder: Location, written: set[str]) -> list[str]:
    """Returns names in an output folder that are neither in the new checkpoint nor part of an old one."""
    return [
        path.name
        for path in folder.children()
        if path.name not in written and (path.is_folder() or not _OWN_WEIGHTS.fullmatch(path.name))
    ]


def side_files(folder: Location) -> tuple[list[tuple[Location, str]], list[str]]:
    """Returns the files to copy into an output folder, and the names of those that are not copied.

    The first are (source, name) of configuration, tokenizer and other small files. The second are large, not regular
    files, or checksums of the input's files. Raises FormatError for a broken link.
    """
    taken, left = [], []
    for path in folder.children():
        name = path.name
        if name.startswith(".") or path.is_folder() or name.endswith((_INDEX_ENDING, *_NOT_COPIED)):
            continue
        if name.endswith(_WEIGHTS) or name.startswith(_TRAINING) or name in (RECIPE_FILE, RECEIPT_FILE):
            continue
        if broken := path.broken_link():
            raise FormatError(broken)
        try:
            source = inside(folder, name)
            small = source.size <= _MOST_SIDE_FILE_BYTES and not name.lower().endswith(CHECKSUM_FILES)
        except FormatError:
            small = False
        if small:
            taken.append((source, name))
        else:
            left.append(name)
    return taken, left
