"""Checkpoints that are folders: shards with or without an index, one file among others, or several models.

What a folder holds is read as loaders read it. An index says which files belong to a checkpoint; loaders read every tensor
in these files. A folder whose ``model_index.json`` or ``modules.json`` names subfolders holds several models. A name in an
index leads to a file below the folder. A link in the folder belongs to the user and is followed
(:func:`streammerge.stores.files.file_status`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from sys import intern
from typing import Any, Literal, NamedTuple

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container, Form, is_index
from streammerge.formats.distributed import refuse_distributed
from streammerge.options import RECEIPT_FILE, RECIPE_FILE
from streammerge.pickles.state_dict import select
from streammerge.pickles.tree import FlatTree, StorageRef, TensorRef
from streammerge.sources.table import StoredTable, concatenated
from streammerge.stores.base import Location
from streammerge.stores.names import MOST_PARTS, is_inner
from streammerge.strict_json import load_json
from streammerge.tensors.conventions import (
    ADAPTERS,
    CHECKSUM_FILES,
    EXPORT_FILES,
    EXPORT_FOLDERS,
    INDEX_FIRST,
    PIPELINES,
    TRAINING_FILES,
    TRAINING_FOLDERS,
    WEIGHT_FILES,
    WEIGHTS_KEY,
)

MAX_INDEX_BYTES = 256 << 20
_MOST_SHARDS = 10_000
_READERS = 4
"""How many shards are read at once."""
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".th", ".tar")
_KNOWN = {(stem, ending): rank for rank, (stem, ending, _) in enumerate(WEIGHT_FILES)}
STEMS = {stem for stem, _, _ in WEIGHT_FILES}
_STEM = "|".join(re.escape(stem) for stem in sorted(STEMS, key=len, reverse=True))
_ENDING = r"(?P<ending>\.(safetensors|bin|pth|pt|ckpt|th|tar))"
_KNOWN_NAME = re.compile(rf"(?P<stem>{_STEM})(\.(?P<variant>[\w-]+?))?(-(?P<number>\d+)-of-(?P<count>\d+))?{_ENDING}")
_ANY_NAME = re.compile(rf"(?P<stem>.+?)(?P<variant>)(-(?P<number>\d+)-of-(?P<count>\d+))?{_ENDING}")
_INDEX = re.compile(rf"(?P<stem>.+?){_ENDING}?(\.(?P<old>[\w-]+))?\.index(\.(?P<variant>[\w-]+))?\.json")
_TRAINING_FILE, _TRAINING_FOLDER = re.compile(TRAINING_FILES), re.compile(TRAINING_FOLDERS)
_EXPORT = re.compile("|".join(f"({pattern})" for pattern in EXPORT_FILES))
_OWN_WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

ReadFile = Callable[[Location], Container]


# ------------------------------------------------------------------------------------------------------------ reading


def read(folder: Location, read_file: ReadFile) -> Container:
    """Returns the container of a checkpoint folder. If it has several forms, takes the one that its loader takes.

    Raises FormatError; for forms that are not read, it names the command to run.
    """
    names, pipeline = declared(folder)
    parts = {name: _read_own(folder / name, read_file) for name in names if name}
    if not parts:
        return _read_own(folder, read_file)
    if "" in names and _forms(folder):
        parts = {"": _read_own(folder, read_file), **parts}
    files = tuple(dict.fromkeys(file for part in parts.values() for file in part.files))
    made = Container(folder, f"{pipeline} of {len(parts)} models", {}, {}, files, parts=parts)
    for part in parts.values():
        made.notes += part.notes
        made.warnings += part.warnings
        made.held_bytes += part.held_bytes
    made.metadata = next(iter(parts.values())).metadata
    return made


def declared(folder: Location) -> tuple[list[str], str]:
    """Returns the subfolders with weights that a folder declares as parts of one model, and what such a folder is called.

    "" stands for the folder itself. A declared subfolder that only has subfolders with weights stands for these.
    """
    for name, kind in zip(PIPELINES, ("pipeline", "folder"), strict=True):
        path = folder / name
        if path.is_file():
            content = _json(path)
            if kind == "pipeline" and isinstance(content, dict):
                found = [key for key, value in content.items() if isinstance(value, list) and any(value)]
                return [each for key in found for each in _with_weights(folder, key)], kind
            if kind == "folder" and isinstance(content, list):
                paths = [each.get("path") for each in content if isinstance(each, dict)]
                found = [each.strip("/") for each in paths if isinstance(each, str)]
                inner = [each for key in found if key for each in _with_weights(folder, key)]
                return [*([""] if "" in found else []), *inner], kind
    return [], ""


def _with_weights(folder: Location, name: str, depth: int = 4) -> list[str]:
    """Returns a subfolder if it has weights, else those of its subfolders that have weights."""
    if name.startswith((".", "_")) or not is_inner(name) or not (folder / name).is_folder():
        return []
    if any((form.stem, form.ending) in _KNOWN for form in _forms(folder / name)):
        return [name]
    below = [each.name for each in (folder / name).children() if each.is_folder()] if depth else []
    return [found for each in below for found in _with_weights(folder, f"{name}/{each}", depth - 1)]


class _Found(NamedTuple):
    """A form of a folder. ``rank``: its place in the order in which loaders look, None for a name that none looks for.
    ``absent``: the names of its shards that are not there. ``weight_map``: tensor -> shard, by its index."""

    form: Form
    rank: tuple[int, ...] | None
    absent: list[str]
    weight_map: dict[str, str]

    @property
    def name(self) -> str:
        return self.form.index or self.form.files[0]


def _forms(folder: Location) -> list[Form]:
    """Returns the forms of the weights in a folder, without looking into its indexes."""
    return [form for form, _ in _grouped([path.name for path in folder.children()])]


def _grouped(names: list[str]) -> list[tuple[Form, list[int]]]:
    """Groups names of weights and of indexes to forms. With the numbers of the shards of a set."""
    forms: dict[tuple[str, str, str, int], tuple[list[str], list[int]]] = {}
    made: list[tuple[Form, list[int]]] = []
    for name in names:
        if is_index(name):
            made.append((_form_of_index(name), []))
        elif is_weights(name):
            parsed = _parsed(name)
            key = (parsed["stem"], parsed["ending"], parsed["variant"] or "", int(parsed["count"] or 0))
            files, numbers = forms.setdefault(key, ([], []))
            files.append(name)
            numbers.append(int(parsed["number"] or 0))
    for (stem, ending, variant, count), (files, numbers) in forms.items():
        made.append((Form(stem, ending, variant, "", tuple(files)), numbers if count else []))
    return made


def _parsed(name: str) -> re.Match[str]:
    parsed = _KNOWN_NAME.fullmatch(name) or _ANY_NAME.fullmatch(name)
    if parsed is None:
        raise ValueError(f"{name!r} is no name of weights")
    return parsed


def is_weights(name: str) -> bool:
    """Whether a name is one of a file of weights, and not one of a trainer's state."""
    return name.endswith(_WEIGHTS) and not name.startswith(".") and not _TRAINING_FILE.fullmatch(name)


