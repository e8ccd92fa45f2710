"""The files of one checkpoint as one container: shards with an index, or a complete set without one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from sys import intern
from typing import Any

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container, Form
from streammerge.formats.file_names import ENDINGS, form_of_index
from streammerge.pickles.state_dict import select
from streammerge.pickles.tree import FlatTree, TensorRef, flat_tensor, is_quantised
from streammerge.sources.table import StoredTable, concatenated
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner
from streammerge.strict_json import load_json
from streammerge.units import counted

MAX_INDEX_BYTES = 256 << 20
_READERS = 4
"""How many shards are read at once."""

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
    made = Container(folder, "", {}, {}, (named,) if form.index else (), form=form)
    containers = _read_all([inside(folder, shard) for shard in form.files], read_file)
    for number, container in enumerate(containers):
        made.pickled |= container.pickled
        made.held_bytes += container.held_bytes
        made.files += container.files
        made.notes += container.notes
        made.metadata = made.metadata or container.metadata
        made.storages |= {f"{number}/{key}": place for key, place in container.storages.items()}
    made.format = "sharded PyTorch" if made.pickled else "sharded safetensors"
    table = _table(containers, form, weight_map)
    made.tree = _joined(made, named, containers, weight_map) if table is None else FlatTree(table)
    return made


def _read_all(paths: list[Location], read_file: ReadFile) -> list[Container]:
    """Returns the containers of files. Several headers are read at once, since a disk or a network answers late.

    Pickles are read one after the other, because each takes memory for two copies of it.
    """
    if paths:
        paths[0].store.read_heads(paths)
    if len(paths) <= _READERS or not all(path.suffix == ".safetensors" for path in paths):
        return [read_file(path) for path in paths]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(read_file, paths))


def _table(containers: list[Container], form: Form, weight_map: dict[str, str]) -> StoredTable | None:
    """Returns the tensors of shards as one table. Returns None unless each of them is in one shard, and in that which the
    index names, if there is one."""
    tables = [container.table for container in containers]
    if None in tables:
        return None
    made = concatenated(filter(None, tables))
    if not form.index:
        return made if len(made.rows) == len(made.names) else None
    shards = [shard for shard, table in zip(form.files, tables, strict=True) for _ in range(len(table or ()))]
    return made if len(made) == len(weight_map) and list(map(weight_map.get, made.names)) == shards else None


def _joined(made: Container, named: Location, containers: list[Container], weight_map: dict[str, str]) -> dict[str, Any]:
    """Returns the tensors of shards as one tree. Adds notes and warnings about those that the index tells otherwise."""
    where, form = printable(named), made.form
    tree: dict[str, Any] = {}
    seen: dict[str, Iterable[str]] = {}
    astray: dict[str, tuple[TensorRef, str]] = {}
    twice, extra = list[str](), list[str]()
    for number, (shard, container) in enumerate(zip(form.files if form else (), containers, strict=True)):
        tensors = tensors_of(container)
        seen[shard] = tensors.keys()
        for name, ref in tensors.items():
            wanted = weight_map.get(name)
            if wanted is not None and wanted != shard:
                astray.setdefault(name, (_renamed(ref, f"{number}/", container), shard))
                continue
            if name in tree:
                first = next(each for each, names in seen.items() if name in names)
                both = f"{printable(first)} and {printable(shard)}"
                raise FormatError(f"{where}: the tensor {printable(name)} is in two shards, {both}")
            if wanted is None and form and form.index:
                extra.append(name)
            tree[name] = _renamed(ref, f"{number}/", container)
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
            f"{where} does not name {counted(len(extra), 'tensor')} of its shards, which loaders read too: {listed(extra)}"
        )
    absent = [name for name in weight_map if name not in tree]
    if 2 * len(absent) > len(weight_map):
        raise FormatError(f"{where} names tensors that its shards do not have: {listed(absent)}; it is of other shards")
    if absent:
        made.warnings.append(
            f"{where} names tensors that no shard has: {listed(absent)}; a loader makes them anew, unless they are tied"
        )
    return tree


def tensors_of(container: Container) -> Mapping[str, TensorRef]:
    if not container.pickled:
        return container.tree  # type: ignore[no-any-return]
    try:
        return {found.name: found.ref for found in select(container.tree).tensors}
    except StreammergeError as error:
        raise type(error)(f"{printable(container.path)}: {error}") from error


def _renamed(ref: TensorRef, prefix: str, container: Container) -> TensorRef:
    """Returns the tensor with its storage's name prefixed. A quantised tensor is the numbers that it has in its shard."""
    if ref.entry is not None:
        return ref
    if is_quantised(ref):
        return flat_tensor(container.locate("", ref))
    old = ref.storage
    storage = replace(old, key=prefix + old.key)
    return TensorRef(storage, ref.dtype, ref.offset, ref.shape, ref.strides, ref.requires_grad, ref.wrapper, ref.lazy)


def read_weight_map(index: Location) -> dict[str, str]:
    where, size = printable(index), index.size
    if size > MAX_INDEX_BYTES:
        raise FormatError(f"{where} has {size} bytes, beyond the limit of {MAX_INDEX_BYTES}")
    try:
        weight_map = _usual_weight_map(text := index.read(0, size).decode("utf-8"))
        if weight_map is None:
            content = load_json(text)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
    except ValueError as error:
        raise FormatError(f"{where} cannot be read as JSON ({printable(error)})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{where} has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{where}: its weight_map has names of files that are not text")
    if any(shard.startswith("./") for shard in set(weight_map.values())):
        return {name: shard.removeprefix("./") for name, shard in weight_map.items()}
    return weight_map


_MAP = r'"weight_map"[ \n\r\t]*:[ \n\r\t]*\{'
_PAIR = r'[ \n\r\t]*"([^"\\\x00-\x1f]*)"[ \n\r\t]*:[ \n\r\t]*"([^"\\\x00-\x1f]*)"[ \n\r\t]*([,}])'


def _usual_weight_map(text: str) -> dict[str, str] | None:
    """Returns the weight map of an index as nearly all programs write it, None for any other, right or wrong.

    A JSON parser holds a second copy of each name, and a name of a file for each tensor.
    """
    found, shards = re.search(_MAP, text), dict[str, str]()
    if found is None:
        return None
    made: dict[str, str] = {}
    count, at, after = 0, found.end(), ","
    for pair in re.compile(_PAIR).finditer(text, at):
        if pair.start() != at:
            return None
        name, shard, after = pair.groups()
        made[intern(name)] = shards.setdefault(shard, shard)
        count, at = count + 1, pair.end()
        if after == "}":
            break
    if after != "}" or len(made) < count:
        return None
    rest = load_json(text[: found.end()] + text[at - 1 :])  # with an empty map
    return made if isinstance(rest, dict) and rest.get("weight_map") == {} else None
