"""Edits what a configuration states about its weights besides the layers: dtype, rows of embeddings, a tied head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streammerge.checkpoints.config import Config, Tree, is_model_config, mappings, value_at
from streammerge.checkpoints.config_keys import DTYPES, OF_POSITIONS, POSITIONS, QUANTISATION, VOCABULARY
from streammerge.checkpoints.config_layers import candidates
from streammerge.checkpoints.config_text import REMOVED, KeyPath
from streammerge.errors import listed, printable
from streammerge.tensors.dtypes import BY_TORCH_NAME

_SHOWN = 60
_VOCABULARY, _POSITIONS, _OF_POSITIONS = map(re.compile, (VOCABULARY, POSITIONS, OF_POSITIONS))

Rows = Mapping[tuple[int, int], list[str]]
"""(rows before, rows now) -> the embeddings and heads that have them."""


class Edits:
    """The new values of one configuration. ``notes``: what it cannot state."""

    def __init__(self, config: Config) -> None:
        self.config, self.tree = config, config.tree
        self.values: dict[KeyPath, Any] = {}
        self.notes: list[str] = []

    def described(self) -> str:
        """Returns the new values by their keys, with the old ones."""
        return ", ".join(self._described(path, value) for path, value in self.values.items())

    def _described(self, path: KeyPath, value: Any) -> str:
        key, old = printable(".".join(path)), value_at(self.tree, path)
        if value is REMOVED:
            return f"{key} is removed"
        if isinstance(value, list) and max(len(str(value)), len(str(old))) > _SHOWN:
            return f"{key} follows the layers ({len(value)} entries, was {len(old)})"
        was = f" (was {printable(old, _SHOWN)})" if path[-1] in value_at(self.tree, path[:-1]) else ""
        return f"{key} is now {printable(value, _SHOWN)}{was}"

    def dequantise(self) -> None:
        """Takes out what states how the weights are quantised, since loaders would look for scales."""
        for path, each in mappings(self.tree):
            self.values |= {(*path, key): REMOVED for key in QUANTISATION if key in each}

    def compare_codes(self, has_codes: Callable[[], bool]) -> None:
        """Notes a statement about codes, where no tensor is stored in codes. Some loaders quantise by it, most fail."""
        stated = [((*path, key), each[key]) for path, each in mappings(self.tree) for key in QUANTISATION if key in each]
        if stated and not has_codes():
            path, value = stated[0]
            kind = value.get("quant_method") if isinstance(value, dict) else None
            by = f" ({printable(kind, _SHOWN)})" if kind else ""
            self.notes.append(
                f"{self.config.name} has {'.'.join(path)}{by}, but no tensor is stored in codes; it stays, so take it "
                "out of the output unless the loader quantises these weights itself"
            )

    # -- dtype --------------------------------------------------------------------------------------------------

    def _dtypes(self) -> dict[KeyPath, str]:
        """Returns the dtypes that are stated. A null is one that is not stated yet."""
        return {
            (*path, key): name
            for path, each in mappings(self.tree)
            for key in DTYPES
            if key in each and ((name := str(each[key]).removeprefix("torch.")) in BY_TORCH_NAME or each[key] is None)
        }

    def set_dtype(self, name: str, all_alike: bool) -> None:
        """States another dtype. ``all_alike``: whether all tensors have it, so that each part of the model has it too."""
        stated = self._dtypes()
        for path, old in stated.items():
            if old != name and (len(path) == 1 or all_alike):
                prefix = "torch." if str(value_at(self.tree, path)).startswith("torch.") else ""
                self.values[path] = prefix + name
        if is_model_config(self.tree) and not any(len(path) == 1 for path in stated):
            self.values["torch_dtype",] = name

    def compare_dtype(self, names: Sequence[str]) -> None:
        """Notes a dtype that no tensor has. ``names``: the dtypes of the tensors, the first one that of most elements."""
        wrong = [(path, old) for path, old in self._dtypes().items() if len(path) == 1 and old not in (*names, "None")]
        if wrong and "quantization_config" not in self.tree:
            (key,), old = wrong[0]
            self.notes.append(
                f"{self.config.name} says {key} {old}, but the tensors are {names[0]}, as in the first input; it stays"
            )

    # -- embeddings ---------------------------------------------------------------------------------------------

    def set_rows(self, grown: Rows, keeps: Callable[[int], bool]) -> None:
        """States the size of a vocabulary, or of the positions, wherever it is stated.

        ``keeps``: whether other embeddings have and keep a number of rows.
        """
        stated = [sizes for sizes, names in grown.items() if self._set_rows(sizes, names, keeps)]
        for sizes, names in grown.items():
            if not any(
                sizes[1] - sizes[0] == new - old for old, new in stated
            ):  # otherwise the table has more rows than stated
                self.notes.append(
                    f"{self.config.name} states nowhere that {listed(names, 2)} had {sizes[0]} rows; now it has "
                    f"{sizes[1]}, so set this there by hand if it should"
                )

    def _set_rows(self, sizes: tuple[int, int], names: list[str], keeps: Callable[[int], bool]) -> bool:
        wanted = _POSITIONS if all(map(_OF_POSITIONS.search, names)) else _VOCABULARY
        of_types = all("type" in name for name in names)
        found = [
            (*path, key)
            for path, each in mappings(self.tree)
            for key, value in each.items()
            if value == sizes[0] and wanted.search(key) and ("type" in key) == of_types and not isinstance(value, bool)
        ]
        if len(found) > 1 and keeps(sizes[0]):
            own = {path for name in names for path, _ in candidates(self.tree, name)}
            found = [path for path in found if path[:-1] in own]
        self.values |= dict.fromkeys(found, sizes[1])
        return bool(found)

    def set_vocabulary(self, before: int, rows: int) -> None:
        """States how many rows embeddings of tokens have. ``before``: how many they had, which is more than is stated where
        a table is padded."""
        if before == rows:
            return
        stated = {
            (*path, key): value
            for path, each in mappings(self.tree)
            for key, value in each.items()
            if _VOCABULARY.search(key) and "type" not in key and isinstance(value, int) and not isinstance(value, bool)
        }
        found = [path for path, value in stated.items() if value == before]
        found = found or [path for path in stated if path[-1] == "vocab_size"][:1]
        self.values |= {path: rows for path in found if stated[path] != rows}
        if not found:
            self.notes.append(
                f"{self.config.name} states nowhere how many tokens there are; embeddings now have {rows} rows"
            )

    def set_labels(self, rows: Mapping[str, tuple[int, int]], others: Sequence[Tree]) -> None:
        """States the labels of a classifier that has other rows now, or notes that it cannot.

        ``rows``: name -> (rows before, rows now). ``others``: the configurations beside the tensors that the rows come
        from. They must agree on the further labels, and have the same first ones.
        """
        labels = self.tree.get("id2label")
        for name, (before, now) in rows.items():
            if isinstance(labels, dict) and len(labels) == before:
                known = [each["id2label"] for each in others if _continues(labels, each.get("id2label"), now)]
                if known and all(each == known[0] for each in known):
                    self.values["id2label",] = known[0]
                    if isinstance(self.tree.get("label2id"), dict):
                        self.values["label2id",] = {label: int(number) for number, label in known[0].items()}
                    if self.tree.get("num_labels") == before:
                        self.values["num_labels",] = now
                    continue
                self.notes.append(
                    f"id2label of {self.config.name} has {before} labels, but {printable(name)} now has {now} rows; name "
                    "the others there by hand"
                )

    def untie(self) -> None:
        """States that head and embeddings are two tensors."""
        for path, each in mappings(self.tree):
            flagged = "tie_word_embeddings" in each or (not path and is_model_config(each))
            if flagged and each.get("tie_word_embeddings") is not False:
                self.values |= {(*path, "tie_word_embeddings"): False}


def _continues(labels: dict[str, Any], longer: Any, count: int) -> bool:
    """Whether ``longer`` has ``count`` labels by their numbers, and begins with ``labels``."""
    if not isinstance(longer, dict) or len(longer) != count or not all(map(str.isdecimal, longer)):
        return False
    return all(isinstance(each, str) for each in longer.values()) and labels.items() <= longer.items()


def ties_somewhere(tree: Tree) -> bool:
    return any(each.get("tie_word_embeddings") for _, each in mappings(tree))