def _found(folder: Location) -> list[_Found]:
    """Returns the forms of a folder in the order in which its loader looks for them. Those of unknown names come last."""
    found = []
    config = folder / "config.json"
    content = _json(config) if config.is_file() else None
    wanted = content.get(WEIGHTS_KEY) if isinstance(content, dict) else None
    for form, numbers in _grouped([path.name for path in folder.children()]):
        known = _KNOWN.get((form.stem, form.ending))
        kind = 0 if bool(form.index) == (form.stem in INDEX_FIRST) and not numbers else 2 if numbers else 1
        rank: tuple[int, ...] | None = None if known is None else (bool(form.variant), known, kind)
        if wanted and wanted in (form.index, *form.files):
            rank = ()
        if not form.index:
            found.append(_Found(form, rank, _lacking(form, numbers), {}))
            continue
        try:
            weight_map = _weight_map(folder / form.index)
        except FormatError:  # raised again if this index is the one to be read
            found.append(_Found(form, rank, [], {}))
            continue
        form = _indexed(form, weight_map)
        absent = [shard for shard in form.files if _is_safe(shard) and not (folder / shard).lexists()]
        found.append(_Found(form, rank, absent, weight_map))
    named = {file for each in found if each.form.index for file in each.form.files}
    found = [each for each in found if each.form.index or named.isdisjoint(each.form.files)]
    return sorted(found, key=lambda each: (each.rank is None, each.rank or ()))


