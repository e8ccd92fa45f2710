"""A plan as data, which other machines can follow: what to merge, where to, and the units of the work.

It holds no tasks. A machine makes the plan again from the recipe and the headers of the inputs, and compares its identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from streammerge.errors import ChangedError, FormatError, RecipeError, printable
from streammerge.planning.digest import can_be_resumed, differences, plan_parts
from streammerge.planning.plan import Plan
from streammerge.planning.units import Unit, cut
from streammerge.stores.base import Location
from streammerge.stores.locations import HERE, parse
from streammerge.strict_json import load_json

_FORM = 1
_KEY = "streammerge_plan"
LEASE_SECONDS = 30.0
_MOST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """What machines need to know of a plan.

    ``identity``: see :func:`streammerge.planning.digest.plan_parts`. ``folder``: the paths in the recipe are relative to
    it. ``out``: the output, with a slash behind the name of a folder. ``memory``, ``workers``, ``io`` and ``executor``: of
    each machine, unless it says otherwise. ``lease_seconds``: after this time without a sign of life, a machine's units are
    given to others.
    """

    identity: dict[str, Any]
    recipe: dict[str, Any]
    folder: str
    out: str
    hashed: bool
    memory: int
    workers: int | None
    io: str
    executor: str
    lease_seconds: float
    units: list[list[int]]

    @property
    def key(self) -> str:
        """Tells the work of this plan from that of another. Equal for two plans with equal units of equal bytes."""
        said = json.dumps([self.identity["digest"], self.units])
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    def all_units(self) -> list[Unit]:
        return [Unit.of_row(number, row) for number, row in enumerate(self.units)]

    def text(self) -> str:
        """Returns the plan as JSON, with a digest of itself."""
        said = asdict(self)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**said, "digest": _digest(said)}.items()]
        return f"{{{json.dumps(_KEY)}: {_FORM},\n" + ",\n".join(lines) + "}\n"

    def check_same(self, plan: Plan) -> None:
        """Raises ChangedError if the plan that was made again differs."""
        said = differences(self.identity, plan_parts(plan))
        if said:
            raise ChangedError(f"the saved plan does not fit any more: {said}; save a new one")


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def saved(plan: Plan, workers: int | None, executor: str, hashed: bool, before: SavedPlan | None = None) -> SavedPlan:
    """Returns a plan as data. Raises RecipeError for a plan that other machines cannot follow.

    ``before``: what this plan was made again from; its recipe and paths are kept.
    """
    if plan.out is None:
        raise RecipeError("a plan that is saved needs a name for its output; pass `out`")
    if any(source.held for source in plan.expressions):
        raise RecipeError("tensors in the memory of this process cannot be read by others; save a plan of files")
    if not can_be_resumed(plan):
        raise RecipeError("a plan with a merge method of one's own cannot be saved; merge on one machine")
    places = [plan.out, *plan.identities]
    alone = next((place for place in places if place.store.one_process), None)
    if alone is not None:
        raise RecipeError(f"the store {alone.store.scheme}:// belongs to this process; save a plan of files")
    out = str(plan.out.absolute()).rstrip("/") + "/" * plan.layout.as_folder
    joint = plan.out.join(_KEY)  # raises an error for a store that several machines cannot write to
    if joint.whole_files and hashed:
        raise RecipeError("workers do not hash inputs for an output in an object store; leave `hash` out")
    units = [unit.row() for unit in cut(plan.tasks, joint.whole_files, joint.shares_files)]
    if before is not None:
        return replace(before, identity=plan_parts(plan), units=units)
    more = (plan.memory_bytes, workers, plan.io, executor, LEASE_SECONDS, units)
    return SavedPlan(plan_parts(plan), plan.recipe.to_dict(), str(HERE.absolute()), out, hashed, *more)


def read_saved(place: Location) -> SavedPlan:
    """Reads a saved plan. Raises RecipeError if there is none, FormatError if it is damaged or of another version."""
    if not place.is_file():
        raise RecipeError(f"{printable(place)} is not a file; a plan with `save` makes one")
    size = place.size
    if size > _MOST_BYTES:
        raise FormatError(f"{printable(place)} has {size} bytes, too many for a plan")
    try:
        data = load_json(place.read(0, size).decode())
    except ValueError as error:
        raise FormatError(f"{printable(place)} is no saved plan ({printable(error)}); save it again") from error
    if not isinstance(data, dict) or _KEY not in data:
        raise FormatError(f"{printable(place)} is no saved plan; a plan with `save` makes one")
    if data.pop(_KEY) != _FORM:
        raise FormatError(f"{printable(place)} was saved by another version of streammerge; save it again")
    digest = data.pop("digest", "")
    if _digest(data) != digest:
        raise FormatError(f"{printable(place)} was changed after it was saved; save it again")
    return SavedPlan(**data)


def output_of(plan: SavedPlan) -> Location:
    return parse(plan.out)
