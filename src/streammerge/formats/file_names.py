"""What the names of files and subfolders in a checkpoint's folder tell: forms of weights, and what is beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from streammerge.formats.base import Form, is_index
from streammerge.formats.records import RECEIPT_FILE, RECIPE_FILE
from streammerge.stores.base import Location
from streammerge.stores.names import MOST_PARTS
from streammerge.tensors.conventions import (
    ADAPTERS,
    CHECKSUM_FILES,
    EXPORT_FILES,
    EXPORT_FOLDERS,
    TRAINING_FILES,
    TRAINING_FOLDERS,
    WEIGHT_FILES,
)

ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".th", ".tar")
KNOWN = {(stem, ending): rank for rank, (stem, ending, _) in enumerate(WEIGHT_FILES)}
STEMS = {stem for stem, _, _ in WEIGHT_FILES}
_STEM = "|".join(re.escape(stem) for stem in sorted(STEMS, key=len, reverse=True))
_ENDING = r"(?P<ending>\.(safetensors|bin|pth|pt|ckpt|th|tar))"
_KNOWN_NAME = rf"(?P<stem>{_STEM})(\.(?P<variant>[\w-]+?))?(-(?P<number>\d+)-of-(?P<count>\d+))?{_ENDING}"
_ANY_NAME = rf"(?P<stem>.+?)(?P<variant>)(-(?P<number>\d+)-of-(?P<count>\d+))?{_ENDING}"
_INDEX = rf"(?P<stem>.+?){_ENDING}?(\.(?P<old>[\w-]+))?\.index(\.(?P<variant>[\w-]+))?\.json"
_EXPORT = "|".join(f"({pattern})" for pattern in EXPORT_FILES)
_OWN_WEIGHTS = (
    r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(.*/)?(\.metadata|__\d+_\d+\.distcp)"
)


def grouped(names: list[str]) -> list[tuple[Form, list[int]]]:
    """Groups names of weights and of indexes to forms. With the numbers of the shards of a set."""
    forms: dict[tuple[str, str, str, int], tuple[list[str], list[int]]] = {}
    made: list[tuple[Form, list[int]]] = []
    for name in names:
        if is_index(name):
            made.append((form_of_index(name), []))
        elif is_weights(name):
            parsed = parsed_name(name)
            key = (parsed["stem"], parsed["ending"], parsed["variant"] or "", int(parsed["count"] or 0))
            files, numbers = forms.setdefault(key, ([], []))
            files.append(name)
            numbers.append(int(parsed["number"] or 0))
    for (stem, ending, variant, count), (files, numbers) in forms.items():
        made.append((Form(stem, ending, variant, "", tuple(files)), numbers if count else []))
    return made


def parsed_name(name: str) -> re.Match[str]:
    parsed = re.fullmatch(_KNOWN_NAME, name) or re.fullmatch(_ANY_NAME, name)
    if parsed is None:
        raise ValueError(f"{name!r} is no name of weights")
    return parsed


def is_training_file(name: str) -> bool:
    """Whether a name is one of a file of a trainer's state."""
    return re.fullmatch(TRAINING_FILES, name) is not None


def is_weights(name: str) -> bool:
    """Whether a name is one of a file of weights, and not one of a trainer's state."""
    return name.endswith(ENDINGS) and not name.startswith(".") and not is_training_file(name)


def form_of_index(name: str) -> Form:
    parsed = re.fullmatch(_INDEX, name)
    if parsed is None:
        return Form(name, "", index=name)
    stem, variant = parsed["stem"], parsed["variant"] or parsed["old"] or ""
    return Form(stem, parsed["ending"] or "", variant, name)


# ------------------------------------------------------------------------------------------- what is beside the weights

FolderKind = Literal["side", "hidden", "training", "export", "linked", "deep"]
FileKind = Literal["side", "hidden", "training", "export", "checksums", "index", "weights", "ours"]


def kind_of_folder(path: Location, name: str) -> FolderKind:
    """Returns what a subfolder is. ``name``: its path below the checkpoint's folder."""
    own = path.name
    if own.startswith("."):
        return "hidden"
    if re.fullmatch(TRAINING_FOLDERS, own.lower()):
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
    if is_training_file(name):
        return "training"
    if name.lower().endswith(CHECKSUM_FILES):
        return "checksums"
    if is_index(name):
        return "index"
    if re.fullmatch(_EXPORT, name):
        return "export"
    return "weights" if is_weights(name) else "side"


def is_whole_model(name: str) -> bool:
    """Whether a file of weights has a name by which a loader looks for a whole model, in any variant."""
    parsed = re.fullmatch(_KNOWN_NAME, name)
    return parsed is not None and parsed["stem"] not in ADAPTERS


def is_adapter(name: str) -> bool:
    """Whether a file, given by its path, has a name by which a loader looks for an adapter."""
    parsed = re.fullmatch(_KNOWN_NAME, name.rpartition("/")[2])
    return parsed is not None and parsed["stem"] in ADAPTERS


def form_of_file(name: str) -> Form | None:
    """Returns the form of a folder with one file of this name. None if no loader looks for it."""
    parsed = re.fullmatch(_KNOWN_NAME, name)
    if parsed is None or parsed["count"]:
        return None
    form = Form(parsed["stem"], parsed["ending"], parsed["variant"] or "")
    return form if is_looked_for(form) else None


def is_looked_for(form: Form) -> bool:
    """Whether a known loader looks for the files of this form by their names."""
    return (form.stem, form.ending) in KNOWN


def is_shard(name: str) -> bool:
    return is_weights(name) and parsed_name(name)["count"] is not None


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
        if name not in written and (path.is_folder() or not re.fullmatch(_OWN_WEIGHTS, name))
    ]