def _indexed(form: Form, weight_map: dict[str, str]) -> Form:
    """Returns the form with the files that its index names."""
    files = tuple(sorted(set(weight_map.values())))
    ending = form.ending or next((each for each in _WEIGHTS if files[0].endswith(each)), "")
    return replace(form, files=files, ending=ending)


def _lacking(form: Form, numbers: list[int]) -> list[str]:
    """Returns the names of the shards that a set without an index lacks."""
    if not numbers:
        return []
    example = _parsed(form.files[0])
    count, (begin, end), name = int(example["count"]), example.span("number"), example.string
    first, there = 0 if 0 in numbers else 1, set(numbers)
    wanted = (number for number in range(first, first + min(count, _MOST_SHARDS)) if number not in there)
    return [f"{name[:begin]}{number:0{end - begin}}{name[end:]}" for number in wanted]


def _read_own(folder: Location, read_file: ReadFile) -> Container:
    """Returns the container of the weights directly in a folder."""
    where, found = printable(folder), _found(folder)
    known = [each for each in found if each.rank is not None]
    usable = [each for each in known or found if not each.absent]
    if not known:
        refuse_distributed(folder)
    if not found:
        raise FormatError(f"{where} holds no checkpoint{_below(folder)}")
    if not usable:
        first = (known or found)[0]
        named = f", named by {printable(first.form.index)}," if first.form.index else ""
        raise FormatError(f"{where}: {listed(first.absent)}{named} is absent; the download is not complete")
    if not known:  # an index or a set of shards says more than the name of a file
        several = [each for each in usable if each.form.index] or [each for each in usable if len(each.form.files) > 1]
        usable = several or usable
    taken = usable[0]
    alike = [each.name for each in usable if each.rank == taken.rank]
    if len(alike) > 1:
        if _are_parts(folder, alike, read_file):
            raise FormatError(
                f"{where} holds {listed(sorted(alike))} without an index; no tensor is in two of them, so they look like "
                "parts of one checkpoint: make it one file, or put an index beside them (pytorch_model.bin.index.json or "
                'model.safetensors.index.json: {"weight_map": {TENSOR: FILE}})'
            )
        raise FormatError(f"{where} holds several checkpoints ({listed(sorted(alike))}); give one of them")
    _refuse_slices(folder, taken.form)
    container = _read_form(folder, taken, read_file)
    for each in known[: known.index(taken)] if known else ():
        _refuse_another_model(folder, each, taken, container)
        container.notes.append(
            f"{where}: {printable(taken.name)} was taken and {printable(each.name)} was not, since it is not complete: "
            f"{listed(each.absent)} is absent"
        )
    others = {file for each in found for file in ([each.form.index] if each.form.index else each.form.files)}
    others -= {*taken.form.files, taken.form.index}
    if others:
        container.notes.append(
            f"{where}: {printable(taken.name)} was taken; the folder also holds {listed(sorted(others))}"
        )
    return container


def _refuse_slices(folder: Location, form: Form) -> None:
    """Raises FormatError for weights that are cut into one file for each device, with a slice of each tensor in each."""
    if form.stem == "consolidated.00" and (folder / f"consolidated.01{form.ending}").lexists():
        raise FormatError(
            f"{printable(folder)}: consolidated.00{form.ending} and the files after it each hold a slice of every "
            "tensor; convert them to one checkpoint first, by the convert_llama_weights_to_hf.py of transformers"
        )


