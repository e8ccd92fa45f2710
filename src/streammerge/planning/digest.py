"""Compares the plan of an interrupted run with the plan of now. Pieces of an equal plan are the same bytes, with any
workers and memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from streammerge.errors import listed
from streammerge.planning.aligned import Way
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import MergeTask, Tasks, alike, objects
from streammerge.stores.base import Location
from streammerge.version import __version__

_FORM = 4
_AT_ONCE = 1000  # tasks per call of json; one call per task would take most of the time
_MOST_SAID = 200  # the most inputs, and the most recipe keys, that a journal lists one by one


def plan_parts(plan: Plan) -> dict[str, Any]:
    """Returns the identity of a plan, by its parts. It is equal for two plans only if all their pieces are equal.

    Holds the versions as text, a digest of each input's current state, a digest of each value of the recipe, and one digest
    of everything: tasks, layout, inputs, versions. Budget, workers and the way of reading are not in it. An input is known
    by its name in the receipt, size, time and header, so that another spelling of its path, another mount of its disk or
    another current folder changes nothing.
    """
    import hashlib

    receipt = plan.layout.receipt
    digest = hashlib.sha256()
    names = {location: name for name, (location, _) in plan.input_files.items()}

    written: dict[int, tuple[Location, str]] = {}  # by identity, since this is asked for every tensor

    def plain(value: object) -> str:
        if not isinstance(value, Location):
            return str(value)
        known = written.get(id(value))
        if known is None:
            known = written[id(value)] = value, names.get(value, str(value))
        return known[1]

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, default=plain).encode() + b"\n")

    states = {plain(path): (known.size, known.version) for path, known in plan.identities.items()}

    add(_FORM, __version__, receipt.text())
    add(sorted(states.items()))
    for file in plan.layout.files:
        add(file.name, file.size)
        digest.update(array("Q", file.offsets.values()))
        for literal in file.literals:
            digest.update(literal.data)
    add([name for _, name in plan.layout.side_files])
    for said in _columns(plan.tasks) if isinstance(plan.tasks, Tasks) else ():
        add(*said) if isinstance(said, tuple) else digest.update(said)
    own = list(objects(plan.tasks))
    for start in range(0, len(own), _AT_ONCE):
        add(*map(_said, own[start : start + _AT_ONCE]))
    inputs = {name: _short(known) for name, known in states.items()}
    recipe = {key: _short(value) for key, value in receipt.recipe.items()}
    return {
        "form": _FORM,
        "versions": {**receipt.versions, "streammerge": __version__},
        "hashed": any("sha256" in said for said in receipt.inputs.values()),
        "inputs": inputs if len(inputs) <= _MOST_SAID else {},
        "recipe": recipe if len(recipe) <= _MOST_SAID else {},
        "digest": digest.hexdigest(),
    }


def _short(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the differences of two plans in words, "" when they are equal. ``earlier`` may come from another version."""
    if earlier == now:
        return ""
    if earlier.get("form") != now["form"] or earlier.keys() != now.keys():
        return "another version of streammerge made it"
    said = []
    versions = earlier["versions"], now["versions"]
    for name in sorted({*versions[0], *versions[1]}):
        was, is_ = (each.get(name, "none") for each in versions)
        said += [f"{name} was {was} and is {is_}"] if was != is_ else []
    said += _changed("the input", "the inputs", earlier["inputs"], now["inputs"])
    said += _changed("the recipe's key", "the recipe's keys", earlier["recipe"], now["recipe"])
    said += ["only one of them hashes the inputs"] if earlier["hashed"] != now["hashed"] else []
    return " and ".join(said) or "its tensors are placed or computed differently"


def _changed(one: str, several: str, earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [name for name in {**now, **earlier} if earlier.get(name) != now.get(name)]
    return [f"{one if len(names) == 1 else several} {listed(names)} changed"] if names else []


def _columns(tasks: Tasks) -> Iterator[tuple[Any, ...] | bytes]:
    """Yields what identifies the tasks of tables: each way once, then the columns."""
    views, numbers = tasks.views, dict[int, int]()
    if views is None:
        return
    for table in views.tables:
        yield (table.paths, [(kind.dtype, kind.shape) for kind in table.distinct().values()])
        yield from (table.starts.tobytes(), table.files.tobytes(), "\n".join(table.names).encode("utf-8", "surrogatepass"))
    yield from (theirs.tobytes() for theirs in views.theirs if theirs is not None)
    for made in tasks.made:
        if isinstance(made, Way) and id(made) not in numbers:
            numbers[id(made)] = len(numbers)
            like = made.like
            spec = (like.spec.dtype, like.spec.shape)
            yield (made.tables, spec, like.method.name, like.parameters, like.compute, like.based, tasks.seed)
    yield array("i", [numbers.get(id(made), -1) for made in tasks.made]).tobytes()
    yield from (column.tobytes() for column in (tasks.rows, tasks.files, tasks.offsets))


def _said(task: MergeTask) -> tuple[Any, ...]:
    spec = task.out
    sources = [source.place for source in task.sources]
    made = (spec.name, spec.dtype, spec.shape, task.file, task.offset, task.compute, task.based, task.seed)
    return (*made, task.method.name, task.parameters, sources)


def can_be_resumed(plan: Plan) -> bool:
    """Whether a later run can continue from the pieces of this one.

    False with a user's own method, because it may depend on things that change unnoticed, such as a file or another module.
    False with tensors in memory: they end with the process, and recognising them again would mean hashing all of them.
    """
    methods = {id(task.method): task.method for task, _ in alike(plan.tasks)}
    if plan.expressions:
        from streammerge.sources.merged import methods_in

        methods |= {id(method): method for source in plan.expressions for method in methods_in(source)}
    known = all(getattr(method.function, "__module__", "").startswith("streammerge.") for method in methods.values())
    return known and not any(source.held for source in plan.expressions)
