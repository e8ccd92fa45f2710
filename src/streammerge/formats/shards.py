"""The files of one checkpoint as one container: shards with an index, or a complete set without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container, Form
from streammerge.formats.file_names import ENDINGS, form_of_index
from streammerge.pickles.state_dict import select
from streammerge.pickles.tree import StorageRef, TensorRef
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner
from streammerge.strict_json import load_json

MAX_INDEX_BYTES = 256 << 20

ReadFile = Callable[[Location], Container]


def inside(folder: Location, name: Any) -> Location:
    """Returns the path of a regular file below the folder, or of a link to one. Raises FormatError for any other name."""
    where = f"{printable(folder)}: {printable(name)}"
    if isinstance(name, str) and max(len(os.fsencode(printable(part, 1000))) for part in name.split("/")) > 255:
        raise FormatError(f"{where} is longer than the name of a file can be")
    if not isinstance(name, str) or not is_safe(name):
        raise FormatError(f"{where} is not the name of a file in this folder; such an index is refused")
    path = folder / name
    if path.parent != folder and path.parent.resolve() != folder.resolve() / path.parent.relative_to(folder):
        raise FormatError(
            f"{where} is not the name of a file in this folder, since it leads through a link; give the file itself"
        )
    if not path.lexists():
        raise FormatError(f"{where} is absent; the download is not complete")
    path.status()
    return path


def is_safe(name: str) -> bool:
    """Whether a name in an index can only be that of a file below the folder, on every system and in every store."""
    return is_inner(name) and ":" not in name and not name.startswith("~")


def read_sharded(index: Location, read_file: ReadFile) -> Container:
    """Returns the shards that an index names, as one container. Raises FormatError."""
    weight_map = read_weight_map(index)
    form = indexed(form_of_index(index.name), weight_map)
    return together(index.parent, index, form, weight_map, read_file)


def indexed(form: Form, weight_map: dict[str, str]) -> Form:
    """Returns the form with the files that its index names."""
    files = tuple(sorted(set(weight_map.values())))
    ending = form.ending or next((each for each in ENDINGS if files[0].endswith(each)), "")
    return replace(form, files=files, ending=ending)


def together(folder: Location, named: Location, form: Form, weight_map: dict[str, str], read_file: ReadFile) -> Container:
    """Returns shards as one container. ``named``: the index, or the folder. ``weight_map``: tensor -> shard, by the index.

    Takes every tensor in the shards, as loaders do. If a tensor is in several shards, the index decides.
    """
    where = printable(named)
    tree: dict[str, Any] = {}
    made = Container(folder, "", tree, {}, (named,) if form.index else (), form=form)
    seen: dict[str, Iterable[str]] = {}
    astray: dict[str, tuple[TensorRef, str]] = {}
    twice, extra = list[str](), list[str]()
    for number, shard in enumerate(form.files):
        container = read_file(inside(folder, shard))
        made.pickled |= container.pickled
        made.held_bytes += container.held_bytes
        made.files += container.files
        made.notes += container.notes
        made.metadata = made.metadata or container.metadata
        made.storages |= {f"{number}/{key}": place for key, place in container.storages.items()}
        tensors = tensors_of(container)
        seen[shard] = tensors.keys()
        for name, ref in tensors.items():
            wanted = weight_map.get(name)
            if wanted is not None and wanted != shard:
                astray.setdefault(name, (_renamed(ref, f"{number}/"), shard))
                continue
            if name in tree:
                first = next(each for each, names in seen.items() if name in names)
                both = f"{printable(first)} and {printable(shard)}"
                raise FormatError(f"{where}: the tensor {printable(name)} is in two shards, {both}")
            if wanted is None and form.index:
                extra.append(name)
            tree[name] = _renamed(ref, f"{number}/")
    moved = []
    for name, (ref, _) in astray.items():
        if name in tree:
            twice.append(name)
        else:
            tree[name] = ref
            moved.append(name)
    if twice:
        made.notes.append(f"{where}: {listed(twice)} is in several shards; the one that the index names was taken")
    if moved:
        made.notes.append(f"{where} puts {listed(moved)} into another shard than the one that has it, where it was taken")
    if extra:
        made.notes.append(
            f"{where} does not name {len(extra)} tensors of its shards, which loaders read too: {listed(extra)}"
        )
    absent = [name for name in weight_map if name not in tree]
    if 2 * len(absent) > len(weight_map):
        raise FormatError(f"{where} names tensors that its shards do not have: {listed(absent)}; it is of other shards")
    if absent:
        made.warnings.append(
            f"{where} names tensors that no shard has: {listed(absent)}; a loader makes them anew, unless they are tied"
        )
    made.format = "sharded PyTorch" if made.pickled else "sharded safetensors"
    return made


def tensors_of(container: Container) -> dict[str, TensorRef]:
    if not container.pickled:
        return container.tree  # type: ignore[no-any-return]
    try:
        return {found.name: found.ref for found in select(container.tree).tensors}
    except StreammergeError as error:
        raise type(error)(f"{printable(container.path)}: {error}") from error


def _renamed(ref: TensorRef, prefix: str) -> TensorRef:
    """Returns the tensor with its storage's name prefixed."""
    if ref.entry is not None:
        return ref
    old = ref.storage
    storage = StorageRef(prefix + old.key, old.dtype, old.numel, old.view_offset)
    return TensorRef(storage, ref.dtype, ref.offset, ref.shape, ref.strides, ref.requires_grad, ref.wrapper, ref.lazy)


def read_weight_map(index: Location) -> dict[str, str]:
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
    if any(shard.startswith("./") for shard in set(weight_map.values())):
        return {name: shard.removeprefix("./") for name, shard in weight_map.items()}
    return weight_map
