"""Whether what an interrupted run has left is of the same plan: then its pieces are the same bytes, however it ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from streammerge.errors import listed
from streammerge.planning.plan import Plan
from streammerge.planning.tasks import MergeTask
from streammerge.sources.merged import methods_in
from streammerge.version import __version__

_FORM = 2
_AT_ONCE = 1000  # a call of json for each of many tasks would take most of the time
_MOST_SAID = 200  # inputs and recipe keys that a journal tells apart


def plan_parts(plan: Plan) -> dict[str, Any]:
    """What a plan is, by its parts; equal for two plans only if every piece of one is that of the other.

    Versions as text, each input's name with a digest of what it is now, each key of the recipe with one of its value, and
    one digest of all: tasks, layout, inputs, versions. Budget, workers and ways of reading have no part in it.
    """
    import hashlib

    receipt = plan.layout.receipt
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, default=str).encode() + b"\n")

    add(_FORM, __version__, receipt.text())
    add(sorted((str(path), *known) for path, known in plan.identities.items()))
    for file in plan.layout.files:
        add(file.name, file.size, list(file.offsets.values()))
        for literal in file.literals:
            digest.update(literal.data)
    add([name for _, name in plan.layout.side_files])
    for start in range(0, len(plan.tasks), _AT_ONCE):
        add(*map(_said, plan.tasks[start : start + _AT_ONCE]))
    inputs = {str(path): _short(known) for path, known in plan.identities.items()}
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
    """In what two plans differ, in words; "" when they are the same. ``earlier`` may come from another version."""
    if earlier == now:
        return ""
    if earlier.get("form") != now["form"]:
        return "another version of streammerge made it"
    said = []
    versions = earlier["versions"], now["versions"]
    for name in sorted({*versions[0], *versions[1]}):
        was, is_ = (each.get(name, "none") for each in versions)
        said += [f"{name} was {was} and is {is_}"] if was != is_ else []
    said += _changed("the input", "the inputs", earlier["inputs"], now["inputs"])
    said += _changed("the recipe's key", "the recipe's keys", earlier["recipe"], now["recipe"])
    said += ["the hashes of the inputs are wanted in one of them only"] if earlier["hashed"] != now["hashed"] else []
    return " and ".join(said) or "its tensors are laid out or computed otherwise"


def _changed(one: str, several: str, earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [name for name in {**now, **earlier} if earlier.get(name) != now.get(name)]
    return [f"{one if len(names) == 1 else several} {listed(names)} changed"] if names else []


def _said(task: MergeTask) -> tuple[Any, ...]:
    spec = task.out
    sources = [source.place for source in task.sources]
    made = (spec.name, spec.dtype, spec.shape, task.file, task.offset, task.compute, task.based, task.seed)
    return (*made, task.method.name, task.parameters, sources)


def can_be_resumed(plan: Plan) -> bool:
    """Whether a later run can go on from the pieces of this one.

    Not with a method of one's own, which may use what changes without a trace, like a file or another module. Not with
    tensors in memory: they end with the process, and to recognise them again, all of them would have to be hashed first.
    """
    methods = {id(task.method): task.method for task in plan.tasks}
    methods |= {id(method): method for source in plan.expressions for method in methods_in(source)}
    known = all(getattr(method.function, "__module__", "").startswith("streammerge.") for method in methods.values())
    return known and not any(source.held for source in plan.expressions)
