"""Whether what an interrupted run has left is of the same plan: then its pieces are the same bytes, however it ran."""

from __future__ import annotations

import json
from typing import Any

from streammerge.planning.plan import Plan
from streammerge.planning.tasks import MergeTask
from streammerge.sources.merged import methods_in
from streammerge.version import __version__

_FORM = 1
_AT_ONCE = 1000  # a call of json for each of many tasks would take most of the time


def plan_digest(plan: Plan) -> str:
    """Equal for two plans only if every piece of one is that of the other: tasks, layout, inputs as they lie on the disk,
    versions. Budget, workers and ways of reading have no part in it.
    """
    import hashlib

    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, default=str).encode() + b"\n")

    add(_FORM, __version__, plan.layout.receipt.text())
    add(sorted((path, *known) for path, known in plan.identities.items()))
    for file in plan.layout.files:
        add(file.name, file.size, list(file.offsets.values()))
        for literal in file.literals:
            digest.update(literal.data)
    add([name for _, name in plan.layout.side_files])
    for start in range(0, len(plan.tasks), _AT_ONCE):
        add(*map(_said, plan.tasks[start : start + _AT_ONCE]))
    return digest.hexdigest()


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
