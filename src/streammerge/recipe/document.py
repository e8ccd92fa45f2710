"""The YAML text of a recipe, with the place of each key; and a recipe written as text.

YAML is read as in mergekit (1.1: ``no`` is false, ``1e-1`` is a text). Anchors are followed up to a limit.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge.errors import RecipeError, printable
from streammerge.recipe.fields import Path, Position

if TYPE_CHECKING:
    import yaml

_MOST_CHARACTERS = 16 << 20
_MOST_NODES = 200_000
_DEEPEST = 40


class Document(NamedTuple):
    """Plain data, and the place of every key by its path. ``doubled``: keys that occur twice."""

    data: Any
    positions: dict[Path, Position]
    doubled: list[Path]

    @property
    def begin(self) -> Position:
        return self.positions[()]


def parse_yaml(text: str, name: str) -> Document:
    """Parses a text with one document. Raises RecipeError, with the line, if it is not YAML."""
    documents = parse_documents(text, name)
    if len(documents) > 1:
        second = Position(printable(name), documents[1].begin.line, 1)
        raise RecipeError(f"{second}several documents in one file; one is expected here")
    return documents[0]


def parse_documents(text: str, name: str) -> list[Document]:
    """Parses a text with one or more documents. Raises RecipeError, with the line, if it is not YAML."""
    import yaml  # here, since only recipes need it

    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(f"{printable(name)} has {len(text)} characters, beyond the limit of {_MOST_CHARACTERS}")
    try:
        # Not the C parser, which recurses without a limit. This one raises RecursionError.
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Position(printable(name), mark.line + 1, mark.column + 1) if mark else f"{printable(name)}: "
        raise RecipeError(f"{where}this is not YAML ({printable(error.problem or error.context)})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{printable(name)}: this is not YAML ({printable(error)})") from error
    nodes = [node for node in nodes if node is not None]
    if not nodes:
        raise RecipeError(f"{printable(name)} is empty; a recipe needs at least merge_method and models")
    return [_Reader(printable(name)).document(node) for node in nodes]


class _Reader:
    def __init__(self, name: str) -> None:
        import yaml

        self.yaml = yaml
        self.name, self.left = name, _MOST_NODES
        self.positions: dict[Path, Position] = {}
        self.doubled: list[Path] = []
        self.scalars = yaml.SafeLoader("")

    def document(self, node: yaml.Node) -> Document:
        self._mark((), node)
        return Document(self._data(node, ()), self.positions, self.doubled)

    def _mark(self, path: Path, node: yaml.Node) -> None:
        self.positions[path] = self._position(node)

    def _position(self, node: yaml.Node) -> Position:
        return Position(self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def _data(self, node: yaml.Node, path: Path) -> Any:
        self.left -= 1
        if self.left < 0 or len(path) > _DEEPEST:
            raise RecipeError(f"{self.positions[path[:1]]}this is nested or repeated too much")
        if isinstance(node, self.yaml.MappingNode):
            made: dict[Any, Any] = {}
            self._take(node, path, made, own=True)
            return made
        if isinstance(node, self.yaml.SequenceNode):
            items = []
            for number, item in enumerate(node.value):
                self._mark((*path, number), item)
                items.append(self._data(item, (*path, number)))
            return items
        return self._scalar(node)

    def _take(self, node: yaml.Node, path: Path, made: dict[Any, Any], own: bool) -> None:
        """Takes the pairs of a mapping, then those that ``<<`` merges into it. The mapping's own pairs win."""
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged += value_node.value if isinstance(value_node, self.yaml.SequenceNode) else [value_node]
                continue
            key = self._scalar(key_node) if isinstance(key_node, self.yaml.ScalarNode) else "(a list or mapping)"
            below = (*path, key)
            if key not in made:
                self._mark(below, key_node)
                made[key] = self._data(value_node, below)
            elif own:
                self.doubled.append(below)
                self._mark(below, key_node)
        for each in merged:
            self.left -= 1
            if not isinstance(each, self.yaml.MappingNode):
                raise RecipeError(f"{self._position(each)}<< takes a mapping, or a list of mappings")
            if self.left < 0 or len(path) > _DEEPEST:
                raise RecipeError(f"{self._position(each)}this is nested or repeated too much")
            self._take(each, path, made, own=False)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self._plain(self.scalars.construct_object(node))
        except (self.yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise RecipeError(
                f"{self._position(node)}{printable(node.value, 40)} is not a value that a recipe can have"
            ) from error

    @staticmethod
    def _plain(value: Any) -> Any:
        if isinstance(value, dict | list | set):
            raise ValueError("a tag makes a collection of a text")  # noqa: TRY004 - one class for every invalid value
        return value


def to_yaml(data: Any) -> str:
    """Returns the data as YAML, with lists of plain values in one line and without anchors."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
            return True

        def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:  # noqa: ARG002
            plain = all(not isinstance(item, dict | list) for item in sequence)
            return super().represent_sequence(tag, sequence, flow_style=plain)

    return yaml.dump(json.loads(to_json(data)), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_json(data: Any) -> str:
    """Returns the data as one line of JSON, which is also YAML. Values that JSON cannot hold are written as text."""
    return json.dumps(data, ensure_ascii=False, default=str)
