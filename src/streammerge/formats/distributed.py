"""Checkpoints that several ranks wrote in parts: which one a folder holds, and where a trainer's folder has it.

The readers are imported when a folder of their kind is met. What is not read is refused with what converts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from streammerge.errors import FormatError, listed, printable
from streammerge.formats.base import Container
from streammerge.stores.base import Location

_PART = ".distcp"
_METADATA = re.compile(r"\.metadata|__\d+\.metadata")
_HF_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")

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
    return None


def below(folder: Location, read_file: ReadFile) -> Container | None:
    """Returns the container of the checkpoint in a trainer's folder, which has its parts in a subfolder. None if there is
    none. Raises FormatError if there are several."""
    found = [path for path in folder.children() if path.is_folder() and _holds_parts(path)]
    weights = [path for path in found if not path.name.startswith("optim")] or found
    if len(weights) > 1:
        names = listed([path.name for path in weights])
        raise FormatError(f"{printable(folder)} holds several distributed checkpoints, {names}; give one of them")
    if not weights:
        return None
    return of_ranks(weights[0], read_file)


def _holds_parts(folder: Location) -> bool:
    names = [path.name for path in folder.children()]
    return any(map(_METADATA.fullmatch, names)) or any(map(_HF_SHARD.fullmatch, names))


def refuse_part(path: Location) -> None:
    """Raises FormatError for a file that is one rank's part of a distributed checkpoint."""
    if path.name.endswith(_PART):
        folder = printable(path.parent)
        raise FormatError(
            f"{printable(path)} is one rank's part of the distributed checkpoint in {folder}; give that folder"
        )
