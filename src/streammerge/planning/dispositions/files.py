"""Decides what becomes of each file in the folder of the first input.

The files that hold the merged tensors are merged. Everything else that a loader may read beside them is copied, whatever
its size. These stay behind, and the ledger names them: other forms of the same weights, which would be stale; files of a
training run; exports for other programs; hidden files; checksums; links to folders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

from streammerge.checkpoints.index import CheckpointIndex, index_of
from streammerge.errors import FormatError, StreammergeError
from streammerge.formats.base import Form
from streammerge.formats.detect import read_file
from streammerge.formats.distributed import holds_parts
from streammerge.formats.file_names import is_shard, is_whole_model, kind_of_file, kind_of_folder
from streammerge.planning.dispositions.entries import OPTIMIZER
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.stores.names import is_inner

_OTHER_FORM = "another form of the merged weights, which would be stale"
NOT_MERGED = "weights that are not merged"
_WHY_FOLDER = {
    "hidden": "hidden",
    "training": "checkpoints and logs of a training run",
    "export": "made from the weights before the merge, for another program",
    "linked": "a link to a folder",
    "deep": "more folders within each other than are copied",
}
_WHY_FILE = {
    "hidden": "hidden",
    "ours": "of an earlier merge",
    "training": "state of a training run",
    "export": "made from the weights before the merge, for another program",
    "checksums": "a checksum of the input's files",
    "index": "an index of other files",
}
_QUANTISATION_FILES = frozenset(("hf_quant_config.json", "quantize_config.json", "quant_config.json"))
_QUANTISED = "states how the first input is quantised, which the output is not"
_GOES_ON = "state of the first input's training, which goes on from it"
_NOT_NEEDED = re.compile(r"events\.out.*|zero_to_fp32\.py|latest|training_args\.bin")
"""Files of a training run that it does not need to go on."""
_OPTIMIZER_FOLDER = re.compile(r"optim(izer)?(_\d+)?")
_PIECES = "parts of several ranks, which the output has joined"
_MOST_BELOW = 20
"""A file with less than one part in 20 of the merged bytes is no other form of them."""

Copies = list[tuple[Location, str]]
"""(source, name in the output) of files that are copied."""


def decide(
    base: CheckpointIndex,
    folder: Location,
    written: Collection[str],
    dispositions: Dispositions,
    goes_on: bool | None = None,
) -> Copies:
    """Returns the files to copy into the output folder, and records the fate of every file.

    ``written``: names of files that the output has in any case. ``goes_on``: whether the state of the first input's
    training is copied too, so that training goes on from the output; None if it cannot. Raises FormatError for a broken
    link.
    """
    return _Decision(base, folder, written, dispositions, goes_on).made()


def parts_of(base: CheckpointIndex) -> dict[str, CheckpointIndex]:
    """Returns the models of a folder by their subfolders; "" is the folder itself."""
    return base.parts or {"": base}


def is_file_of_folder(part: CheckpointIndex) -> bool:
    """Whether a model of a folder is one of several files side by side in it. Then its name is the name of its file."""
    form, container = part.container.form, part.container
    return form is not None and form.files == (part.path.name,) and container.path == part.path


def folder_of(name: str, part: CheckpointIndex) -> str:
    """Returns the subfolder in which the files of a model lie."""
    return name.rpartition("/")[0] if is_file_of_folder(part) else name


class _Decision:
    def __init__(
        self,
        base: CheckpointIndex,
        folder: Location,
        written: Collection[str],
        dispositions: Dispositions,
        goes_on: bool | None,
    ) -> None:
        self.base, self.folder, self.written, self.add = base, folder, written, dispositions.add
        self.goes_on = goes_on
        self.parts = parts_of(base)
        forms = {name: part.container.form or Form("", "") for name, part in self.parts.items()}
        self.merged = {
            f"{folder_of(name, self.parts[name])}/{file}".lstrip("/")
            for name, form in forms.items()
            for file in (*form.files, form.index)
            if file
        }
        self.own = re.compile("|".join(own for part in self.parts.values() if (own := part.container.own_files)) or "(?!)")
        self.above = {above for name in self.parts for above in _with_parents(name)}
        self.dropped: dict[str, list[str]] = {}
        self.copied: Copies = []
        self.weights: list[str] = []
        self.states: list[str] = []

    def made(self) -> Copies:
        self._walk(self.folder, "")
        self.add("file", sorted(self.merged), "merged")
        for why, names in self.dropped.items():
            self.add("file", names, "dropped", why)
        apart = {*self.weights, *self.states}
        plain = [name for _, name in self.copied if name not in apart]
        self.add("file", self.states, "copied", _GOES_ON)
        self.add("file", plain, "copied")
        self.add("file", self.weights, "copied", NOT_MERGED)
        return self.copied

    def _walk(self, folder: Location, prefix: str) -> None:
        for path in folder.children():
            name = prefix + path.name
            if path.is_folder():
                self._folder(path, name)
            elif name not in self.merged:
                self._file(path, name, prefix.rstrip("/"))

    def _folder(self, path: Location, name: str) -> None:
        kind = kind_of_folder(path, name)
        if name in self.above:
            self._walk(path, f"{name}/")
        elif _OPTIMIZER_FOLDER.fullmatch(path.name) and holds_parts(path):
            self._optimizer(path, name)
        elif kind != "side":
            self._drop(f"{name}/", _WHY_FOLDER[kind])
        elif any(self._is_other_form(each, name) for each in _weights_in(path)):
            self._drop(f"{name}/", _OTHER_FORM)
        else:
            self._walk(path, f"{name}/")

    def _optimizer(self, path: Location, name: str) -> None:
        """Copies the folder of an optimizer, which stands beside that of the weights, or leaves it out."""
        if not self.goes_on:
            self._drop(f"{name}/", _WHY_FILE["training"] if self.goes_on is None else OPTIMIZER)
            return
        for each in path.children():
            if each.is_file():
                self._keep(each, f"{name}/{each.name}")

    def _keep(self, path: Location, name: str) -> None:
        self.copied.append((path, name))
        self.states.append(name)

    def _file(self, path: Location, name: str, above: str) -> None:
        kind = kind_of_file(path.name)
        if self.goes_on and kind == "training" and not above and path.is_file() and not _is_left(path.name):
            self._keep(path, name)
            return
        if kind == "index" and above not in self.above:  # of shards that are copied too
            kind = "side"
        if kind in ("side", "weights") and name not in self.written and (broken := path.broken_link()):
            raise FormatError(broken)
        if name in self.written:
            return
        if self.own.fullmatch(path.name):
            self._drop(name, _PIECES)
            return
        if kind not in ("side", "weights"):
            self._drop(name, _WHY_FILE[kind])
        elif self.base.quantised and path.name in _QUANTISATION_FILES:
            self._drop(name, _QUANTISED)
        elif not is_inner(name) or not path.is_file():
            self._drop(name, "no regular file" if is_inner(name) else "its name is not one that every system can have")
        elif kind == "weights" and self._is_other_form(path, above):
            self._drop(name, _OTHER_FORM)
        else:
            self.copied.append((path, name))
            if kind == "weights":
                self.weights.append(name)

    def _drop(self, name: str, why: str) -> None:
        self.dropped.setdefault(why, []).append(name)

    def _is_other_form(self, path: Location, above: str) -> bool:
        """Whether a file holds the merged weights once more, or a part of them, in any format.

        A file beside merged ones that has a name of a whole model does. Else its tensors decide, by their names and shapes.
        """
        whole = is_whole_model(path.name)
        if whole and not is_shard(path.name) and (above in self.parts or path.name.startswith("consolidated")):
            return True
        if not whole and path.size * _MOST_BELOW < self.base.nbytes:
            return False
        try:
            other = index_of(read_file(path), path)
        except (StreammergeError, OSError):
            return False
        ours = self.base.entries
        local = {name.removeprefix(f"{above}/") if above else name: name for name in ours}
        theirs = other.entries.items()
        if 2 * sum(name in local and _may_be(entry, ours[local[name]]) for name, entry in theirs) > len(theirs):
            return True
        shapes = Counter(_shape(entry.spec.shape) for entry in ours.values())
        covered = 0
        for entry in other.entries.values():
            shape = _shape(entry.spec.shape)
            if shapes[shape]:
                shapes[shape] -= 1
                covered += entry.spec.numel
        if whole or len(self.parts) > 1:  # one file beside a pipeline is a model with all of it
            return 5 * covered >= 3 * other.numel and 2 * covered >= self.base.numel
        # Another model (a vocoder, a text encoder) may share shapes. Leaving it out would keep its program from loading.
        alike = 10 * covered >= 9 * other.numel and 10 * covered >= 9 * self.base.numel
        return alike and len(other.entries) >= _LEAST_ALIKE


def _is_left(name: str) -> bool:
    return name.endswith(".distcp") or _NOT_NEEDED.fullmatch(name) is not None


_LEAST_ALIKE = 4
"""The fewest tensors whose shapes alone tell that a file of any name holds the merged weights once more."""


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns what two layouts of one tensor have in common: its axes longer than 1, in any order."""
    return tuple(sorted(length for length in shape if length != 1))


def _may_be(theirs: Source, ours: Source) -> bool:
    """Whether two tensors of one name may be forms of one weight. Modules of other networks may be called ``0.weight`` too.

    Codes of a quantised weight have a shape of their own.
    """
    return theirs.spec.dtype.kind != "float" or _shape(theirs.spec.shape) == _shape(ours.spec.shape)


def _weights_in(folder: Location) -> Iterator[Location]:
    for path in folder.children():
        if kind_of_file(path.name) == "weights" and path.is_file():
            yield path


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split("/")
    for count in range(len(parts) + 1):
        yield "/".join(parts[:count])
