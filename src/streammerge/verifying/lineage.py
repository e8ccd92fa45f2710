"""The tree of a merge of merges, from the receipts of the output and of its inputs.

A receipt names the inputs of one merge. An input that is itself an output has a receipt of its own, if it still lies where
it was. So the tree goes as deep as the outputs are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.checkpoints.index import open_checkpoint
from streammerge.errors import StreammergeError, VerifyError, printable
from streammerge.planning.receipt import Receipt, input_files
from streammerge.recipe.adapted import parts_of
from streammerge.recipe.locations import lies_within
from streammerge.running.readback import receipt_of
from streammerge.stores.base import Location
from streammerge.stores.digests import digest_outside
from streammerge.stores.locations import HERE, parse

_DEEPEST = 50
_PARTS = ("models", "sources", "slices", "experts", "shared_experts")
_TOLD = ("weight", "t", "density", "lambda", "rank")
"""The parameters that a line of the tree tells."""


@dataclass(frozen=True, slots=True, repr=False)
class Lineage:
    """One checkpoint in the tree. Printing it shows the tree below it.

    ``name``: as the merge that read it named it. ``role``: what it is to that merge: its weight, ``base``, an expert.
    ``method``: how it was merged, None if it has no receipt. ``inputs``: what it was merged from. ``note``: why the tree
    ends here, "" for a checkpoint that is no output.
    """

    name: str
    role: str = ""
    method: str | None = None
    inputs: tuple[Lineage, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        return "\n".join(self._lines("", ""))

    def __repr__(self) -> str:
        return f"<Lineage {printable(self.name)}: {self.method or 'no merge'}, {len(self.inputs)} inputs>"

    def _lines(self, first: str, below: str) -> Iterator[str]:
        said = [printable(self.name), *([f"({printable(self.role)})"] if self.role else [])]
        said += [f"= {printable(self.method)}"] if self.method else []
        said += [f"[{self.note}]"] if self.note else []
        yield first + "  ".join(said)
        for number, each in enumerate(self.inputs, 1):
            last = number == len(self.inputs)
            yield from each._lines(below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    def to_json(self) -> dict[str, Any]:
        """Returns the data of ``inspect --lineage --format json``."""
        made: dict[str, Any] = {"name": self.name, "role": self.role, "method": self.method}
        return made | {"inputs": [each.to_json() for each in self.inputs], "note": self.note}


def lineage(out: Location) -> Lineage:
    """Returns the tree of a checkpoint. Raises RecipeError if it does not exist, VerifyError if its receipt is damaged."""
    try:
        receipt = receipt_of(out)
    except VerifyError as error:
        if not _has_none(error):
            raise
        return Lineage(str(out), note="no receipt: streammerge did not make it")
    return _made(str(out), "", out, receipt, ())


def _made(name: str, role: str, place: Location, receipt: Receipt, above: tuple[Location, ...]) -> Lineage:
    """Returns the tree of an output whose receipt was read. ``above``: the outputs that it is an input of."""
    folders = [place.parent, HERE]
    tree = _Tree(receipt, folders, (*above, place.absolute()))
    return Lineage(name, role, _method(receipt.recipe), tuple(tree.models(receipt.recipe, {})))


@dataclass(frozen=True, slots=True)
class _Tree:
    receipt: Receipt
    folders: list[Location]
    above: tuple[Location, ...]

    def models(self, recipe: Mapping[str, Any], stages: Mapping[str, Any]) -> Iterator[Lineage]:
        """Yields each model of a recipe once, the stages among them with their own models."""
        known = {**stages, **_dict(recipe.get("stages"))}
        for name, role in _models(recipe):
            if name in known:
                stage = known.pop(name)  # so that a stage that names itself ends
                yield Lineage(name, role, _method(stage), tuple(self.models(stage, known)))
                continue
            base, *adapters = parts_of(name)
            yield self._input(base, role)
            for adapter in adapters:
                yield self._input(adapter, "adapter")

    def _input(self, name: str, role: str) -> Lineage:
        if name in self.receipt.held:
            return Lineage(name, role, note="was in memory")
        changed = False
        for place in self._places(name):
            try:
                if not place.exists():
                    continue
                if not self._is_same(name, place):
                    changed = True
                    continue
                if place.absolute() in self.above or len(self.above) > _DEEPEST:
                    return Lineage(name, role, note="its receipt names itself")
                return _made(name, role, place, receipt_of(place), self.above)
            except VerifyError as error:
                return Lineage(name, role, note="" if _has_none(error) else "its receipt is damaged")
            except (StreammergeError, OSError):
                continue
        return Lineage(name, role, note="is not the file that was merged" if changed else "is not here")

    def _places(self, name: str) -> Iterator[Location]:
        """Yields where an input may lie: beside the output and here. A receipt may come from a stranger, who names no other
        places of this machine."""
        try:
            if lies_within(name, self.folders):
                yield from (parse(name, folder) for folder in self.folders)
        except VerifyError:  # an absolute path
            return

    def _is_same(self, name: str, place: Location) -> bool:
        """Whether the files at a place are those that were merged, by their sizes and all bytes outside the tensors."""
        found = input_files({name.rstrip("/"): open_checkpoint(str(place))})
        return all(
            (was := self.receipt.inputs.get(file)) is not None
            and path.size == was["bytes"]
            and digest_outside(path, spans) == was.get("header_sha256")
            for file, (path, spans) in found.items()
        )


def _models(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, role) of the models that a recipe names, each once: the models, then the base, then those of rules."""
    roles: dict[str, str] = {}
    for entry in _entries(recipe):
        name = entry.get("model", entry.get("source_model"))
        if isinstance(name, str):
            roles.setdefault(name, "expert" if "source_model" in entry else _told(_dict(entry.get("parameters"))))
    base = recipe.get("base_model")
    if isinstance(base, str):
        roles[base] = "base" if not roles.get(base) else f"{roles[base]}, base"
    for rule in _list(recipe.get("rules")):
        if isinstance(copied := _dict(rule).get("copy"), str):
            roles.setdefault(copied, "some tensors")
    yield from roles.items()


def _entries(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in _PARTS:
        for entry in _list(part.get(key)):
            if isinstance(entry, Mapping):
                yield entry
                yield from _entries(entry)
    for module in _dict(part.get("modules")).values():
        yield from _entries(_dict(module))


def _method(recipe: Any) -> str:
    """Returns how a recipe merges, in a few words."""
    data = _dict(recipe)
    method = data.get("merge_method", "experts" if "experts" in data else "conversion")
    given = {key: value for key, value in _dict(data.get("parameters")).items() if key != "weight"}
    told = _told({**given, **({"rank": data["rank"]} if data.get("rank") is not None else {})})
    return f"{method}, {told}" if told else str(method)


def _told(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {parameters[key]}" for key in _TOLD if key in parameters)


def _has_none(error: VerifyError) -> bool:
    return "has no receipt" in str(error)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
