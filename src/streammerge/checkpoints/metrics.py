"""Numbers that training programs wrote beside a checkpoint. A checkpoint can be chosen by one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from streammerge.checkpoints.numbers import metric_in, number_of
from streammerge.errors import FormatError, RecipeError
from streammerge.pickles.tree import number
from streammerge.recipe.document import parse_yaml
from streammerge.stores.base import Location
from streammerge.stores.locations import parse

TRAINER_STATE = "trainer_state.json"
_MOST_STATE_BYTES = 256 << 20
_MOST_FILE_BYTES = 4 << 20
_MOST_FILES = 64
_TEXTS = (".yaml", ".yml", ".json")


class Beside:
    """The numbers of one checkpoint: in the trainer's state, in YAML and JSON files beside it, and in its own name.

    ``alone``: whether no other candidate lies in the same folder, so that all files in it are about this checkpoint.
    """

    def __init__(self, path: str, alone: bool = False) -> None:
        self.path, self.place = path, parse(path)
        self.is_folder = self.place.is_folder()
        self.folder = self.place if self.is_folder else self.place.parent
        self.owns_folder = self.is_folder or alone
        self.state = _mapping(self.folder / TRAINER_STATE, _MOST_STATE_BYTES)

    def value(self, key: str) -> float | int | None:
        """The number at a key: of the trainer's state, of a file beside, or of the checkpoint's name; None if there is
        none."""
        step = None if self.owns_folder else number_of(self.path)
        found = _of_trainer(self.state, key, step)
        for stem, data in self._texts() if found is None else ():
            found = number_at(data, key) if found is None else found
            if found is None and stem == key:  # one file for all checkpoints: name -> number
                found = _as_number(data)
        return metric_in(self.path, key) if found is None else found

    def keys(self) -> set[str]:
        """The keys of all numbers that are known, without those that only names state."""
        known = {key for _, data in self._texts() for key in keys_of(data, _as_number)}
        return known | {key for entry in _logged(self.state) for key, value in entry.items() if number(value) is not None}

    def _texts(self) -> Iterator[tuple[str, Any]]:
        """(stem, data) of the files that are about this checkpoint: of its folder, of its own name, or under its name in
        a file about several."""
        place = self.place
        try:
            names = [each.name for each in self.folder.children() if each.suffix in _TEXTS]
        except OSError:
            return
        for name in names[:_MOST_FILES]:
            stem = name.rpartition(".")[0]
            if name == TRAINER_STATE or (data := _mapping(self.folder / name, _MOST_FILE_BYTES)) is None:
                continue
            if self.owns_folder or stem in (place.name, place.stem):
                yield stem, data
                continue
            named = {str(key).rpartition("/")[2]: value for key, value in data.items()}
            own = next((named[each] for each in (place.name, place.stem) if each in named), None)
            if own is not None:
                yield stem, own


def number_at(data: Any, key: str) -> float | int | None:
    """The number at a dotted path in plain data, or at a key that has the dots itself."""
    if isinstance(data, dict) and key in data:
        return _as_number(data[key])
    head, _, rest = key.partition(".")
    return number_at(data.get(head), rest) if rest and isinstance(data, dict) else None


def _as_number(value: Any) -> float | int | None:
    """A number; YAML 1.1 reads one like ``1e-3`` as a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return number(value)


def keys_of(data: Any, read: Callable[[Any], Any] = number, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Keys of the numbers in plain data; ``read`` gives the number that a value is, or None."""
    for key, value in data.items() if isinstance(data, dict) and depth < 4 else ():
        if read(value) is not None and not isinstance(value, bool):
            yield f"{prefix}{key}"
        yield from keys_of(value, read, f"{prefix}{key}.", depth + 1)


def _mapping(path: Location, most_bytes: int) -> dict[str, Any] | None:
    """The mapping in a YAML or JSON file; None for anything else. JSON is read as Python reads it, NaN included."""
    try:
        if not path.is_file() or (size := path.size) > most_bytes:
            return None
        text = path.read(0, size).decode("utf-8")
        data = json.loads(text) if path.suffix == ".json" else parse_yaml(text, path.name).data
    except (OSError, ValueError, RecursionError, RecipeError, FormatError):
        return None
    return data if isinstance(data, dict) else None


def _logged(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    history = (state or {}).get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def _of_trainer(state: dict[str, Any] | None, key: str, step: float | None) -> float | int | None:
    """Returns the latest value of a metric up to the state's own step. Other files share the state, so for a file it is
    the value of its step."""
    if state is None:
        return None
    if step is not None:
        entries = [entry for entry in _logged(state) if number(entry.get("step")) == step]
        return next((number(entry[key]) for entry in entries if number(entry.get(key)) is not None), None)
    last = number(state.get("global_step"))
    for entry in reversed(_logged(state)):
        at = number(entry.get("step"))
        if number(entry.get(key)) is not None and (last is None or at is None or at <= last):
            return number(entry[key])
    return number(state.get(key))