def _are_parts(folder: Location, names: list[str], read_file: ReadFile) -> bool:
    """Whether these files are numbered parts that have no tensor in common. A generator and a discriminator have none
    either, but are not called alike."""
    if len({re.sub(r"\d+", "#", name) for name in names}) > 1:
        return False
    seen = set[str]()
    for name in names:
        try:
            container = read_file(inside(folder, name))
            tensors = _tensors(container)
        except StreammergeError:
            return False
        if not tensors or not seen.isdisjoint(tensors):
            return False
        seen.update(tensors)
    return True


def _refuse_another_model(folder: Location, wanted: _Found, taken: _Found, container: Container) -> None:
    """Raises FormatError if the form that stands in for an incomplete one has none of the names in its index.

    A loader of the incomplete form would not find its weights there.
    """
    try:
        tensors = _tensors(container)
    except StreammergeError:
        return
    if wanted.weight_map and not any(name in tensors for name in wanted.weight_map):
        raise FormatError(
            f"{printable(folder)}: {listed(wanted.absent)}, named by {printable(wanted.name)}, is absent; the download is "
            f"not complete, and {printable(taken.name)} has other names, so give that file itself if you mean it"
        )


def _below(folder: Location) -> str:
    """Returns a clause about the nearest subfolders that hold checkpoints, such as snapshots in a cache of the hub."""
    found = list(_folders_with_weights(folder))
    if not found:
        return ""
    several = len(found) > 1
    return (
        f"; its subfolders {listed(found)} do, so give one of them"
        if several
        else f"; its subfolder {found[0]} does, so give that"
    )


def _folders_with_weights(folder: Location, prefix: str = "", depth: int = 4) -> Iterator[str]:
    """Yields the subfolders with weights by their paths below a folder. Looks for none below them, and enters no link."""
    for path in folder.children():
        if path.name.startswith(".") or not path.is_folder():
            continue
        if _forms(path):
            yield prefix + path.name
        elif depth and path.resolve() == path.parent.resolve() / path.name:
            yield from _folders_with_weights(path, f"{prefix}{path.name}/", depth - 1)


def _read_form(folder: Location, found: _Found, read_file: ReadFile) -> Container:
    form = found.form
    if form.index and not found.weight_map:
        return read_sharded(folder / form.index, read_file)
    if form.index:
        return _together(folder, folder / form.index, form, found.weight_map, read_file)
    if len(form.files) > 1:
        container = _together(folder, folder, form, {}, read_file)
        first, last = printable(form.files[0]), printable(form.files[-1])
        container.notes.append(f"{printable(folder)} has no index; {first} to {last} are read as one checkpoint")
        return container
    container = read_file(inside(folder, form.files[0]))
    container.form = form
    return container


def inside(folder: Location, name: Any) -> Location:
    """Returns the path of a regular file below the folder, or of a link to one. Raises FormatError for any other name."""
    where = f"{printable(folder)}: {printable(name)}"
    if isinstance(name, str) and max(len(os.fsencode(printable(part, 1000))) for part in name.split("/")) > 255:
        raise FormatError(f"{where} is longer than the name of a file can be")
    if not isinstance(name, str) or not _is_safe(name):
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


def _is_safe(name: str) -> bool:
    """Whether a name in an index can only be that of a file below the folder, on every system and in every store."""
    return is_inner(name) and ":" not in name and not name.startswith("~")


def read_sharded(index: Location, read_file: ReadFile) -> Container:
    """Returns the shards that an index names, as one container. Raises FormatError."""
    weight_map = _weight_map(index)
    form = _indexed(_form_of_index(index.name), weight_map)
    return _together(index.parent, index, form, weight_map, read_file)


def _form_of_index(name: str) -> Form:
    parsed = _INDEX.fullmatch(name)
    if parsed is None:
        return Form(name, "", index=name)
    stem, variant = parsed["stem"], parsed["variant"] or parsed["old"] or ""
    return Form(stem, parsed["ending"] or "", variant, name)


def _together(folder: Location, named: Location, form: Form, weight_map: dict[str, str], read_file: ReadFile) -> Container:
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
        tensors = _tensors(container)
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
            if wanted is None and form and form.index:
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
    return tree


