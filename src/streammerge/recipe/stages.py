"""Merges that are models of other merges: *stages*. They come as ``stages`` of a recipe, as a recipe in place of a model,
or as named documents of one file, as ``mergekit-multi`` takes them. All become entries of ``stages``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streammerge.errors import RecipeError, listed, printable
from streammerge.recipe.adapted import parts_of
from streammerge.recipe.document import Document
from streammerge.recipe.fields import Path, Position, Problems
from streammerge.recipe.model import Recipe
from streammerge.recipe.stage_names import STAGE_NAME, stage_of

_MODEL_KEYS = ("model", "base_model", "copy")
_LIST_KEYS = ("models", "sources")
_METHOD = "merge_method"
_EXPERTS = "experts"
_MIXTURE = "mixture"
"""What a mixture of experts is called that is the output itself."""


def gathered(documents: Sequence[Document], problems: Problems) -> Document:
    """Returns one document: the merge that is the output, with all others among its ``stages``.

    Of several documents the output is the one without a name; if all have one, the one that no other names.
    """
    gatherer = _Gatherer(problems)
    final = documents[0]
    if len(documents) > 1:
        final = _output_of(documents)
        for each in documents:
            if each is not final:
                gatherer.add_document(each)
    return gatherer.whole(final)


def _output_of(documents: Sequence[Document]) -> Document:
    """Returns the document that is the output. Raises RecipeError if none or several could be."""
    unnamed = [each for each in documents if not isinstance(each.data, Mapping) or each.data.get("name") is None]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{unnamed[1].begin}two documents have no name; only the one that is the output may have none; name the others"
        )
    if unnamed:
        return unnamed[0]
    named = {text for each in documents for text in _texts(each.data, top=True)}
    free = [each for each in documents if str(each.data["name"]) not in named]
    if len(free) == 1:
        return free[0]
    raise RecipeError(
        f"{documents[-1].begin}all documents have a name, and it is not clear which is the output; leave the name of that "
        "one out"
    )


def _texts(node: Any, top: bool = False) -> Iterator[str]:
    """Yields the texts in a document, and the models in those with adapters; at the top not its own name."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if not (top and name == "name"):
                yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node
        yield node.partition("+")[0].strip()


