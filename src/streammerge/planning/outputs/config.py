"""Plans the edited configurations of an output folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from streammerge.checkpoints.config import (
    CONFIG,
    Config,
    Tree,
    is_model_config,
    mappings,
    read_config,
    tree_of,
    value_at,
)
from streammerge.checkpoints.config_keys import CONFIG_FILES, DTYPES
from streammerge.checkpoints.config_layers import Followed, Moved, candidates, follow
from streammerge.checkpoints.config_text import KeyPath, edited
from streammerge.checkpoints.heads import is_embedding, is_head
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats.base import LayoutFile
from streammerge.planning.alignment import Alignment, Merged
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.layout import text_file
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType
from streammerge.tensors.layers import depths, layer_of
from streammerge.tensors.names import why_ignored

_SHOWN = 60


def config_files(
    folder: Location,
    recipe: Recipe,
    base: CheckpointIndex,
    alignment: Alignment,
    notes: list[str],
    dispositions: Dispositions,
) -> list[LayoutFile]:
    """Returns the configurations that state something else of the output: dtype, layers, tied head, vocabulary.

    Raises RecipeError where a configuration would place layers wrongly and cannot say otherwise.
    """
    change = _Change(recipe, base, alignment)
    files: list[LayoutFile] = []
    for name in CONFIG_FILES:
        config = read_config(folder, name)
        if config is None:
            continue
        if config.unread:
            wanted = change.described() if name == CONFIG else ""
            if wanted:
                notes.append(f"{name} is copied as it is, since {printable(config.unread)}; it should say: {wanted}")
            continue
        edits = _Edits(config, change)
        notes += edits.notes if name == CONFIG or not files else []
        if edits.values:
            said = edits.described()
            notes.append(f"{name}: {said}")
            dispositions.add("file", name, "edited", said)
            files.append(text_file(name, edited(config.text, edits.values)))
    return files


class _Change:
    """What a merge changed that a configuration may state."""

    def __init__(self, recipe: Recipe, base: CheckpointIndex, alignment: Alignment) -> None:
        self.base, self.merged = base, alignment.merged
        self.dtypes = _dtypes((m.spec.dtype, m.spec.numel) for m in self.merged)
        before = _dtypes((s.spec.dtype, s.spec.numel) for s in base.values())
        self.recast = bool(self.dtypes) and (recipe.recast is not None or self.dtypes[:1] != before[:1])
        known: dict[Location, Tree] = {}
        for path in {path for restacked in alignment.restacked for path, _ in restacked.layers}:
            known[path] = tree_of(path)
        self.moved = [Moved(r.stack, r.before, [(known[path], n) for path, n in r.layers]) for r in alignment.restacked]
        self.restacked = {moved.stack for moved in self.moved}
        self.moved += self._other_depths(known)
        self.grown = self._grown()

    def _other_depths(self, known: dict[Location, Tree]) -> list[Moved]:
        """Returns the stacks whose last layers are left out by a rule, or are another checkpoint's."""
        names = {name: m for m in self.merged for name in m.base_names}
        if self.restacked or names.keys() == self.base.entries.keys():
            return []
        found: list[Moved] = []
        before, after = depths(self.base.entries), depths(names)
        for stack, depth in before.items():
            if after.get(stack, 0) in (0, depth):
                continue
            homes: dict[int, Tree] = {}
            for name, m in names.items():
                layer = layer_of(name)
                if layer and layer.stack == stack and layer.number not in homes:
                    path = m.sources[0].begin[0].parent
                    homes[layer.number] = known.setdefault(path, tree_of(path))
            if len(homes) == after[stack]:
                found.append(Moved(stack, depth, [(homes[number], number) for number in range(len(homes))]))
        return found

    def _grown(self) -> dict[tuple[int, int], list[str]]:
        """Returns (rows before, rows now) -> the embeddings and heads that they are of."""
        found: dict[tuple[int, int], list[str]] = {}
        for m in self.merged:
            name = m.base_names[0]
            own = self.base.entries.get(name)
            if own is None or own.spec.shape[:1] == m.spec.shape[:1] or not m.spec.shape or len(own.spec.shape) != 2:
                continue
            layer = layer_of(name)
            if _EMBEDDED.search(name) and (layer is None or layer.stack not in self.restacked):
                found.setdefault((own.spec.shape[0], m.spec.shape[0]), []).append(name)
        return found

    def unties(self, tree: Tree) -> bool:
        """Whether the output has a head of its own where the configuration makes one of head and embeddings."""
        headless = not any(map(is_head, self.base.entries))
        tied = any(each.get("tie_word_embeddings") for _, each in mappings(tree))
        return (headless or tied) and _has_own_head(self.merged)

    def described(self) -> str:
        """Returns what a configuration should say that cannot be read."""
        said = [f"the dtype is {self.dtypes[0].torch_name}"] if self.recast else []
        said += [f"{moved.stack} has {len(moved.layers)} layers" for moved in self.moved]
        said += [f"{listed(names)} has {new} rows" for (_, new), names in self.grown.items()]
        said += ["the head is not tied"] if not any(map(is_head, self.base.entries)) and _has_own_head(self.merged) else []
        return "; ".join(said)


