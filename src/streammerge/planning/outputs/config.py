"""Plans the edited configurations of an output folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from streammerge.checkpoints.config import Config, Tree, read_config, tie_flag, tree_of
from streammerge.checkpoints.config_edits import Edits, ties_somewhere
from streammerge.checkpoints.config_keys import CONFIG_FILES
from streammerge.checkpoints.config_layers import Followed, Moved, follow
from streammerge.checkpoints.config_text import edited
from streammerge.checkpoints.heads import is_embedding, is_head
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError, listed, printable
from streammerge.formats.base import LayoutFile
from streammerge.planning.aligned import Merged, elements, has_rows_of_first, unlike, where
from streammerge.planning.alignment import Alignment
from streammerge.planning.dispositions.ledger import Dispositions
from streammerge.planning.outputs.layout import text_file
from streammerge.planning.outputs.tokenizer import token_edits
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.tensors.dtypes import DType
from streammerge.tensors.layers import depths, layer_of
from streammerge.tensors.names import why_ignored
from streammerge.tensors.spec import TensorSpec


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
    configs = [config for name in CONFIG_FILES if (config := read_config(folder, name))]
    if not configs:
        return []
    change = _Change(recipe, base, alignment)
    files: list[LayoutFile] = []
    for config in configs:
        name = config.name
        if config.unread:
            wanted = change.described()
            if wanted:
                notes.append(f"{name} is copied as it is, since {printable(config.unread)}; it should say: {wanted}")
            continue
        edits = _edits(config, change)
        notes += edits.notes if config is configs[0] else []
        if edits.values:
            said = edits.described()
            notes.append(f"{name}: {said}")
            dispositions.add("file", name, "edited", said)
            files.append(text_file(name, edited(config.text, edits.values)))
    return files


class _Change:
    """What a merge changed that a configuration may state."""

    def __init__(self, recipe: Recipe, base: CheckpointIndex, alignment: Alignment) -> None:
        self.base, self.merged, self.tokenized = base, alignment.merged, alignment.tokenized
        self.headless = not any(map(is_head, base.entries))
        self.adapted = any(_unties(view.index) for view, _ in alignment.viewed if view.index.plain is not None)
        self.dtypes = _dtypes(elements(self.merged))
        before = _dtypes((spec, spec.numel) for spec in base.specs().values())
        self.recast = bool(self.dtypes) and (recipe.recast is not None or self.dtypes[:1] != before[:1])
        known: dict[Location, Tree] = {}
        for path in {path for restacked in alignment.restacked for path, _ in restacked.layers}:
            known[path] = tree_of(path)
        self.moved = [Moved(r.stack, r.before, [(known[path], n) for path, n in r.layers]) for r in alignment.restacked]
        self.restacked = {moved.stack for moved in self.moved}
        self.moved += self._other_depths(known)
        self.resized = self._resized()
        self.grown: dict[tuple[int, int], list[str]] = {}
        for name, rows in self.resized.items():
            if _EMBEDDED.search(name):
                self.grown.setdefault(rows, []).append(name)

    def _other_depths(self, known: dict[Location, Tree]) -> list[Moved]:
        """Returns the stacks whose last layers are left out by a rule, or are another checkpoint's."""
        if self.restacked or has_rows_of_first(self.merged):
            return []
        names = {name: m for m in self.merged for name in m.base_names}
        if names.keys() == self.base.entries.keys():
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

    def _resized(self) -> dict[str, tuple[int, int]]:
        """Returns the matrices outside the layers -> (their rows before, their rows now), if these differ."""
        found: dict[str, tuple[int, int]] = {}
        for m in unlike(self.merged):
            name, shape = m.base_names[0], m.spec.shape
            own = (self.base.plain or self.base).entries.get(name)
            if own is None or own.spec.shape == shape or len(own.spec.shape) != 2 or own.spec.shape[:1] == shape[:1]:
                continue
            layer = layer_of(name)
            if layer is None or layer.stack not in self.restacked:
                found[name] = own.spec.shape[0], shape[0]
        return found

    def has_codes(self) -> bool:
        """Whether the first checkpoint has tensors that may be codes."""
        return any(_is_code(name, spec) for name, spec in self.base.specs().items())

    def beside_resized(self) -> list[Tree]:
        """Returns the configurations beside the tensors that those with other rows are made of."""
        found = where(self.merged, lambda name: name in self.resized)
        resized = [m for m in found if m.base_names[0] in self.resized]
        folders = {path.parent for m in resized for source in m.sources for path in source.paths}
        return [tree_of(folder) for folder in sorted(folders, key=str)]

    def unties(self, tree: Tree) -> bool:
        """Whether the output has a head of its own where the configuration makes one of head and embeddings.

        A head of models whose configurations all say the same about it is a copy of the embeddings, which their loaders
        tie again. The flag then stays, since T5 scales its outputs by it.
        """
        if not (self.headless or ties_somewhere(tree)) or not _has_own_head(self.merged):
            return False
        if self.adapted:
            return True
        found = (m for m in where(self.merged, is_head) if is_head(m.spec.name))
        heads = {path.parent for m in found for s in m.sources for path in s.paths}
        return any(tie_flag(tree_of(folder)) is not tie_flag(tree) for folder in heads)

    def keeps(self, rows: int) -> bool:
        """Whether embeddings have and keep this number of rows."""
        grown = {name for names in self.grown.values() for name in names}
        return any(
            m.spec.shape[:1] == (rows,) and is_embedding(m.base_names[0]) and m.base_names[0] not in grown
            for m in where(self.merged, is_embedding)
        )

    def described(self) -> str:
        """Returns what a configuration should say that cannot be read."""
        said = [f"the dtype is {self.dtypes[0].torch_name}"] if self.recast else []
        said += ["the weights are not quantised"] if self.base.quantised else []
        said += [f"{moved.stack} has {len(moved.layers)} layers" for moved in self.moved]
        said += [f"{listed(names)} has {new} rows" for (_, new), names in self.grown.items()]
        said += ["the head is not tied"] if self.headless and _has_own_head(self.merged) else []
        return "; ".join(said)


