"""Whether what an interrupted run has left is of the same plan: then its pieces are the same bytes, however it ran."""

from __future__ import annotations

import json
import marshal
import uuid
from pathlib import Path
from typing import Any

from streammerge.methods.contracts import MergeMethod
from streammerge.planning import Plan
from streammerge.storage import identity
from streammerge.version import __version__

_FORM = 1


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
    add([(name, *identity(source)) for source, name in plan.layout.side_files])
    methods: dict[int, str] = {}
    for task in plan.tasks:
        method = task.method
        methods.setdefault(id(method), _method_digest(method))
        spec = task.out
        add(spec.name, spec.dtype, spec.shape, task.file, task.offset, task.compute, task.based, task.seed)
        add(methods[id(method)], task.parameters)
        add(*((s.path, s.offset, s.spec.dtype, s.spec.shape, s.strides, str(s.deflated), s.lazy) for s in task.sources))
    return digest.hexdigest()


def _method_digest(method: MergeMethod) -> str:
    """The name of a method, and for one's own its code, which may have changed meanwhile."""
    import hashlib

    function: Any = method.function
    if getattr(function, "__module__", "").startswith("streammerge."):
        return method.name
    if not hasattr(function, "__code__"):
        return uuid.uuid4().hex  # nobody knows what it does; it never equals another
    source = Path(function.__code__.co_filename)
    given = (function.__defaults__, function.__kwdefaults__, [cell.cell_contents for cell in function.__closure__ or ()])
    parts = [marshal.dumps(function.__code__), source.read_bytes() if source.is_file() else b"", repr(given).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
