"""The plan of an adapter that is made: what a merge of adapters, or an extraction, will do. No tensor is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from streammerge.errors import printable
from streammerge.factoring.documents import WEIGHTS
from streammerge.factoring.layers import Layer
from streammerge.factoring.making import Making, refuse_output
from streammerge.recipe.model import Recipe
from streammerge.stores.base import Location
from streammerge.units import binary_bytes, counted, decimal_bytes


@dataclass(frozen=True, slots=True, repr=False)
class AdapterPlan:
    """The plan of an adapter that is made. ``write_bytes`` is the most that it has, since ranks follow from the numbers.
    ``workers``: as many as the budget holds. ``warnings``: also about what stands in the output's way."""

    making: Making
    recipe: Recipe
    out: Location | None
    memory_bytes: int
    workers: int
    warnings: list[str]

    @classmethod
    def of(cls, making: Making, recipe: Recipe, out: Location | None, memory_bytes: int, workers: int) -> AdapterPlan:
        """Raises BudgetError, and RecipeError or FormatError for an output that cannot be made there."""
        if out is not None:
            refuse_output(making, out)
        return cls(making, recipe, out, memory_bytes, making.workers_within(memory_bytes, workers), [*making.warnings])

    @property
    def tasks(self) -> list[Layer]:
        """The tensors that get factors."""
        return self.making.layers

    @property
    def notes(self) -> list[str]:
        return self.making.notes

    @property
    def read_bytes(self) -> int:
        return self.making.read_bytes

    @property
    def write_bytes(self) -> int:
        return self.making.most_bytes

    @property
    def peak_bytes(self) -> int:
        """Projected memory above the start-up footprint."""
        return self.making.needed_bytes(self.workers)

    def counts(self) -> dict[str, int]:
        """Returns the number of tensors that are made in each way."""
        return dict(Counter(layer.way for layer in self.tasks).most_common())

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as data for JSON."""
        return {
            "inputs": list(self.recipe.inputs),
            "out": None if self.out is None else str(self.out),
            "method": self.recipe.merge_method.name,
            "recipe": self.recipe.to_dict(),
            "tensors": self.counts(),
            "files": [{"name": self._file, "bytes": self.write_bytes}],
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_bytes": self.peak_bytes,
            "memory_bytes": self.memory_bytes,
            "workers": self.workers,
            "notes": self.notes,
            "warnings": self.warnings,
            "tasks": [
                {"tensor": each.name, "shape": list(each.shape), "way": each.way, "most_bytes": each.most_bytes()}
                for each in self.tasks
            ],
        }

    @property
    def _form(self) -> str:
        return "in PEFT's form" if self.making.file is None else f"in one file, like {self.making.file.first.where}"

    @property
    def _file(self) -> str:
        """The name of the file of tensors; "" if it is not known yet."""
        return WEIGHTS if self.making.file is None else self.out.name if self.out else ""

    def __repr__(self) -> str:
        return f"<AdapterPlan: {counted(len(self.tasks), 'tensor')}, {decimal_bytes(self.read_bytes)} to read>"

    def __str__(self) -> str:
        made = ", ".join(f"{count} by {_WORDS[way]}" for way, count in self.counts().items())
        shown = ", ".join(map(printable, self.recipe.inputs))
        base = self.recipe.base_model
        lines = [
            f"adapters {shown}" if base is None else f"model    {shown}, trained from {printable(base)}",
            f"method   {self.recipe.merge_method.name}",
            f"tensors  {len(self.tasks)}: {made}",
            f"output   an adapter {self._form}, at most {decimal_bytes(self.write_bytes)}",
            f"read     {decimal_bytes(self.read_bytes)} from {len(self.making.files)} files",
            f"memory   {binary_bytes(self.peak_bytes)} projected of {binary_bytes(self.memory_bytes)}, above start-up "
            f"({self.workers} workers)",
        ]
        lines += [f"note     {note}" for note in self.notes]
        lines += [f"warning  {warning}" for warning in self.warnings]
        return "\n".join(lines)


_WORDS = {
    "stack": "stacking the factors",
    "recompress": "cutting the stacked factors to a rank",
    "decompose": "decomposing the update",
    "compare": "comparison",
}