_EMBEDDED = re.compile(r"emb|wte|wpe|vocab|tok|shared\.weight$|lm_head|output\.weight$|proj_out")


def _unties(index: CheckpointIndex) -> bool:
    """Whether an adapter has made a tensor of its own of a head that its base ties to the embeddings."""
    plain = index.plain
    return plain is not None and any(
        is_head(name) and name not in index.aliases and (name in plain.aliases or name not in plain.entries)
        for name in index.entries
    )


def _edits(config: Config, change: _Change) -> Edits:
    """Returns what one configuration has to say. Raises RecipeError where it cannot tell which layer is of which kind."""
    edits = Edits(config)
    if change.base.quantised:
        edits.dequantise()
    else:
        edits.compare_codes(change.has_codes)
    names = [dtype.torch_name for dtype in change.dtypes]
    if change.recast:
        edits.set_dtype(names[0], len(names) == 1)
    elif names:
        edits.compare_dtype(names)
    for moved in change.moved:
        _follow(edits, moved, change)
    if change.tokenized is not None:
        edits.set_vocabulary(change.tokenized.had, change.tokenized.rows)
        numbers, notes = token_edits(config, change.tokenized)
        edits.values |= numbers
        edits.notes += notes
    else:
        edits.set_rows(change.grown, change.keeps)
    edits.set_labels(change.resized, change.beside_resized())
    if change.unties(config.tree):
        edits.untie()
    return edits


def _follow(edits: Edits, moved: Moved, change: _Change) -> None:
    name = edits.config.name
    followed = follow(edits.tree, moved, name)
    refusal = followed.refusal(name)
    if refusal:
        raise RecipeError(
            f"{refusal}, or end the output's name in .safetensors, which writes the tensors without a configuration"
        )
    edits.values |= followed.edits
    if followed.kinds[0] or moved.stack in change.restacked:
        edits.notes += followed.notes
    if followed.kinds[0]:
        edits.notes += _misplaced(name, moved, followed, change)
    named = re.compile(rf"(^|\.){re.escape(moved.stack.rpartition('.')[2])}\.\d+(\.|$)")
    if any(named.search(text) for text in _texts(edits.tree)):
        edits.notes.append(f"{name} names layers by their numbers, as in its names of modules; these stay")


def _dtypes(specs: Iterable[tuple[TensorSpec, int]]) -> list[DType]:
    """Returns the floating-point dtypes, that of most elements first. ``specs``: each with a number of elements."""
    counted: dict[DType, int] = {}
    for spec, numel in specs:
        counted[spec.dtype] = counted.get(spec.dtype, 0) + numel
    return sorted((dtype for dtype in counted if dtype.kind == "float"), key=lambda dtype: -counted[dtype])


def _is_code(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor may be one of codes, or tell how these are read."""
    return "scale" in name or (spec.numel > 1 and (spec.dtype.kind != "float" or spec.dtype.element_bytes == 1))


def _has_own_head(merged: Sequence[Merged]) -> bool:
    """Whether the output has a head that differs from the embeddings."""
    embeddings, heads = set[tuple[object, ...]](), set[tuple[object, ...]]()
    for m in where(merged, is_embedding):  # a head counts as embeddings too
        if is_embedding(m.spec.name):
            (heads if is_head(m.spec.name) else embeddings).add(tuple(s.place for s in m.sources))
    return bool(embeddings) and not heads <= embeddings


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
    usual = [there.get(number, frozenset[str]()) for number in range(moved.before)]
    for place in range(len(moved.layers)):
        if place >= len(usual):
            usual.append(usual[place - _period(usual)])
        expected = usual[place]
        own, number = now.get(place, frozenset()), moved.layers[place][1]
        for names, has in ((expected - own, "has no"), (own - expected, "has")):
            odd = sorted(each for each in names if not why_ignored(each, ()))
            if odd and expected:
                return [
                    f"layer {place} of {printable(moved.stack)}, which was layer {number}, {has} {listed(odd, 2)}, unlike "
                    f"what a loader may expect there: {name} does not tell"
                ]
    return []


def _period(kinds: Sequence[Any]) -> int:
    """Returns after how many layers the kinds of the later half repeat; the number of layers if they do not."""
    half = len(kinds) // 2
    periods = (p for p in range(1, half + 1) if all(kinds[n] == kinds[n - p] for n in range(half, len(kinds))))
    return next(periods, len(kinds))


def _held(names: Iterable[str], stack: str) -> dict[int, frozenset[str]]:
    """Returns the number of each layer of a stack -> what its tensors are called in it."""
    found: dict[int, list[str]] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None and layer.stack == stack:
            found.setdefault(layer.number, []).append(layer.rest)
    return {number: frozenset(each) for number, each in found.items()}
