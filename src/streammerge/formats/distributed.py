"""Checkpoints that several ranks wrote in parts: which one a folder holds, and where a trainer's folder has it.

The readers are imported when a folder of their kind is met. What is not read is refused with what converts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from streammerge.errors import FormatError, listed, printable
from streammerge.formats.base import PART_ENDING, Container
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner

_METADATA = r"\.metadata|__\d+\.metadata"
_DEEPSPEED = (
    r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt|mp_rank_\d+_model_states\.pt"
    r"|(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|layer_\d+-model_\d+-model_states\.pt"
)
_RANK_FILE = r"(?i)rank[._-]?\d+\.(pt|pth|bin|ckpt)$"
_MEGATRON = r"mp_rank_\d+(_\d+){0,2}"
_MEGATRON_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_weights.ckpt")
_HF_SHARD = r"shard-\d+-model-\d+-of-\d+\.safetensors"

_POINTERS = {"latest": "", "latest_universal": "", "latest_checkpointed_iteration.txt": "iter_"}
"""Files in which trainers name the subfolder of the last step, and what stands before a number."""
_MOST_POINTER_BYTES = 4096

ReadFile = Callable[[Location], Container]


def of_ranks(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of a checkpoint whose parts lie directly in a folder. None if there is none."""
    names = [path.name for path in folder.children()]
    if _any_like(_METADATA, ".metadata", names):
        from streammerge.formats import dcp

        return dcp.read(folder)
    if any(name.endswith(PART_ENDING) for name in names):
        raise FormatError(
            f"{printable(folder)} holds parts of a distributed checkpoint without its .metadata, which says what is in "
            "them and is written last; copy that file too, or give an earlier step if the save did not finish"
        )
    if _any_like(_HF_SHARD, "shard-", names):
        from streammerge.formats import hf_storage

        return hf_storage.read(folder)
    if _any_like(_DEEPSPEED, "_states.pt", names):
        from streammerge.formats import zero

        return zero.read(folder, read_file)
    _refuse_megatron(folder, names)
    return None


def _any_like(pattern: str, part: str, names: list[str]) -> bool:
    """Whether a name matches. ``part`` stands in every name that does. It is looked for first, because a pattern takes
    longer to compile than a small folder to read."""
    return any(part in name and re.fullmatch(pattern, name) for name in names)


def _refuse_megatron(folder: Location, names: list[str]) -> None:
    """Raises FormatError for the formats of Megatron-LM that are not read."""
    where = printable(folder)
    if "metadata.json" in names and b'"zarr"' in (folder / "metadata.json").read(
        0, min((folder / "metadata.json").size, 4096)
    ):
        raise FormatError(
            f"{where} is a checkpoint of Megatron-LM in its zarr format, which is not read; load it in a Megatron-LM that "
            "still reads it, and save it as torch_dist"
        )
    ranks = [
        name for name in names if "mp_rank_" in name and re.fullmatch(_MEGATRON, name) and any(_holds_model(folder / name))
    ]
    if len(ranks) > 1:
        raise FormatError(
            f"{where} is a checkpoint of Megatron-LM in its legacy format, in parts of {len(ranks)} ranks "
            f"({listed(ranks, 2)}), which is not read; convert it with Megatron-LM's `tools/checkpoint/convert.py`, or "
            "load it there and save it as torch_dist"
        )


def _holds_model(folder: Location) -> Iterator[Location]:
    """Yields the file of a rank of Megatron-LM's legacy format."""
    yield from (path for name in _MEGATRON_FILES if (path := folder / name).is_file())


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
    ranks = [path for path in folder.children() if re.fullmatch(_MEGATRON, path.name)]
    whole = [file for path in ranks for file in _holds_model(path)]
    if len(whole) == 1:
        return read_file(whole[0])  # the file of the only rank of Megatron-LM
    found = [path for path in folder.children() if path.is_folder() and holds_parts(path)]
    weights = [path for path in found if not path.name.startswith("optim")] or found
    if len(weights) > 1:
        names = listed([path.name for path in weights])
        raise FormatError(
            f"{printable(folder)} holds several distributed checkpoints, {names}; give one of them, or a pattern that "
            "matches the steps to merge"
        )
    return (of_ranks(weights[0], read_file) or below(weights[0], read_file)) if weights else None


def deeper(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of the only step in a run's folder, whose parts lie two levels below. None if there is none.
    Raises FormatError if there are several steps."""
    inner = [path for path in folder.children() if path.is_folder() and not path.name.startswith(".")]
    steps = [path for path in inner if any(each.is_folder() and holds_parts(each) for each in path.children())]
    if len(steps) > 1:
        raise FormatError(
            f"{printable(folder)} holds the distributed checkpoints of several steps, "
            f"{listed([path.name for path in steps])}; give one of them, or a pattern that matches the steps to merge"
        )
    return below(steps[0], read_file) if steps else None


def _of_rank_files(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of files that each hold a rank's state dict. None if there are none in a folder."""
    names = [path.name for path in folder.children()]
    if sum(re.search(_RANK_FILE, name) is not None for name in names) < 2:
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
    made = of_ranks(folder / step, read_file) or below(folder / step, read_file)
    if made is not None:
        made.notes.append(f"{printable(folder)}: {printable(step)} is taken, which {printable(pointer.name)} names")
    return made


def holds_parts(folder: Location) -> bool:
    """Whether files or folders of several ranks lie directly in a folder, by their names."""
    names = [path.name for path in folder.children()]
    if any(re.fullmatch(pattern, name) for name in names for pattern in (_METADATA, _HF_SHARD, _DEEPSPEED, _MEGATRON)):
        return True
    return sum(re.search(_RANK_FILE, name) is not None for name in names) > 1
