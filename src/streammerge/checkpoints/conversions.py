"""Inputs converted to safetensors first, and kept (``convert_first``): their names, and whether they are right."""

from __future__ import annotations

from dataclasses import replace

from streammerge.checkpoints.index import CheckpointIndex, open_checkpoint
from streammerge.errors import StreammergeError
from streammerge.stores.base import Location


def converted_path(index: CheckpointIndex, folder: Location) -> Location:
    """Where ``convert_first`` keeps an input: its name, and a digest of what the file is and what was taken from it."""
    import hashlib  # here, since it brings all of OpenSSL

    known = sorted(
        (path.name, known.size, known.version) for path, known in zip(index.files, index.identities().values(), strict=True)
    )
    digest = hashlib.sha256(repr((str(index.path.resolve()), known, index.selection.label)).encode()).hexdigest()[:12]
    return folder / f"{index.path.stem}-{digest}.safetensors"


def is_conversion(target: Location, index: CheckpointIndex) -> bool:
    """Whether that file is there and has the tensors of the input."""
    try:
        made = open_checkpoint(target)
    except StreammergeError:
        return False
    wanted = {name: entry.spec for name, entry in index.entries.items()}
    return {name: entry.spec for name, entry in made.entries.items()} == wanted


def from_conversion(index: CheckpointIndex, folder: Location) -> CheckpointIndex:
    """The index with its tensors' bytes taken from the converted file, where that is there."""
    target = converted_path(index, folder)
    if not is_conversion(target, index):
        return index
    made = open_checkpoint(target)
    aliased = {n: made.entries[index.aliases.get(n, n)] for n in index.entries}
    entries = {n: e.named(n) for n, e in aliased.items()}
    return replace(index, entries=entries, files=(*index.files, *made.files))