_EMBEDDED = re.compile(r"emb|wte|wpe|vocab|tok|shared\.weight$|lm_head|output\.weight$|proj_out")
_VOCABULARY = re.compile(r"vocab|(^|_)(num|number|n)_(\w+_)?(tokens|embeddings|symbols)$")
_POSITIONS = re.compile(r"position|n_ctx|context_length|max_seq_len|seq_length")
_OF_POSITIONS = re.compile(r"pos(?!t)|wpe")


class _Edits:
    """The new values of one configuration. ``notes``: what it cannot state."""

    def __init__(self, config: Config, change: _Change) -> None:
        self.config, self.tree, self.change = config, config.tree, change
        self.values: dict[KeyPath, Any] = {}
        self.notes: list[str] = []
        self._set_dtype()
        for moved in change.moved:
            self._set_layers(moved)
        stated = [sizes for sizes, names in change.grown.items() if self._set_rows(sizes, names)]
        for sizes, names in change.grown.items():
            beyond = any(sizes[1] - sizes[0] == new - old for old, new in stated)  # some rows more than are stated
            if not beyond:
                self.notes.append(
                    f"{config.name} states nowhere that {listed(names, 2)} had {sizes[0]} rows; now it has {sizes[1]}; "
                    "set this there by hand if it should"
                )
        if change.unties(self.tree):
            for path, each in mappings(self.tree):
                flagged = "tie_word_embeddings" in each or (not path and is_model_config(each))
                if flagged and each.get("tie_word_embeddings") is not False:
                    self.values |= {(*path, "tie_word_embeddings"): False}

    def _set_dtype(self) -> None:
        change = self.change
        if not change.dtypes:
            return
        main = change.dtypes[0].torch_name
        stated = {
            (*path, key): str(each[key]).removeprefix("torch.")
            for path, each in mappings(self.tree)
            for key in DTYPES
            if key in each and (each[key] is None or str(each[key]).removeprefix("torch.") in BY_TORCH_NAME)
        }
        outer = [path for path in stated if len(path) == 1]
        if change.recast:
            for path, value in stated.items():
                if value != main and (len(path) == 1 or len(change.dtypes) == 1):
                    prefix = "torch." if str(value_at(self.tree, path)).startswith("torch.") else ""
                    self.values[path] = prefix + main
            if not outer and is_model_config(self.tree):
                self.values["torch_dtype",] = main
            return
        names = {dtype.torch_name for dtype in change.dtypes}
        wrong = [path for path in outer if stated[path] not in names and value_at(self.tree, path) is not None]
        if wrong and "quantization_config" not in self.tree:
            self.notes.append(
                f"{self.config.name} says {wrong[0][0]} {stated[wrong[0]]}, but the tensors are {main}, as in the first "
                "input; it stays"
            )

    def _set_layers(self, moved: Moved) -> None:
        followed = follow(self.tree, moved, self.config.name)
        restacked = moved.stack in self.change.restacked
        refusal = followed.refusal(self.config.name)
        if refusal:
            raise RecipeError(
                f"{refusal}, or end the output's name in .safetensors, which writes the tensors without a configuration"
            )
        self.values |= followed.edits
        if followed.kinds[0] or restacked:
            self.notes += followed.notes
        if followed.kinds[0] and self.config.name == CONFIG:
            self.notes += _misplaced(self.config.name, moved, followed, self.change)
        named = re.compile(rf"(^|\.){re.escape(moved.stack.rpartition('.')[2])}\.\d+(\.|$)")
        if any(named.search(text) for text in _texts(self.tree)):
            self.notes.append(f"{self.config.name} names layers by their numbers, as in its names of modules; these stay")

    def _set_rows(self, sizes: tuple[int, int], names: list[str]) -> bool:
        """Sets the size of a vocabulary, or of the positions, wherever it is stated. Returns whether it is."""
        positions = all(map(_OF_POSITIONS.search, names))
        wanted = _POSITIONS if positions else _VOCABULARY
        of_types = all("type" in name for name in names)
        found = [
            (*path, key)
            for path, each in mappings(self.tree)
            for key, value in each.items()
            if value == sizes[0] and wanted.search(key) and ("type" in key) == of_types and not isinstance(value, bool)
        ]
        if len(found) > 1 and self._is_others(sizes[0], names):
            own = {path for name in names for path, _ in candidates(self.tree, name)}
            found = [path for path in found if path[:-1] in own]
        self.values |= dict.fromkeys(found, sizes[1])
        return bool(found)

    def _is_others(self, rows: int, names: list[str]) -> bool:
        """Whether other embeddings have and keep the number of rows that these had."""
        return any(
            m.spec.shape[:1] == (rows,) and is_embedding(m.base_names[0]) and m.base_names[0] not in names
            for m in self.change.merged
        )

    def described(self) -> str:
        return ", ".join(self._described(path, value) for path, value in self.values.items())

    def _described(self, path: KeyPath, value: Any) -> str:
        key, old = printable(".".join(path)), value_at(self.tree, path)
        if isinstance(value, list) and max(len(str(value)), len(str(old))) > _SHOWN:
            return f"{key} follows the layers ({len(value)} entries, was {len(old)})"
        was = f" (was {printable(old, _SHOWN)})" if path[-1] in value_at(self.tree, path[:-1]) else ""
        return f"{key} is now {printable(value, _SHOWN)}{was}"


