"""From a recipe to a plan: opens the checkpoints, and looks at the place of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from streammerge.checkpoints.agreement import agreed
from streammerge.checkpoints.index import CheckpointIndex
from streammerge.errors import RecipeError
from streammerge.methods.factors import FACTORS, without_adapters
from streammerge.options.resources import Resources
from streammerge.planning.plan import Plan, build_plan
from streammerge.recipe.model import Recipe, Reference
from streammerge.recipe.stage_names import stage_text
from streammerge.requests.inputs import Held, opened
from streammerge.running.choosing import choose_executor, default_workers
from streammerge.running.executors.base import Executors
from streammerge.running.process import collector_paused
from streammerge.sources.base import Source
from streammerge.stores.base import Location
from streammerge.units import decimal_bytes, parse_bytes

if TYPE_CHECKING:
    from streammerge.planning.stages import Opened

OnOpened = Callable[[Sequence[Mapping[str, Source]]], object]
_LONG_BYTES = 1 << 30
"""An output of so many bytes is worth a word about interruptions."""


def unheard(checkpoints: Sequence[Mapping[str, Source]]) -> None:
    """Is told of the checkpoints that are open, and does nothing."""


def planned(
    recipe: Recipe,
    out: Location | None,
    resources: Resources,
    executor: str | Executors,
    convert_first: Location | None = None,
    hashed: bool = False,
    held: Held | None = None,
    like: bool = False,
    on_opened: OnOpened = unheard,
) -> Plan:
    """Returns the plan of a recipe. Reads headers only.

    ``convert_first``: a folder of converted inputs, which are read where they are current. ``hashed``: whether the receipt
    gets the SHA-256 of each input. ``held``: the state dicts in memory. ``like``: whether the first checkpoint gets the
    tensors of the second. ``on_opened`` is called with the tensors of the checkpoints when their headers are read.
    Raises the errors of :func:`streammerge.plan`.
    """
    if FACTORS.get(recipe.merge_method.name) is recipe.merge_method:
        raise RecipeError(without_adapters(recipe.merge_method.name))
    if held and convert_first is not None:
        raise RecipeError("`convert_first` converts files; give state dicts in memory without it")
    with collector_paused():
        stages = _opened_stages(recipe, held or {}, convert_first, on_opened) if recipe.stages else {}
        indexes = _indexes(recipe, held or {}, convert_first, stages, on_opened)
        told = _likeness(recipe, indexes) if like else []
        made = build_plan(
            recipe,
            indexes,
            out,
            memory_bytes=parse_bytes(resources.memory),
            workers=resources.workers or default_workers(),
            io=resources.io,
            hashed=hashed,
        )
    made.notes += told
    if out is not None and not out.store.resumes and made.write_bytes >= _LONG_BYTES:
        made.notes.append(
            f"a run into {out.store.scheme}:// that is interrupted begins anew, since the store's client cannot go on with "
            "an upload; runs into s3:// or onto a disk go on"
        )
    choose_executor(made, executor)
    return made


def _opened_stages(recipe: Recipe, held: Held, convert_first: Location | None, on_opened: OnOpened) -> dict[str, Opened]:
    """Returns the stages that a recipe uses, planned and opened as checkpoints."""
    from streammerge.planning.mixtures import Mixed
    from streammerge.planning.stages import Opened
    from streammerge.recipe.stages import stages_used

    stages: dict[str, Opened] = {}
    for name in stages_used(recipe):
        own = recipe.stages[name]
        make = Mixed if own.experts else Opened
        stages[stage_text(name)] = make(name, own, _indexes(own, held, convert_first, stages, on_opened))
    return stages


def _indexes(
    recipe: Recipe,
    held: Held,
    convert_first: Location | None,
    stages: Mapping[str, Opened],
    on_opened: OnOpened,
) -> dict[Reference, CheckpointIndex]:
    """Returns the indexes of a recipe's models, under the names that the recipe gives to their tensors."""
    indexes: dict[Reference, CheckpointIndex] = {}
    for each in recipe.checkpoints:
        index = opened(each.path, each.state_dict, recipe.ema, held, stages)
        for known in indexes.values():
            index.share(known)
        indexes[each] = index
    on_opened([index.entries for index in indexes.values()])
    if convert_first is not None:
        from streammerge.checkpoints.conversions import from_conversion

        indexes = {
            each: index if index.made_from else from_conversion(index, convert_first) for each, index in indexes.items()
        }
    if recipe.entries:
        indexes = agreed(recipe, indexes)
    return {each: index.with_names(each.rename) for each, index in indexes.items()}


def output_warnings(plan: Plan) -> list[str]:
    """Returns warnings about known obstacles at the output's place that would stop a run.

    A plan that is shown has them. A run raises them as errors, unless its options allow them.
    """
    if plan.out is None:
        return []
    free = plan.out.absolute().parent.free_bytes()
    said = []
    if free is not None and plan.disk_bytes > free:
        said.append(f"{decimal_bytes(plan.disk_bytes)} of disk are needed where {decimal_bytes(free)} are free")
    try:
        plan.out.check_writable(overwrite=False)
    except RecipeError as error:
        said.append(str(error))
    return said


def _likeness(recipe: Recipe, indexes: Mapping[Reference, CheckpointIndex]) -> list[str]:
    from streammerge.planning.likeness import check_likeness

    return check_likeness(recipe, *indexes.values())
