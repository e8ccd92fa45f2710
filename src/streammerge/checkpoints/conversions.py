"""Inputs that ``convert_first`` converts to safetensors and keeps: their names, and the check that they are right."""

from __future__ import annotations

from dataclasses import replace

from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import StreammergeError
from streammerge.stores.base import Location


def converted_path(index: CheckpointIndex, folder: Location) -> Location:
    """Returns the location where ``convert_first`` keeps an input. Its name ends in a digest of the file's identity and of
    the tensors taken from it."""
    import hashlib  # here, because it loads all of OpenSSL

    known = sorted(
        (path.name, known.size, known.version) for path, known in zip(index.files, index.identities().values(), strict=True)
    )
    told = (str(index.path.resolve()), known, index.selection.label, *([index.adapted_as] if index.adapted_as else []))
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
    return folder / f"{index.path.stem}-{digest}.safetensors"


def is_conversion(target: Location, index: CheckpointIndex) -> bool:
    """Whether the converted file exists and has the tensors of the input."""
    try:
        made = open_checkpoint(target)
    except StreammergeError:
        return False
    wanted = {name: entry.spec for name, entry in index.entries.items()}
    return {name: entry.spec for name, entry in made.entries.items()} == wanted


def from_conversion(index: CheckpointIndex, folder: Location) -> CheckpointIndex:
    """Returns the index with its tensors read from the converted file, if that file exists."""
    target = converted_path(index, folder)
    if not is_conversion(target, index):
        return index
    made = open_checkpoint(target)
    aliased = {n: made.entries[index.aliases.get(n, n)] for n in index.entries}
    entries = {n: e.named(n) for n, e in aliased.items()}
    return replace(index, entries=entries, files=(*index.files, *made.files))