def _dtypes(tensors: Iterable[tuple[DType, int]]) -> list[DType]:
    """Returns the floating-point dtypes, that of most elements first."""
    counted: Counter[DType] = Counter()
    for dtype, numel in tensors:
        if dtype.kind == "float":
            counted[dtype] += numel
    return [dtype for dtype, _ in counted.most_common()]


def _has_own_head(merged: list[Merged]) -> bool:
    """Whether the output has a head that differs from the embeddings."""
    embeddings = {
        tuple(s.place for s in m.sources) for m in merged if not is_head(m.spec.name) and is_embedding(m.spec.name)
    }
    return bool(embeddings) and any(
        is_head(m.spec.name) and tuple(s.place for s in m.sources) not in embeddings for m in merged
    )


def _texts(tree: Any) -> Iterable[str]:
    """Yields the texts and keys in a configuration."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    elif isinstance(tree, str):
        yield tree


def _misplaced(name: str, moved: Moved, followed: Followed, change: _Change) -> list[str]:
    """Returns a note about layers that lack tensors which a loader expects by the layer's place.

    A loader knows what a layer holds from the configuration or, where this does not tell, from the layer's number.
    """
    there = _held(change.base.entries, moved.stack)
    now = _held((each for m in change.merged for each in m.base_names), moved.stack)
    if len(set(there.values())) < 2:
        return []
    said: dict[Any, set[frozenset[str]]] = {}
    for number, kind in enumerate(followed.kinds[0]):
        said.setdefault(tuple(kind), set()).add(there.get(number, frozenset()))
    if all(len(each) == 1 for each in said.values()):
        return []  # the configuration tells what each layer has
    last = {tuple(kind): number for number, kind in enumerate(followed.kinds[0])}
    for place, kind in enumerate(followed.kinds[1]):
        expected = there.get(place, there.get(last.get(tuple(kind), -1), frozenset()))
        own, number = now.get(place, frozenset()), moved.layers[place][1]
        for names, has in ((expected - own, "has no"), (own - expected, "has")):
            odd = sorted(each for each in names if not why_ignored(each, ()))
            if odd and expected:
                return [
                    f"layer {place} of {printable(moved.stack)}, which was layer {number}, {has} {listed(odd, 2)}, unlike "
                    f"what a loader may expect there: {name} does not tell which layers have it"
                ]
    return []


def _held(names: Iterable[str], stack: str) -> dict[int, frozenset[str]]:
    """Returns the number of each layer of a stack -> what its tensors are called in it."""
    found: dict[int, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None and layer.stack == stack:
            found.setdefault(layer.number, []).append(layer.rest)
    return {number: frozenset(each) for number, each in found.items()}
