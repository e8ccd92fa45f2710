"""Checkpoints that are folders: shards with or without an index, one file among others, or several models.

What a folder holds is read as loaders read it. An index says which files belong to a checkpoint; loaders read every tensor
in these files. A folder whose ``model_index.json`` or ``modules.json`` names subfolders holds several models. So does one
with the state of a training beside subfolders of models. A name in an index leads to a file below the folder. A link in the
folder belongs to the user and is followed (:func:`streammerge.stores.files.file_status`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from streammerge.errors import FormatError, StreammergeError, listed, printable
from streammerge.formats.base import Container, Form
from streammerge.formats.distributed import below, deeper, of_ranks
from streammerge.formats.file_names import KNOWN, grouped, is_looked_for, is_training_file, kind_of_folder, parsed_name
from streammerge.formats.records import RECEIPT_FILE
from streammerge.formats.shards import (
    MAX_INDEX_BYTES,
    ReadFile,
    indexed,
    inside,
    is_safe,
    read_sharded,
    read_weight_map,
    tensors_of,
    together,
)
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner
from streammerge.strict_json import load_json
from streammerge.tensors.conventions import (
    INDEX_FIRST,
    PIPELINES,
    ROUTED,
    SEVERAL,
    WEIGHTS_KEY,
)

_MOST_SHARDS = 10_000
_MOST_NETWORKS = 100
_CONFIG = "config.json"
_TRAINED = "training folder"


def read(folder: Location, read_file: ReadFile) -> Container:
    """Returns the container of a checkpoint folder. If it has several forms, takes the one that its loader takes.

    Raises FormatError; for forms that are not read, it names the command to run.
    """
    if (distributed := of_ranks(folder, read_file)) is not None:
        return distributed
    names, pipeline = declared(folder)
    beside = _side_by_side(folder, read_file) if not names or pipeline == _TRAINED else {}
    parts = beside or {name: _read_own(folder / name, read_file) for name in names if name}
    if not parts:
        return _read_own(folder, read_file)
    if "" in names and _forms(folder):
        parts = {"": _read_own(folder, read_file), **parts}
    files = tuple(dict.fromkeys(file for part in parts.values() for file in part.files))
    kind = "folder" if beside else pipeline
    made = Container(folder, f"{kind} of {len(parts)} models", {}, {}, files, parts=parts)
    if beside:
        made.notes.append(
            f"{printable(folder)} holds several models side by side ({listed(list(parts))}); each goes with the one of its "
            "name in other folders"
        )
    for part in parts.values():
        made.notes += part.notes
        made.warnings += part.warnings
        made.held_bytes += part.held_bytes
    made.metadata = next(iter(parts.values())).metadata
    return made


def _side_by_side(folder: Location, read_file: ReadFile) -> dict[str, Container]:
    """Returns several models that lie side by side, as the files of a program do (``llm.pt``, ``flow.pt``): by the names of
    their files, and by the names of subfolders that a loader of transformers or diffusers reads.

    Nothing for a folder whose weights have a name that a loader looks for, for one model that is there several times, such
    as the steps of a training, and for the parts of one model.
    """
    if any(form.index and not is_training_file(form.index) for form in _forms(folder)):
        return {}  # before the index is read, which may have a line for each of many tensors
    found = [each for each in _found(folder) if not is_training_file(each.name)]
    numbered = _are_numbered(folder, found)
    if len(found) < 2 or any(each.form.index or len(each.form.files) > 1 for each in found):
        return {}
    if not numbered and any(map(_is_whole, found)):
        return {}
    if not numbered and len({re.sub(r"\d+", "#", each.name) for each in found}) < len(found):
        return {}
    models: dict[str, Container] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for each in found:
        try:
            container = read_file(inside(folder, each.name))
            tensors = tensors_of(container)
        except StreammergeError:
            continue  # a file without weights is copied
        if tensors:
            container.form = each.form
            models[each.name], shapes[each.name] = container, {name: ref.shape for name, ref in tensors.items()}
    if not numbered and all(_is_same_model(one, two) for one, two in combinations(shapes.values(), 2)):
        return {}
    inner = [path for path in folder.children() if path.is_folder() and kind_of_folder(path, path.name) == "side"]
    loaded = [path for path in inner if (path / _CONFIG).is_file() and any(map(is_looked_for, _forms(path)))]
    return models | {path.name: _read_own(path, read_file) for path in loaded}


def _are_numbered(folder: Location, found: list[_Found]) -> bool:
    """Whether these are the networks that accelerate saves of one training: ``model.safetensors``, ``model_1.safetensors``
    and so on, beside the state of the training, which a merge has left out."""
    first = next((each.form for each in found if each.rank is not None and not each.form.index), None)
    if first is None:
        return False
    wanted = {f"{first.stem}{number}{first.ending}" for number in ("", *(f"_{each}" for each in range(1, len(found))))}
    beside = folder.children()
    return wanted == {each.name for each in found} and any(
        is_training_file(path.name) or path.name == RECEIPT_FILE for path in beside
    )


def _is_whole(found: _Found) -> bool:
    """Whether a loader looks for this name, and finds the whole model there."""
    return found.rank is not None and (found.form.stem, found.form.ending) not in SEVERAL


def _is_same_model(one: dict[str, tuple[int, ...]], two: dict[str, tuple[int, ...]]) -> bool:
    """Whether most tensors of the smaller one are in the other, with the same shapes."""
    common = sum(two.get(name) == shape for name, shape in one.items())
    return 2 * common > min(len(one), len(two))


def declared(folder: Location) -> tuple[list[str], str]:
    """Returns the subfolders with weights that are parts of one model, and what such a folder is called.

    "" stands for the folder itself. A declared subfolder that only has subfolders with weights stands for these.
    """
    for name, kind in zip(PIPELINES, ("pipeline", "folder"), strict=True):
        path = folder / name
        if path.is_file():
            content = _json(path)
            if kind == "pipeline" and isinstance(content, dict):
                found = [key for key, value in content.items() if isinstance(value, list) and any(value)]
                found = [each for key in found for each in _numbered(folder, key, content)]
                return [each for key in found for each in _with_weights(folder, key)], kind
            if kind == "folder" and isinstance(content, list):
                paths = [each.get("path") for each in content if isinstance(each, dict)]
                found = [each.strip("/") for each in paths if isinstance(each, str)]
                inner = [each for key in found for name in _routed(folder, key) for each in _with_weights(folder, name)]
                return [*([""] if "" in found else []), *inner], kind
    return _trained(folder), _TRAINED


def _routed(folder: Location, path: str) -> list[str]:
    """Returns the subfolder of a module, and those of the modules among which it chooses, if it is a router."""
    place, names = folder / path if path else folder, dict[str, Any]()
    for file in ROUTED if place.is_folder() else ():
        content = _json(place / file) if (place / file).is_file() else None
        found = content.get("types") if isinstance(content, dict) and isinstance(content.get("structure"), dict) else None
        if isinstance(found, dict):
            names |= found
    return [*([path] if path else []), *(f"{path}/{name}".lstrip("/") for name in names)]


def _numbered(folder: Location, name: str, content: dict[str, Any]) -> Iterator[str]:
    """Yields a declared subfolder, and those in which diffusers saves further networks of the same part, such as
    ``controlnet_1`` beside ``controlnet``."""
    yield name
    for number in range(1, _MOST_NETWORKS):
        other = f"{name}_{number}"
        if other in content or not is_inner(other) or not (folder / other).is_folder():
            return
        yield other


def _trained(folder: Location) -> list[str]:
    """Returns the subfolders with the models of a training, beside which a trainer wrote its state, as accelerate does.

    Each has a configuration, and weights under a name that its loader looks for. The folder has no such weights itself.
    """
    beside = folder.children()
    named = any(
        is_training_file(path.name) or path.name == RECEIPT_FILE for path in beside
    )  # a merge has left its state out
    if not named or any(map(is_looked_for, _forms(folder))):
        return []
    inner = [path for path in beside if path.is_folder() and kind_of_folder(path, path.name) == "side"]
    return [path.name for path in inner if (path / _CONFIG).is_file() and any(map(is_looked_for, _forms(path)))]


def _with_weights(folder: Location, name: str, depth: int = 4) -> list[str]:
    """Returns a subfolder if it has weights, else those of its subfolders that have weights."""
    if name.startswith((".", "_")) or not is_inner(name) or not (folder / name).is_folder():
        return []
    if any(map(is_looked_for, _forms(folder / name))):
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
    return [form for form, _ in grouped([path.name for path in folder.children()])]


def _found(folder: Location) -> list[_Found]:
    """Returns the forms of a folder in the order in which its loader looks for them. Those of unknown names come last."""
    found = []
    config = folder / _CONFIG
    content = _json(config) if config.is_file() else None
    wanted = content.get(WEIGHTS_KEY) if isinstance(content, dict) else None
    for form, numbers in grouped([path.name for path in folder.children()]):
        known = KNOWN.get((form.stem, form.ending))
        kind = 0 if bool(form.index) == (form.stem in INDEX_FIRST) and not numbers else 2 if numbers else 1
        rank: tuple[int, ...] | None = None if known is None else (bool(form.variant), known, kind)
        if wanted and wanted in (form.index, *form.files):
            rank = ()
        if not form.index:
            found.append(_Found(form, rank, _lacking(form, numbers), {}))
            continue
        try:
            weight_map = read_weight_map(folder / form.index)
        except FormatError:  # raised again if this index is the one to be read
            found.append(_Found(form, rank, [], {}))
            continue
        form = indexed(form, weight_map)
        absent = [shard for shard in form.files if is_safe(shard) and not (folder / shard).lexists()]
        found.append(_Found(form, rank, absent, weight_map))
    named = {file for each in found if each.form.index for file in each.form.files}
    found = [each for each in found if each.form.index or named.isdisjoint(each.form.files)]
    return sorted(found, key=lambda each: (each.rank is None, each.rank or ()))


def _lacking(form: Form, numbers: list[int]) -> list[str]:
    """Returns the names of the shards that a set without an index lacks."""
    if not numbers:
        return []
    example = parsed_name(form.files[0])
    count, (begin, end), name = int(example["count"]), example.span("number"), example.string
    first, there = 0 if 0 in numbers else 1, set(numbers)
    wanted = (number for number in range(first, first + min(count, _MOST_SHARDS)) if number not in there)
    return [f"{name[:begin]}{number:0{end - begin}}{name[end:]}" for number in wanted]


def _read_own(folder: Location, read_file: ReadFile) -> Container:
    """Returns the container of the weights directly in a folder."""
    where, found = printable(folder), _found(folder)
    known = [each for each in found if each.rank is not None]
    usable = [each for each in known or found if not each.absent]
    if not known and (distributed := below(folder, read_file)) is not None:
        return distributed
    if not found:
        files = _of_llama_cpp(folder)
        if not files and (distributed := deeper(folder, read_file)) is not None:
            return distributed
        if not files:
            raise FormatError(f"{where} holds no checkpoint{_below(folder) or _cached_in_part(folder)}")
        if len(files) > 1:
            raise FormatError(f"{where} holds several checkpoints ({listed(files)}); give one of them")
        return read_file(folder / files[0])
    if not usable:
        first = (known or found)[0]
        if hidden := (folder / first.absent[0]).broken_link():
            raise FormatError(hidden)
        named = f", named by {printable(first.form.index)}," if first.form.index else ""
        advice = _cached_in_part(folder) or "; the download is not complete"
        raise FormatError(f"{where}: {listed(first.absent)}{named} is absent{advice}")
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
            tensors = tensors_of(container)
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
        tensors = tensors_of(container)
    except StreammergeError:
        return
    if wanted.weight_map and not any(name in tensors for name in wanted.weight_map):
        raise FormatError(
            f"{printable(folder)}: {listed(wanted.absent)}, named by {printable(wanted.name)}, is absent; the download is "
            f"not complete, and {printable(taken.name)} has other names, so give that file itself if you mean it"
        )


def _of_llama_cpp(folder: Location) -> list[str]:
    """Returns the GGUF files in a folder: of several files of one model, the first."""
    names = sorted(path.name for path in folder.children() if path.suffix == ".gguf" and path.is_file())
    return [name for name in names if not (part := re.search(_OF_SET, name)) or int(part[1]) == 1]


_OF_SET = r"-(\d{5})-of-\d{5}\.gguf$"


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


def _cached_in_part(folder: Location) -> str:
    """Returns a clause about a snapshot of the hub's cache that is not whole. It is read where the hub does not answer."""
    from streammerge.stores.repositories import repository_of  # here, since nothing is wrong with most folders

    repository = repository_of(folder)
    if repository is None:
        return ""
    name, revision = printable(repository.name), printable(repository.revision)
    return (
        f"; the hub was not asked or did not answer, and its cache holds a part of {name} only: run "
        f"`hf download {name} --revision {revision}`, or this once more when the hub can be asked"
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
        return together(folder, folder / form.index, form, found.weight_map, read_file)
    if len(form.files) > 1:
        container = together(folder, folder, form, {}, read_file)
        first, last = printable(form.files[0]), printable(form.files[-1])
        container.notes.append(f"{printable(folder)} has no index; {first} to {last} are read as one checkpoint")
        return container
    container = read_file(inside(folder, form.files[0]))
    container.form = form
    return container


def _json(path: Location) -> Any:
    """Returns the content of a JSON file, None if it cannot be read."""
    try:
        return load_json(path.read(0, path.size).decode("utf-8")) if path.size <= MAX_INDEX_BYTES else None
    except ValueError:
        return None
