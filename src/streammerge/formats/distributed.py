"""Checkpoints that several ranks wrote in parts: which one a folder holds, and where a trainer's folder has it.

The readers are imported when a folder of their kind is met. What is not read is refused with what converts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from streammerge.errors import FormatError, listed, printable
from streammerge.formats.base import Container
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner

_PART = ".distcp"
_METADATA = re.compile(r"\.metadata|__\d+\.metadata")
_DEEPSPEED = re.compile(
    r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt|mp_rank_\d+_model_states\.pt"
    r"|(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|layer_\d+-model_\d+-model_states\.pt"
)
_RANK_FILE = re.compile(r"rank[._-]?\d+\.(pt|pth|bin|ckpt)$", re.IGNORECASE)
_HF_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")

_POINTERS = {"latest": "", "latest_universal": "", "latest_checkpointed_iteration.txt": "iter_"}
"""Files in which trainers name the subfolder of the last step, and what stands before a number."""
_MOST_POINTER_BYTES = 4096

ReadFile = Callable[[Location], Container]


def of_ranks(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of a checkpoint whose parts lie directly in a folder. None if there is none."""
    names = [path.name for path in folder.children()]
    if any(map(_METADATA.fullmatch, names)):
        from streammerge.formats import dcp

        return dcp.read(folder)
    if any(name.endswith(_PART) for name in names):
        raise FormatError(
            f"{printable(folder)} holds parts of a distributed checkpoint without its .metadata, which says what is in "
            "them; copy that file too"
        )
    if any(map(_HF_SHARD.fullmatch, names)):
        from streammerge.formats import hf_storage

        return hf_storage.read(folder)
    if any(map(_DEEPSPEED.fullmatch, names)):
        from streammerge.formats import zero

        return zero.read(folder, read_file)
    return None


def below(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of the checkpoint in a trainer's folder, which has its parts in a subfolder. None if there is
    none.

    A file may name the subfolder of the last step. Raises FormatError if there are several and none is named.
    """
    for name, prefix in _POINTERS.items():
        if (folder / name).is_file():
            return _pointed(folder, folder / name, prefix, read_file)
    if (made := _of_rank_files(folder, read_file)) is not None:
        return made
    found = [path for path in folder.children() if path.is_folder() and _holds_parts(path)]
    weights = [path for path in found if not path.name.startswith("optim")] or found
    if len(weights) > 1:
        names = listed([path.name for path in weights])
        raise FormatError(
            f"{printable(folder)} holds several distributed checkpoints, {names}; give one of them, or a pattern that "
            "matches the steps to merge"
        )
    return (of_ranks(weights[0], read_file) or _of_rank_files(weights[0], read_file)) if weights else None


def _of_rank_files(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of files that each hold a rank's state dict. None if there are none in a folder."""
    names = [path.name for path in folder.children()]
    if sum(map(bool, map(_RANK_FILE.search, names))) < 2:
        return None
    from streammerge.formats import dtensors

    sets = dtensors.sets_of(names)
    if len(sets) > 1:
        raise FormatError(f"{printable(folder)} holds rank files of several models, {listed(sorted(sets))}")
    return dtensors.read(folder, next(iter(sets.values())), read_file) if sets else None


def _pointed(folder: Location, pointer: Location, prefix: str, read_file: ReadFile) -> Container | None:
    """Returns the container of the step that a trainer's file names."""
    where = printable(pointer)
    if pointer.size > _MOST_POINTER_BYTES:
        return None
    text = pointer.read(0, pointer.size).decode("utf-8", "replace").strip()
    step = f"{prefix}{int(text):07}" if prefix and re.fullmatch("[0-9]{1,12}", text) else text
    if not is_inner(step) or "/" in step:
        raise FormatError(f"{where} names {printable(step)}, which is not the name of a folder beside it")
    if not (folder / step).is_folder():
        raise FormatError(f"{where} names {printable(step)}, which is absent; copy that folder, or give another one")
    made = of_ranks(folder / step, read_file)
    if made is not None:
        made.notes.append(f"{printable(folder)}: {printable(step)} is taken, which {printable(pointer.name)} names")
    return made


def _holds_parts(folder: Location) -> bool:
    names = [path.name for path in folder.children()]
    if any(pattern.fullmatch(name) for name in names for pattern in (_METADATA, _HF_SHARD, _DEEPSPEED)):
        return True
    return sum(map(bool, map(_RANK_FILE.search, names))) > 1


def refuse_part(path: Location) -> None:
    """Raises FormatError for a file that is one rank's part of a distributed checkpoint."""
    if path.name.endswith(_PART):
        folder = printable(path.parent)
        raise FormatError(
            f"{printable(path)} is one rank's part of the distributed checkpoint in {folder}; give that folder"
        )