def _tensors(container: Container) -> Mapping[str, TensorRef]:
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


def _weight_map(index: Location) -> dict[str, str]:
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


_MAP = re.compile(r'"weight_map"[ \n\r\t]*:[ \n\r\t]*\{')
_PAIR = re.compile(r'[ \n\r\t]*"([^"\\\x00-\x1f]*)"[ \n\r\t]*:[ \n\r\t]*"([^"\\\x00-\x1f]*)"[ \n\r\t]*([,}])')


def _usual_weight_map(text: str) -> dict[str, str] | None:
    """Returns the weight map of an index as nearly all programs write it, None for any other, right or wrong.

    A JSON parser holds a second copy of each name, and a name of a file for each tensor.
    """
    found, shards = _MAP.search(text), dict[str, str]()
    if found is None:
        return None
    made: dict[str, str] = {}
    count, at, after = 0, found.end(), ","
    for pair in _PAIR.finditer(text, at):
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


def _json(path: Location) -> Any:
    """Returns the content of a JSON file, None if it cannot be read."""
    try:
        return load_json(path.read(0, path.size).decode("utf-8")) if path.size <= MAX_INDEX_BYTES else None
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------------- other files

FolderKind = Literal["side", "hidden", "training", "export", "linked", "deep"]
FileKind = Literal["side", "hidden", "training", "export", "checksums", "index", "weights", "ours"]


def kind_of_folder(path: Location, name: str) -> FolderKind:
    """Returns what a subfolder is. ``name``: its path below the checkpoint's folder."""
    own = path.name
    if own.startswith("."):
        return "hidden"
    if _TRAINING_FOLDER.fullmatch(own.lower()):
        return "training"
    if own.lower() in EXPORT_FOLDERS:
        return "export"
    if path.resolve() != path.parent.resolve() / own:
        return "linked"
    return "deep" if name.count("/") + 2 > MOST_PARTS else "side"


def kind_of_file(name: str) -> FileKind:
    """Returns what a file in a checkpoint's folder is, by its own name."""
    if name.startswith(".") or name.endswith(".lock"):
        return "hidden"
    if name in (RECIPE_FILE, RECEIPT_FILE):
        return "ours"
    if _TRAINING_FILE.fullmatch(name):
        return "training"
    if name.lower().endswith(CHECKSUM_FILES):
        return "checksums"
    if is_index(name):
        return "index"
    if _EXPORT.fullmatch(name):
        return "export"
    return "weights" if is_weights(name) else "side"


def is_whole_model(name: str) -> bool:
    """Whether a file of weights has a name by which a loader looks for a whole model, in any variant."""
    parsed = _KNOWN_NAME.fullmatch(name)
    return parsed is not None and parsed["stem"] not in ADAPTERS


def form_of_file(name: str) -> Form | None:
    """Returns the form of a folder with one file of this name. None if no loader looks for it."""
    parsed = _KNOWN_NAME.fullmatch(name)
    if parsed is None or parsed["count"]:
        return None
    form = Form(parsed["stem"], parsed["ending"], parsed["variant"] or "")
    return form if is_looked_for(form) else None


def is_looked_for(form: Form) -> bool:
    """Whether a known loader looks for the files of this form by their names."""
    return (form.stem, form.ending) in _KNOWN


def is_shard(name: str) -> bool:
    return is_weights(name) and _parsed(name)["count"] is not None


def files_below(folder: Location, prefix: str = "") -> Iterator[tuple[str, Location]]:
    """Yields all files below a folder by their paths below it, and subfolders that are empty or links. Enters no link."""
    for path in folder.children():
        name = prefix + path.name
        if not path.is_folder() or path.resolve() != path.parent.resolve() / path.name or not path.children():
            yield name, path
        else:
            yield from files_below(path, f"{name}/")


def foreign_files(folder: Location, written: set[str]) -> list[str]:
    """Returns names in an output folder that are neither in the new checkpoint nor part of an old one."""
    return [
        name
        for name, path in files_below(folder)
        if name not in written and (path.is_folder() or not _OWN_WEIGHTS.fullmatch(name))
    ]
