"""What an adapter that is made records about itself, and what identifies the run that makes it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from streammerge.adapters.config import CONFIG
from streammerge.adapters.modules import Adapter
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.factoring.layers import Layer, LayerReport
from streammerge.formats.records import CARD_FILE, RECEIPT_FILE, RECIPE_FILE
from streammerge.planning.outputs.card import card_text
from streammerge.planning.outputs.container import named_origins
from streammerge.planning.receipt import ITSELF, InputSpans, Receipt, files_beside, input_files, planned
from streammerge.recipe.document import to_json, to_yaml
from streammerge.recipe.locations import travelling, travelling_names
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location, Status
from streammerge.stores.checksums import CRC32C
from streammerge.version import __version__

SUM = CRC32C
"""The checksum of the outputs."""
_FORM = "adapter 1"
_NUMBERS = struct.Struct("<qdd")


@dataclass(frozen=True, slots=True)
class Record:
    """The recipe of an adapter, its inputs by their names in the receipt, and the receipt without checksums.

    ``card``: the model card, "" for none.
    """

    recipe: Recipe
    inputs: dict[str, InputSpans]
    receipt: Receipt
    card: str = ""

    @classmethod
    def of(cls, recipe: Recipe, adapters: Sequence[Adapter], card: bool = True) -> Record:
        """The record of an adapter from adapters. Reads the headers of the inputs. ``card``: whether it may have one."""
        names = travelling_names(recipe)
        called = {names[each.model]: adapter.index for each, adapter in zip(recipe.models, adapters, strict=True)}
        content, inputs, receipt = _planned(recipe, called)
        text = card_text(content, None, called, "peft") if card and recipe.output.card else ""
        return cls(recipe, inputs, receipt, text)

    @classmethod
    def of_difference(cls, recipe: Recipe, models: Mapping[str, CheckpointIndex]) -> Record:
        """The record of an adapter that is extracted. ``models``: the models by their names in the recipe, each maybe with
        adapters. Reads their headers. It is no merge, so it has no model card."""
        _, inputs, receipt = _planned(recipe, named_origins(travelling_names(recipe), models))
        return cls(recipe, inputs, receipt)

    def files(self, sums: Mapping[str, Sequence[int]], layers: Sequence[LayerReport]) -> dict[str, bytes]:
        """Returns the files that tell how the adapter was made. ``sums``: name of each other file -> its checksums, as in
        a receipt. ``layers``: how well the factors represent each tensor."""
        recipe = to_yaml(self.receipt.recipe).encode()
        files = {RECIPE_FILE: recipe} | ({CARD_FILE: self.card.encode()} if self.card else {})
        every = {**sums, **{name: [SUM.update(data)] for name, data in files.items()}}
        blank = self._blank({name: len(every[name]) for name in sorted(every)}, layers)
        return {**files, RECEIPT_FILE: blank.filled(every, {}).text(2).encode()}

    def blank(self, count: int, layers: Sequence[LayerReport]) -> Receipt:
        """Returns the receipt of an adapter that is one file, without its checksums. ``count``: how many it has."""
        return self._blank({ITSELF: count}, layers)

    def _blank(self, counts: Mapping[str, int], layers: Sequence[LayerReport]) -> Receipt:
        checksums = {name: "0" * 8 * count for name, count in counts.items()}
        return replace(self.receipt, checksums=checksums, layers=[each.record() for each in layers])


def _planned(
    recipe: Recipe, called: Mapping[str, CheckpointIndex]
) -> tuple[dict[str, Any], dict[str, InputSpans], Receipt]:
    """Returns the recipe as it travels, the inputs, and the receipt. ``called``: the inputs by their names in it."""
    inputs = input_files(called)
    places = {name: index.path for name, index in called.items() if not index.in_memory}
    folders = [path if path.is_folder() else path.parent for path in places.values()]
    inputs |= files_beside(places, [folder / CONFIG for folder in folders if (folder / CONFIG).is_file()])
    content = json.loads(to_json(travelling(recipe).to_dict()))
    held = {name: index.nbytes for name, index in called.items() if index.in_memory}
    return content, inputs, planned(content, inputs, recipe.seed, SUM, False, True, held)


def identity(layers: Sequence[Layer], files: Mapping[Location, Status], record: Record | None) -> dict[str, Any]:
    """Returns what identifies a run, as plain data. Runs with equal ones make equal factors.

    It has the parts of :func:`streammerge.planning.digest.plan_parts`, so that the same words tell their differences.
    """
    import hashlib

    names = {path: name for name, (path, _) in record.inputs.items()} if record else {}
    states = {names.get(path, str(path)): (known.size, known.version) for path, known in files.items()}
    recipe = record.receipt.recipe if record else {}
    said: list[Any] = [(_FORM, __version__), sorted(states.items()), recipe]
    said += [(each.name, each.shape, each.way, repr(each.wanted), each.form, each.alpha, each.keys) for each in layers]
    said += [[source.place for source in each.sources] for each in layers]

    def digest(value: Any) -> str:
        text = json.dumps(
            value, default=lambda each: names.get(each, str(each)) if isinstance(each, Location) else str(each)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    versions = record.receipt.versions if record else {}
    return {
        "form": _FORM,
        "versions": {**versions, "streammerge": __version__},
        "hashed": False,
        "inputs": {name: digest(state)[:16] for name, state in states.items()},
        "recipe": {key: digest(value)[:16] for key, value in recipe.items()},
        "digest": digest(said),
    }


class Numbers(NamedTuple):
    """What is known of a layer beside its factors: their rank, the squared norm of the update, and that of what the factors
    lack. They stand behind the factors in the layer's temporary file."""

    rank: int
    total: float
    rest: float

    def packed(self) -> bytes:
        return _NUMBERS.pack(*self)

    @classmethod
    def behind(cls, data: bytes) -> Numbers:
        """Reads the end of a temporary file."""
        return cls(*_NUMBERS.unpack(data))


NUMBERS_BYTES = _NUMBERS.size
