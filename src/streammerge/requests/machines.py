"""Saved plans: written for other machines, and followed on one of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.events import Listener, Told
from streammerge.options.resources import Executing, Machine, Resources, Sharing
from streammerge.options.writing import Writing
from streammerge.planning.plan import Plan
from streammerge.planning.saved import SavedPlan, output_of, read_saved, saved
from streammerge.planning.units import Unit, share
from streammerge.recipe.reader import read_recipe
from streammerge.requests.plans import planned
from streammerge.running.execution import Result, refuse_beside
from streammerge.running.finishing import finish_units, was_finished
from streammerge.running.session import RunOptions
from streammerge.running.shared import SharedOptions, ShareResult, make_units
from streammerge.stores.base import Joint, Location
from streammerge.stores.locations import parse
from streammerge.stores.remembering import remembering
from streammerge.units import counted

_ARRAY = "SLURM_ARRAY_TASK_"
_INDEX = "JOB_COMPLETION_INDEX"


def save(plan: Plan, place: Location, resources: Resources, executing: Executing, writing: Writing) -> SavedPlan:
    """Saves a plan in a file. Raises RecipeError if another file has this name, or if the plan cannot be saved."""
    if not isinstance(executing.executor, str):
        raise RecipeError("a saved plan holds the name of an executor; register it, and pass its name")
    made = for_others(plan, resources.workers, executing.executor, writing.hash)
    _advise(plan, made)
    if place.lexists():
        if place.is_file() and read_saved(place).key == made.key:
            return made
        raise RecipeError(f"{printable(place)} exists already; choose another name for the plan, or remove it")
    refuse_beside("save", place, plan)
    place.write_whole(made.text().encode(), overwrite=False)
    return made


_FEW_UNITS, _MUCH_BYTES = 8, 4 << 30


def _advise(plan: Plan, made: SavedPlan) -> None:
    """Notes how to have more units, if there are few because files are sent whole."""
    if joint_of(made).whole_files and len(made.units) < _FEW_UNITS and plan.write_bytes >= _MUCH_BYTES:
        place = "pass a smaller `max_shard_size`" if plan.layout.as_folder else "write a folder (a name that ends in /)"
        plan.notes.append(
            f"no more than {counted(len(made.units), 'machine')} can share the work, since files are sent whole; {place}"
        )


def for_others(plan: Plan, workers: int | None, executor: str, hashed: bool) -> SavedPlan:
    """Returns a plan as data, with the identity that it has for another machine, which names all files by their whole
    paths. Raises RecipeError for a plan that other machines cannot follow."""
    made = saved(plan, workers, executor, hashed)
    again = _made_again(made, Machine())
    places = [[(file.name, file.size) for file in each.layout.files] for each in (plan, again)]
    if again.layout.receipt != plan.layout.receipt or places[0] != places[1] or len(again.tasks) != len(plan.tasks):
        raise RecipeError("this plan cannot be made again from its recipe; merge on one machine")
    return saved(again, workers, executor, hashed, made)


def rebuilt(said: SavedPlan, machine: Machine) -> Plan:
    """Makes the plan again from the headers of its inputs. Raises ChangedError if an input changed."""
    with remembering():
        made = _made_again(said, machine)
        said.check_same(made)
    return made


def _made_again(said: SavedPlan, machine: Machine) -> Plan:
    recipe = read_recipe(said.recipe, folder=parse(said.folder))
    resources = Resources(
        memory=said.memory if machine.memory is None else machine.memory,
        workers=said.workers if machine.workers is None else machine.workers,
        io=said.io if machine.io is None else machine.io,
    )
    executor = said.executor if machine.executor is None else machine.executor
    return planned(recipe, output_of(said), resources, executor, hashed=said.hashed)


def joint_of(said: SavedPlan) -> Joint:
    """Returns the place where the machines make the output."""
    out = output_of(said)
    return (out.resolve() if out.is_folder() else out).join(said.key)


def work(place: Location, asked: Sharing, machine: Machine, listener: Listener, resident_before: int) -> ShareResult:
    """Makes units of a saved plan. Raises the errors of :func:`streammerge.worker`."""
    said = read_saved(place)
    units = said.all_units()
    wanted = chosen(units, asked, os.environ)
    plan, joint = rebuilt(said, machine), joint_of(said)
    if joint.published() or (not joint.exists() and was_finished(plan, joint.out)):
        note = f"{printable(joint.out)} is finished already"
        listener(Told("note", note))
        numbers = (0, len(wanted), 0, 0, 0, 0.0, 0, resident_before, plan.memory_bytes)
        return ShareResult(joint.out, *numbers, notes=(note,), finished=True)
    options = SharedOptions(said.lease_seconds, listener, _executor(said, machine), machine.polite)
    return make_units(plan, joint, units, wanted, options, resident_before)


def _executor(said: SavedPlan, machine: Machine) -> Any:
    return said.executor if machine.executor is None else machine.executor


def finish(place: Location, overwrite: bool, listener: Listener, resident_before: int) -> Result:
    """Publishes the output of a saved plan. Raises the errors of :func:`streammerge.finish`."""
    said = read_saved(place)
    plan, joint = rebuilt(said, Machine()), joint_of(said)
    options = RunOptions(overwrite=overwrite, listener=listener, executor=said.executor)
    if not joint.exists() and was_finished(plan, joint.out):
        note = f"{printable(joint.out)} is finished already"
        listener(Told("note", note))
        plan.notes.append(note)
        return Result(joint.out, 0, 0, 0.0, 0, resident_before, plan.memory_bytes, plan, tuple(plan.notes), ())
    return finish_units(plan, joint, said.all_units(), said.lease_seconds, options, resident_before)


def chosen(units: Sequence[Unit], asked: Sharing, environment: Mapping[str, str]) -> list[Unit]:
    """Returns the units that a machine is to make. Raises RecipeError for a share that is none."""
    if asked.claim:
        if asked.share is not None:
            raise RecipeError("`share` names units and `claim` takes any; give one of them")
        return _from_middle(units)
    number, shares = _share(asked.share, environment)
    return share(units, number, shares)


def _from_middle(units: Sequence[Unit]) -> list[Unit]:
    """Returns all units: those first that cost the most, the others from a place that differs between machines, so that
    machines seldom want the same unit."""
    most = 4 * sum(unit.cost for unit in units) // max(len(units), 1)
    large = sorted((unit for unit in units if unit.cost > most), key=lambda unit: -unit.cost)
    rest = [unit for unit in units if unit.cost <= most]
    start = int.from_bytes(os.urandom(4), "little") % max(len(rest), 1)
    return [*large, *rest[start:], *rest[:start]]


def _share(said: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns the number of a share, from 0, and how many there are."""
    index, slash, count = (said or "").rpartition("/")
    if said is None:
        count = environment.get(f"{_ARRAY}COUNT", "")
        if not count:
            raise RecipeError(
                'a worker makes a share of the units, like `share="1/8"`, or any that are free with `claim=True`; '
                f"without both it is the array task of a Slurm job, and there is no {_ARRAY}COUNT"
            )
    if not slash:
        index = _index(environment)
    try:
        number, shares = int(index), int(count)
    except ValueError:
        shares = 0
    if shares < 1 or not 0 <= number <= shares:
        raise RecipeError(f"`share` takes I/N, like 1/8, not {printable(said if said is not None else f'{index}/{count}')}")
    return number % shares, shares


def _index(environment: Mapping[str, str]) -> str:
    """Returns the index of this task of a Slurm array, from 0, or of this pod of a Kubernetes job."""
    if f"{_ARRAY}ID" in environment:
        task, first, step = (environment.get(f"{_ARRAY}{name}", other) for name, other in _SLURM.items())
        try:
            turn, rest = divmod(int(task) - int(first), int(step))
        except (ValueError, ZeroDivisionError):
            turn, rest = 0, 1
        if rest:
            raise RecipeError("the tasks of this Slurm array have no even steps; pass `share` or `claim=True`")
        return str(turn)
    if _INDEX in environment:
        return environment[_INDEX]
    raise RecipeError(f'`share` with N alone needs {_ARRAY}ID or {_INDEX}; pass I too, like `share="1/8"`')


_SLURM = {"ID": "0", "MIN": "0", "STEP": "1"}