class _Gatherer:
    """Collects stages by name, with the place of each of their keys."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.stages: dict[str, Any] = {}
        self.positions: dict[Path, Position] = {}
        self.doubled: list[Path] = []

    def whole(self, document: Document) -> Document:
        """Returns the output's document with all stages."""
        if isinstance(document.data, Mapping) and _EXPERTS in document.data and _METHOD not in document.data:
            return self._mixture(document)
        self._take(document, (), ())
        data = self._cleared(document.data, (), "")
        if not self.stages:
            return document
        return Document({**data, "stages": self.stages}, self.positions, self.doubled)

    def _mixture(self, document: Document) -> Document:
        """Returns the document whose output is a mixture of experts: a copy of a stage."""
        place: Path = ("stages", _MIXTURE)
        self._take(document, (), place)
        self.positions[()] = document.positions.get((), Position("", 1, 1))
        self._add(_MIXTURE, document.data, place)
        return Document({_METHOD: "passthrough", "models": [_MIXTURE], "stages": self.stages}, self.positions, self.doubled)

    def add_document(self, document: Document) -> None:
        """Adds a named document. Its data become a stage without its name."""
        data = document.data
        name = str(data["name"])
        place: Path = ("stages", name)
        if name in self.stages:
            raise RecipeError(f"{document.positions[('name',)]}a second document has the name {printable(name)}")
        self._take(document, (), place)
        self._add(name, {key: value for key, value in data.items() if key != "name"}, place, ("name",))

    def _take(self, document: Document, old: Path, new: Path) -> None:
        """Takes the places of all keys below ``old``, as places below ``new``."""
        count = len(old)
        for path, position in document.positions.items():
            if path[:count] == old:
                self.positions[new + path[count:]] = position
        self.doubled += [new + path[count:] for path in document.doubled if path[:count] == old]

    def _add(self, name: str, data: Any, place: Path, key: Path = ()) -> None:
        if re.fullmatch(STAGE_NAME, name) is None:
            self.problems.add((*place, *key), f"{printable(name)} cannot be a stage's name; use letters, digits, - and _")
        self.stages[name] = None  # keeps its place before the stages that it holds
        self.stages[name] = self._cleared(data, place, name)

    def _cleared(self, data: Any, place: Path, name: str) -> Any:
        """Returns a recipe without the stages in it, which are added. ``name``: its own."""
        if not isinstance(data, Mapping):
            return data
        made = dict(data)
        if _EXPERTS in made and _METHOD not in made:
            made[_METHOD] = "passthrough"  # what no merge computes is copied
        inner = made.pop("stages", None)
        if isinstance(inner, Mapping):
            for each, value in inner.items():
                self._move((*place, "stages", each), str(each), value)
        elif inner is not None:
            made["stages"] = inner  # reading it reports what is wrong
        return {key: self._without(value, (*place, key), name, key) for key, value in made.items()}

    def _move(self, old: Path, name: str, value: Any) -> None:
        new: Path = ("stages", name)
        if name in self.stages:
            self.problems.add(old, f"a second stage has the name {printable(name)}")
            return
        if old != new:
            for path in [path for path in self.positions if path[: len(old)] == old]:
                self.positions[new + path[len(old) :]] = self.positions[path]
            self.doubled += [new + path[len(old) :] for path in self.doubled if path[: len(old)] == old]
        self._add(name, value, new)

    def _without(self, node: Any, path: Path, above: str, key: Any) -> Any:
        """Returns a part of a recipe with the names of stages in place of recipes."""
        if isinstance(node, Mapping):
            if key in _MODEL_KEYS and _METHOD in node:
                return self._inline(node, path, above)
            return {name: self._without(value, (*path, name), above, name) for name, value in node.items()}
        if isinstance(node, list):
            return [self._item(value, (*path, number), above, key) for number, value in enumerate(node)]
        return node

    def _item(self, node: Any, path: Path, above: str, key: Any) -> Any:
        if key in _LIST_KEYS and isinstance(node, Mapping) and _METHOD in node and "model" not in node:
            return {"model": self._inline(node, path, above)}
        return self._without(node, path, above, None)

    def _inline(self, node: Mapping[Any, Any], path: Path, above: str) -> str:
        """Adds a recipe that stands in place of a model. Returns the name that it gets from its place."""
        inside = path[2:] if above else path
        base = ".".join(str(part) for part in ((above,) if above else ()) + inside if part not in _MODEL_KEYS[:1])
        if name_of := node.get("name"):
            base, node = str(name_of), {key: value for key, value in node.items() if key != "name"}
        name = base
        while name in self.stages:
            name += "'"
        self._move(path, name, node)
        return name


class _Circle(Exception):
    """Stages that need each other. ``names``: from one back to itself."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names


def stages_used(recipe: Recipe) -> list[str]:
    """Returns the stages that a checked recipe needs, each behind those that it needs itself."""
    return _in_order(recipe, needed(recipe))


def _in_order(recipe: Recipe, wanted: Sequence[str]) -> list[str]:
    found: list[str] = []
    above: list[str] = []

    def visit(name: str) -> None:
        if name in above:
            raise _Circle([*above[above.index(name) :], name])
        if name not in found:
            above.append(name)
            for each in needed(recipe.stages[name]):
                visit(each)
            above.pop()
            found.append(name)

    for name in wanted:
        visit(name)
    return found


def needed(recipe: Recipe) -> list[str]:
    """Returns the stages that are models of a recipe."""
    named = (stage_of(part) for text in recipe.own_models for part in parts_of(text)[:1])
    return list(dict.fromkeys(name for name in named if name is not None))


def check_stages(recipe: Recipe, problems: Problems) -> None:
    """Adds circles of stages to the problems, and a warning about stages that nothing needs."""
    try:
        _in_order(recipe, list(recipe.stages))
    except _Circle as circle:
        shown = " -> ".join(map(printable, circle.names))
        problems.add(("stages", circle.names[0]), f"stages need each other in a circle: {shown}")
        return
    used = stages_used(recipe)
    if unused := [name for name in recipe.stages if name not in used]:
        problems.warn(("stages", unused[0]), f"nothing needs the stages {listed(unused)}, so they are not computed")
